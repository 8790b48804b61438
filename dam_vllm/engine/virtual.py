"""Runs vLLM's paged CPU kernel over virtual sequences."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs

from dam_vllm.attention.cpu.plan import Plan
from dam_vllm.engine.workspace import WORKSPACE


@dataclass(frozen=True)
class VirtualBatch:
    """Virtual sequences of some KV heads of a layer; n = these heads x query blocks.

    Attributes:
        heads: int64, the KV heads in order, or None for all.
        block_table: int32 [n, width], virtual page ids.
        seq_lens: int32 [n].
        query_start_loc: int32 [n + 1].
        scheduler_metadata: how the kernel splits the work.
    """

    heads: torch.Tensor | None
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    scheduler_metadata: torch.Tensor


@dataclass(frozen=True)
class Scheduler:
    """What the kernel's schedule depends on beside the sequences.

    Attributes:
        group: query heads a KV head.
        head_size: channels a head.
        dtype: of queries.
        isa: instruction set, which is also the cache's layout.
        kv_cache_dtype: vLLM's name of the cache's dtype.
    """

    group: int
    head_size: int
    dtype: torch.dtype
    isa: str
    kv_cache_dtype: str

    def dynamic(self, plan: Plan, heads: torch.Tensor) -> VirtualBatch:
        """The batch of a plan of one layer that covers the listed KV heads."""
        table, lens, starts = plan.block_table[0], plan.seq_lens[0], plan.query_start_loc
        return VirtualBatch(heads, table, lens, starts, self.schedule(starts, lens))

    def static(self, plan: Plan, row: int, kv_heads: int, heads: list[int]) -> VirtualBatch | None:
        """A layer's part of a plan that covers all KV heads, cut to some of them.

        Args:
            plan: of all layers.
            row: the layer's.
            kv_heads: KV heads of the plan.
            heads: the heads wanted, ascending.

        Returns:
            The batch, or None without heads.
        """
        table, lens, starts = plan.block_table[row], plan.seq_lens[row], plan.query_start_loc
        if len(heads) == kv_heads:
            return VirtualBatch(None, table, lens, starts, self.schedule(starts, lens))
        if not heads:
            return None
        each = len(lens) // kv_heads
        lens = lens.view(kv_heads, each)[heads].flatten()
        table = table.view(kv_heads, each, -1)[heads].flatten(0, 1)
        # Queries lie head by head and as long for every head: the first heads' starts hold.
        starts = starts[: len(lens) + 1].contiguous()
        return VirtualBatch(torch.tensor(heads), table, lens, starts, self.schedule(starts, lens))

    def schedule(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """How the kernel splits the work of virtual sequences.

        Args:
            query_start_loc: int32 [n + 1].
            seq_lens: int32 [n].

        Returns:
            What the kernel takes; it depends on nothing else.
        """
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.group,
            num_kv_heads=1,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )


def attend(
    impl: Any,
    layer: Any,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: VirtualBatch,
    output: torch.Tensor,
) -> None:
    """Runs the kernel over virtual sequences.

    Args:
        impl: the attention implementation, for scale, soft-capping and cache dtype.
        layer: the attention layer, for its scales.
        query: [tokens, kv_heads, group, head_size].
        kv_cache: [blocks, kv_heads, page, 2 * head_size].
        batch: the virtual sequences.
        output: [tokens, kv_heads, group, head_size]; the batch's heads are written.
    """
    tokens, kv_heads, *rest = query.shape
    kv_heads = kv_heads if batch.heads is None else len(batch.heads)
    by_head, result = WORKSPACE.take(2, (kv_heads, tokens, *rest), query.dtype)
    if batch.heads is None:
        by_head.copy_(query.transpose(0, 1))
    else:
        torch.index_select(query.transpose(0, 1), 0, batch.heads, out=by_head)
    page, width = kv_cache.shape[2:]
    keys, values = kv_cache.view(-1, 1, 2 * page, width // 2).chunk(2, dim=2)
    ops.cpu_attention_with_kv_cache(
        query=by_head.flatten(0, 1),
        key_cache=keys,
        value_cache=values,
        output=result.flatten(0, 1),
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        scale=impl.scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=batch.block_table,
        softcap=impl.logits_soft_cap,
        scheduler_metadata=batch.scheduler_metadata,
        s_aux=None,
        k_scale=layer._k_scale_float,
        v_scale=layer._v_scale_float,
        kv_cache_dtype=impl.kv_cache_dtype,
    )
    if batch.heads is None:
        output.copy_(result.transpose(0, 1))
    else:
        output.index_copy_(1, batch.heads, result.transpose(0, 1))
