"""FlashAttention on virtual pages: a plan's sequences handed to a dense paged kernel.

`Varlen` stands for `flash_attn_varlen_func` (vllm/vllm_flash_attn/flash_attn_interface.py) of any
version that takes block tables; its causal mask is aligned to the end of a sequence, where a
query block's own pages lie. It has one row stride for all sequences, so that in prefill queries
are handed over head by head, in a layout of their own: two copies (torch's gather and scatter take
six times as long for the same bytes) for one launch that fills the GPU, where a launch a head would
leave it waiting for the head's longest query block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.cuda.plan import DevicePlan
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks

Varlen = Callable[..., Any]
# Tokens that a program copies.
TOKENS = 16


@dataclass(frozen=True)
class Descales:
    """Factors of quantised queries, keys and values; float32, one number each, on the device.

    Attributes:
        query: of queries.
        key: of keys.
        value: of values.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def arguments(self, sequences: int) -> dict[str, torch.Tensor]:
        """What `Varlen` takes: float32 [sequences, 1], without a copy."""
        factors = {"q_descale": self.query, "k_descale": self.key, "v_descale": self.value}
        return {name: factor.expand(sequences, 1) for name, factor in factors.items()}


@dataclass(frozen=True)
class Flash:
    """FlashAttention as vLLM picked it.

    Attributes:
        varlen: the kernel.
        decode_splits: most parts that the keys of one query are split into; 0 leaves the choice to
            the kernel, which a CUDA graph cannot hold (FlashAttention 3 alone takes more than 1).
        descales: for an fp8 cache, whose queries come quantised and whose outputs are bfloat16
            (FlashAttention 3); else None.
    """

    varlen: Varlen
    decode_splits: int = 0
    descales: Descales | None = None


def prefill(
    flash: Flash,
    asked: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    found: torch.Tensor,
    plan: DevicePlan,
    query_blocks: DeviceQueryBlocks,
    softmax: Softmax,
    lse: bool = False,
) -> torch.Tensor | None:
    """Computes attention of a part's queries in some KV heads.

    Args:
        flash: the kernel.
        asked: queries [n, tokens, heads_per_kv, head_size], contiguous.
        key: [virtual pages, page, head_size], in the query's dtype.
        value: [virtual pages, page, head_size].
        found: like the queries, written.
        plan: of these heads, with starts.
        query_blocks: the queries.
        softmax: scale and soft-capping.
        lse: whether the log-sum-exp of the scores is wanted.

    Returns:
        It, natural, float32 [n, tokens, heads_per_kv]; or None.
    """
    # Splits fill a GPU that has few sequences; here there is one for each query block.
    sums = _call(flash, asked.flatten(0, 1), key, value, found.flatten(0, 1), plan, query_blocks,
                 plan.starts, softmax, 1, lse)  # fmt: skip
    return None if sums is None else sums.unflatten(1, asked.shape[:2]).permute(1, 2, 0)


def decode(
    flash: Flash,
    each: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    plan: DevicePlan,
    query_blocks: DeviceQueryBlocks,
    softmax: Softmax,
    lse: bool = False,
) -> torch.Tensor | None:
    """Computes attention of one query a slot in all KV heads of a layer.

    Args:
        flash: the kernel.
        each: int32, 0, 1, 2, ... up to slots times KV heads or more.
        query: [tokens, heads, head_size]; rows beyond the slots are not read.
        key: [virtual pages, page, head_size], in the query's dtype.
        value: [virtual pages, page, head_size].
        output: [tokens, heads, head_size], contiguous, written.
        plan: of the layer, each slot's heads together.
        query_blocks: the queries.
        softmax: scale and soft-capping.
        lse: whether the log-sum-exp of the scores is wanted.

    Returns:
        It, natural, float32 [slots, kv_heads, heads_per_kv]; or None.
    """
    slots, size, sequences = len(query_blocks), query.shape[2], len(plan.seq_lens)
    asked = query[:slots].reshape(sequences, -1, size)
    sums = _call(flash, asked, key, value, output[:slots].view_as(asked), plan, query_blocks,
                 each[: sequences + 1], softmax, flash.decode_splits, lse)  # fmt: skip
    return None if sums is None else sums.unflatten(1, (slots, -1)).permute(1, 2, 0)


def _call(
    flash: Flash,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    plan: DevicePlan,
    query_blocks: DeviceQueryBlocks,
    starts: torch.Tensor | None,
    softmax: Softmax,
    num_splits: int,
    lse: bool,
) -> torch.Tensor | None:
    """Gives the log-sum-exp [heads, rows] where it is wanted."""
    descales = flash.descales.arguments(len(plan.seq_lens)) if flash.descales else {}
    given = flash.varlen(
        **descales,
        **({"return_softmax_lse": True} if lse else {}),
        q=query,
        k=key.unsqueeze(2),
        v=value.unsqueeze(2),
        out=output,
        cu_seqlens_q=starts,
        seqused_k=plan.seq_lens,
        block_table=plan.table,
        max_seqlen_q=query_blocks.most_queries,
        max_seqlen_k=plan.table.shape[1] * key.shape[1],
        softmax_scale=softmax.scale,
        softcap=softmax.softcap,
        causal=True,
        num_splits=num_splits,
    )
    return given[1] if lse else None


def gather_heads(query: torch.Tensor, heads: torch.Tensor, target: torch.Tensor) -> None:
    """Copies some KV heads' queries, head after head: one launch.

    Args:
        query: [tokens, heads, head_size]; a token's heads lie together.
        heads: int32 [n], KV heads.
        target: [n, tokens, heads_per_kv, head_size], contiguous, written.
    """
    _copy(query, target, heads, target.shape, query.stride(0), gathers=True)


def scatter_heads(source: torch.Tensor, heads: torch.Tensor, output: torch.Tensor) -> None:
    """The way back for outputs: one launch.

    Args:
        source: [n, tokens, heads_per_kv, head_size], contiguous.
        heads: int32 [n], KV heads.
        output: [tokens, heads, head_size], of which these heads are written.
    """
    _copy(source, output, heads, source.shape, output.stride(0), gathers=False)


def _copy(
    source: torch.Tensor,
    target: torch.Tensor,
    heads: torch.Tensor,
    shape: torch.Size,
    row: int,
    gathers: bool,
) -> None:
    count, tokens, *each = shape
    width = each[0] * each[1]
    _copy_heads[(triton.cdiv(tokens, TOKENS), count)](
        source, target, heads, row, tokens, WIDTH=width, PADDED=triton.next_power_of_2(width),
        TOKENS=TOKENS, GATHERS=gathers, num_warps=8,
    )  # fmt: skip


# Rows are multiples of 16 bytes, so that vectors are too wherever they are cut out of a projection.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["head_ptr"])
def _copy_heads(
    source_ptr, target_ptr, head_ptr, row, tokens,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, GATHERS: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one KV head; `row` lies between tokens where heads lie together."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    number = tl.program_id(1).to(tl.int64)
    head = tl.load(head_ptr + number)
    channel = tl.arange(0, PADDED)
    held = (token < tokens)[:, None] & (channel < WIDTH)[None, :]
    together = (head * WIDTH + token * row)[:, None] + channel[None, :]
    apart = ((number * tokens + token) * WIDTH)[:, None] + channel[None, :]
    source, target = (together, apart) if GATHERS else (apart, together)
    tl.store(target_ptr + target, tl.load(source_ptr + source, mask=held), mask=held)
