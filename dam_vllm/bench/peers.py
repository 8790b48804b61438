"""What DAM is timed beside: calls of each peer, one for each set of inputs.

Each function makes beforehand what serving holds or makes once a step for all layers; the calls
do the rest. Calls return [rows, heads, head_size].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dam_vllm.attention.cuda.plan import DevicePlan, plan_heads
from dam_vllm.bench.fa3 import Flash
from dam_vllm.bench.gpu_case import DTYPE, Case, Geometry, Inputs
from dam_vllm.bench.gpu_timing import Call
from dam_vllm.bench.scattered import Selection
from dam_vllm.masks.page_tables import PageSelector


def flash_calls(
    case: Case, where: Geometry, inputs: Sequence[Inputs], flash: Flash, paged: bool
) -> list[Call]:
    """Dense FlashAttention: of a paged cache, as stock vLLM calls it, or of contiguous keys.

    Args:
        case: the geometry.
        where: the same on the device.
        inputs: sets to rotate.
        flash: the build.
        paged: whether keys lie in pages; contiguous ones are a whole prompt's.
    """
    output = torch.full_like(inputs[0].query, torch.nan)
    shared: dict[str, Any] = {
        "out": output,
        "cu_seqlens_q": where.starts,
        "max_seqlen_q": case.queries,
        "max_seqlen_k": case.tokens,
        "softmax_scale": case.scale,
        "causal": True,
    }
    if not paged:
        shared["cu_seqlens_k"] = where.starts
    else:
        shared |= {"seqused_k": where.lens, "scheduler_metadata": _schedule(case, where, flash)}

    def call_of(each: Inputs) -> Call:
        if not paged:
            keys = {
                name: part[0].transpose(0, 1).contiguous()
                for name, part in (("k", each.key), ("v", each.value))
            }
        else:
            # Stock vLLM keeps a token's heads together.
            key, value = each.cache.transpose(1, 2).contiguous().split(case.head_size, dim=-1)
            keys = {"k": key, "v": value, "block_table": each.block_table}

        def call() -> torch.Tensor:
            flash.varlen(q=each.query, **keys, **shared)
            return output

        return call

    return [call_of(each) for each in inputs]


def _schedule(case: Case, where: Geometry, flash: Flash) -> Any:
    if flash.schedule is None:
        return None
    return flash.schedule(
        batch_size=case.batch,
        max_seqlen_q=case.queries,
        max_seqlen_k=case.tokens,
        num_heads_q=case.heads,
        num_heads_kv=case.kv_heads,
        headdim=case.head_size,
        cache_seqlens=where.lens,
        qkv_dtype=DTYPE,
        cu_seqlens_q=where.starts,
        page_size=case.page,
        causal=True,
    )


def sdpa_calls(case: Case, inputs: Sequence[Inputs]) -> list[Call]:
    """Dense attention of torch, the implementation that it chooses itself."""

    def call_of(each: Inputs) -> Call:
        query = each.query.unflatten(0, (case.batch, -1)).transpose(1, 2)

        def call() -> torch.Tensor:
            found = scaled_dot_product_attention(
                query,
                each.key,
                each.value,
                is_causal=case.phase == "prefill",
                scale=case.scale,
                enable_gqa=True,
            )
            return found.transpose(1, 2).flatten(0, 1)

        return call

    return [call_of(each) for each in inputs]


def flex_calls(case: Case, inputs: Sequence[Inputs], selection: Selection) -> list[Call]:
    """Torch's flex_attention over the selected pages."""
    from dam_vllm.bench.flex import block_mask, flex_step

    pages = selection.pages.to(inputs[0].query.device).repeat_interleave(case.heads_per_kv, dim=0)
    mask = block_mask(pages, case.queries, case.tokens, case.page)

    def call_of(each: Inputs) -> Call:
        query = each.query.unflatten(0, (case.batch, -1)).transpose(1, 2)
        step = flex_step(query, each.key, each.value, mask, case.scale)
        return lambda: step().transpose(1, 2).flatten(0, 1)

    return [call_of(each) for each in inputs]


def plan_call(case: Case, where: Geometry, inputs: Inputs, selector: PageSelector) -> DevicePlan:
    """Plans a layer by itself."""
    plan = DevicePlan.empty(where.query_blocks, where.places, case.pages)
    plan_heads(
        plan, where.every, selector, where.query_blocks, inputs.block_table, case.rows,
        case.kv_heads,
    )  # fmt: skip
    return plan


def plan_calls(
    case: Case, where: Geometry, inputs: Sequence[Inputs], selection: Selection
) -> list[Call]:
    """The plan of a layer by itself; these calls return its block table."""
    selector = selection.selector(where.starts.device)
    return [
        lambda each=each: plan_call(case, where, each, selector).table  # type: ignore[misc]
        for each in inputs
    ]


def virtual_pages(case: Case, each: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache, [virtual pages, page, head_size] each."""
    key, value = each.cache.flatten(0, 1).split(case.head_size, dim=-1)
    return key, value
