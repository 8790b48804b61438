"""FlashAttention on virtual pages: a plan's sequences handed to a dense paged kernel.

`Varlen` stands for `flash_attn_varlen_func` (vllm/vllm_flash_attn/flash_attn_interface.py) of any
version that takes block tables; its causal mask is aligned to the end of a sequence, where a
query block's own pages lie.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.cuda.plan import DevicePlan, DeviceQueryBlocks

Varlen = Callable[..., Any]


def attend_flash(
    varlen: Varlen,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    plan: DevicePlan,
    query_blocks: DeviceQueryBlocks,
    heads: Sequence[int],
    softmax: Softmax,
) -> None:
    """Computes attention of a part's queries in some KV heads; arguments as for `attend_paged`.

    Args:
        varlen: the kernel.
        query: [tokens, heads, head_size].
        key: [virtual pages, page, head_size], 16 bits an element.
        value: [virtual pages, page, head_size].
        output: [tokens, heads, head_size], written.
        plan: covers these heads.
        query_blocks: the queries.
        heads: KV heads, known to the host.
        softmax: scale and soft-capping.
    """
    kv_heads, width = plan.table.shape[1:]
    group = query.shape[1] // kv_heads
    shared = {
        "k": key.unsqueeze(2),
        "v": value.unsqueeze(2),
        "max_seqlen_q": query_blocks.most_queries,
        "max_seqlen_k": width * key.shape[1],
        "softmax_scale": softmax.scale,
        "softcap": softmax.softcap,
        "causal": True,
    }
    if query_blocks.most_queries == 1 and len(heads) == kv_heads:
        _all_heads_of_one_query(varlen, query, output, plan, shared)
        return
    for head in heads:
        # Rows of one head's queries lie as far apart as whole tokens: no copy is needed.
        mine = slice(head * group, (head + 1) * group)
        varlen(
            q=query[:, mine],
            out=output[:, mine],
            cu_seqlens_q=plan.starts,
            seqused_k=plan.seq_lens[:, head],
            block_table=plan.table[:, head],
            **shared,
        )


def _all_heads_of_one_query(
    varlen: Varlen,
    query: torch.Tensor,
    output: torch.Tensor,
    plan: DevicePlan,
    shared: dict[str, Any],
) -> None:
    """One launch for all heads, each slot's only query taken head by head."""
    slots, kv_heads, width = plan.table.shape
    size = query.shape[2]
    varlen(
        q=query[:slots].reshape(slots * kv_heads, -1, size),
        out=output[:slots].view(slots * kv_heads, -1, size),
        cu_seqlens_q=torch.arange(slots * kv_heads + 1, dtype=torch.int32, device=query.device),
        seqused_k=plan.seq_lens.flatten(),
        block_table=plan.table.view(slots * kv_heads, width),
        **shared,
    )
