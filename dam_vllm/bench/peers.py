"""What is timed side by side: calls of each peer, one for each set of inputs.

Each function makes beforehand what serving holds or makes once a step for all layers; the calls
do the rest. Calls return [rows, heads, head_size].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from dam_vllm.attention.cuda.flash import attend_flash
from dam_vllm.attention.cuda.paged import Softmax, attend_paged
from dam_vllm.attention.cuda.plan import DevicePlan, plan_heads
from dam_vllm.bench.fa3 import Flash
from dam_vllm.bench.gpu_case import DTYPE, Case, Geometry, Inputs
from dam_vllm.bench.gpu_timing import Call
from dam_vllm.bench.scattered import Selection


def flash_calls(case: Case, where: Geometry, inputs: Sequence[Inputs], flash: Flash) -> list[Call]:
    """Dense FlashAttention: of a prompt's keys as they are computed, in decoding of a paged cache.

    Args:
        case: the geometry.
        where: the same on the device.
        inputs: sets to rotate.
        flash: the build.
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
    if case.phase == "prefill":
        shared["cu_seqlens_k"] = where.starts
    else:
        shared |= {"seqused_k": where.lens, "scheduler_metadata": _schedule(case, where, flash)}

    def call_of(each: Inputs) -> Call:
        if case.phase == "prefill":
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

    pages = selection.pages.to(inputs[0].query.device).repeat_interleave(case.group, dim=0)
    mask = block_mask(pages, case.queries, case.tokens, case.page)

    def call_of(each: Inputs) -> Call:
        query = each.query.unflatten(0, (case.batch, -1)).transpose(1, 2)
        step = flex_step(query, each.key, each.value, mask, case.scale)
        return lambda: step().transpose(1, 2).flatten(0, 1)

    return [call_of(each) for each in inputs]


def plan_call(case: Case, where: Geometry, each: Inputs, selection: Selection) -> DevicePlan:
    """Plans a layer, as serving does in every step."""
    plan = DevicePlan.empty(where.query_blocks, case.kv_heads, case.pages)
    plan_heads(plan, where.every, selection.selector, where.query_blocks, each.block_table)
    return plan


def plan_calls(
    case: Case, where: Geometry, inputs: Sequence[Inputs], selection: Selection
) -> list[Call]:
    """The plan alone; these calls return its block table."""
    return [
        lambda each=each: plan_call(case, where, each, selection).table  # type: ignore[misc]
        for each in inputs
    ]


def dam_calls(
    case: Case,
    where: Geometry,
    inputs: Sequence[Inputs],
    selection: Selection,
    flash: Flash | None,
) -> list[Call]:
    """A layer as served, its plan included.

    Args:
        case: the geometry.
        where: the same on the device.
        inputs: sets to rotate.
        selection: pages to read.
        flash: runs on virtual pages; the Triton kernel does where it is None.
    """
    output = torch.full_like(inputs[0].query, torch.nan)
    softmax = Softmax(case.scale)

    def call_of(each: Inputs) -> Call:
        paged = (each.query, *virtual_pages(case, each), output)

        def call() -> torch.Tensor:
            plan = plan_call(case, where, each, selection)
            if flash is None:
                attend_paged(*paged, plan, where.query_blocks, where.every, softmax)
            else:
                heads = range(case.kv_heads)
                attend_flash(flash.varlen, *paged, plan, where.query_blocks, heads, softmax)
            return output

        return call

    return [call_of(each) for each in inputs]


def virtual_pages(case: Case, each: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache, [virtual pages, page, head_size] each."""
    key, value = each.cache.flatten(0, 1).split(case.head_size, dim=-1)
    return key, value
