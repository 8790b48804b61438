"""Attention over the pages of a plan: one Triton kernel for prefill and split-KV decode.

All query heads of a KV head share its pages, so a block of rows packs (query, query head) pairs.
Keys are taken in blocks of the virtual sequence; softmax runs online in base 2 (FlashAttention-2,
arXiv 2307.08691). Where a part has few query blocks, each sequence's blocks are split among
programs and merged by their log-sum-exp (Flash-Decoding).
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.merge import LN2, LOG2E, Partial
from dam_vllm.attention.cuda.plan import MOVING, DevicePlan, sequence_at
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_at
from dam_vllm.attention.cuda.token_bits import TokenBits, token_visible
from dam_vllm.attention.cuda.tuning import LEAST_PART, Tuning, split_count, tuning

INTERPRETED = bool(triton.knobs.runtime.interpret)
LEAST_BLOCKS = tl.constexpr(LEAST_PART)


@dataclass(frozen=True)
class Softmax:
    """How scores become weights and values.

    Attributes:
        scale: factor of the scores, that of an fp8 cache's keys included.
        softcap: soft-capping of the scores, 0 for none.
        value_scale: factor of an fp8 cache's values.
    """

    scale: float
    softcap: float = 0.0
    value_scale: float = 1.0


def attend_paged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    plan: DevicePlan,
    query_blocks: DeviceQueryBlocks,
    heads: torch.Tensor,
    kv_heads: int,
    softmax: Softmax,
    exact: TokenBits | None = None,
    tuned: Tuning | None = None,
    lse: torch.Tensor | None = None,
) -> None:
    """Computes attention of a part's queries in some KV heads.

    Args:
        query: [tokens, heads, head_size], the last dimension contiguous, as of all below.
        key: [virtual pages, page, head_size], in the query's dtype or float8.
        value: [virtual pages, page, head_size], likewise.
        output: [tokens, heads, head_size], written where the part's queries lie.
        plan: of these heads.
        query_blocks: the queries; of the plan.
        heads: int32 [n], KV heads.
        kv_heads: KV heads of the layer.
        softmax: scales and soft-capping.
        exact: token masks inside the pages, or None.
        tuned: block sizes, or None for those of the table.
        lse: float32 [tokens, heads], contiguous, written likewise: natural log-sum-exp of the
            scores; or None.
    """
    heads_per_kv, size, page = query.shape[1] // kv_heads, query.shape[2], key.shape[1]
    rows = query_blocks.most_queries * heads_per_kv
    # Only two sizes, however few queries a step has: each is a kernel of its own.
    most = heads_per_kv * (1 if query_blocks.most_queries == 1 else query_blocks.query_block)
    tuned = tuned or tuning(query.device, size, most, exact is not None)
    block_m = max(16, min(tuned.block_m, triton.next_power_of_2(most)))
    row_blocks = triton.cdiv(rows, block_m)
    programs = len(query_blocks) * row_blocks * len(heads)
    keys = plan.table.shape[1] * page
    blocks = triton.cdiv(keys, tuned.block_n)
    splits = split_count(query.device, programs, blocks) if query_blocks.most_queries == 1 else 1
    parts = Partial.of(output, splits) if splits > 1 else None
    _attend_kernel[(len(query_blocks) * row_blocks, len(heads), splits)](
        query, key, value, output, *(parts.tensors if parts else (None, lse)),
        plan.table, plan.pages if exact else None, plan.seq_lens, heads, plan.places.numbers,
        *query_blocks.arguments,
        **_bits(exact),
        q_row=query.stride(0), q_head=query.stride(1),
        k_page=key.stride(0), k_row=key.stride(1), v_page=value.stride(0), v_row=value.stride(1),
        o_row=output.stride(0), o_head=output.stride(1),
        number_stride=plan.places.numbers.stride(0), slots=len(query_blocks),
        step=plan.places.step, tokens=len(query), heads=query.shape[1],
        width=plan.table.shape[1], row_blocks=row_blocks, splits=splits,
        scale=softmax.scale, softcap=softmax.softcap, value_scale=softmax.value_scale,
        HEADS_PER_KV=heads_per_kv, SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
        QUERY_BLOCK=query_blocks.query_block, PAGE=page, BLOCK_M=block_m, BLOCK_N=tuned.block_n,
        CAPPED=softmax.softcap > 0, UPCAST=INTERPRETED, num_warps=tuned.warps,
        num_stages=tuned.stages,
    )  # fmt: skip
    if parts is not None:
        parts.merge(output, query_blocks, heads, heads_per_kv, lse)


def _bits(exact: TokenBits | None) -> dict[str, Any]:
    """Arguments of `token_visible`."""
    if exact is None:
        names = ("columns_ptr", "diagonals_ptr", "true_ptr")
        numbers = ("bytes_each", "true_bytes", "pcl", "reach", "dense_below")
        return dict.fromkeys(names) | dict.fromkeys(numbers, 0)
    return {
        "columns_ptr": exact.columns,
        "diagonals_ptr": exact.diagonals,
        "true_ptr": exact.true,
        "bytes_each": exact.columns.shape[1],
        "true_bytes": exact.true.shape[1],
        "pcl": exact.pcl,
        "reach": exact.reach,
        "dense_below": exact.dense_below,
    }


# What changes from step to step must not make the kernel be compiled anew.
@triton.jit(
    do_not_specialize=["number_stride", "slots", "step", "tokens", "width", "row_blocks", "splits"],
    do_not_specialize_on_alignment=MOVING,
)
def _attend_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, part_ptr, sum_ptr,
    table_ptr, page_ptr, seq_len_ptr, head_ptr, place_ptr,
    request_ptr, offset_ptr, query_start_ptr, request_len_ptr,
    columns_ptr, diagonals_ptr, true_ptr, bytes_each, true_bytes, pcl, reach, dense_below,
    q_row, q_head, k_page, k_row, v_page, v_row, o_row, o_head, number_stride, slots, step,
    tokens, heads, width, row_blocks, splits, scale, softcap, value_scale,
    HEADS_PER_KV: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of rows of a query block, one KV head, one split of its keys."""
    slot, block = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks
    split = tl.program_id(2)
    head = tl.load(head_ptr + tl.program_id(1))
    _, _, row, start, stop = query_block_at(
        slot, request_ptr, offset_ptr, query_start_ptr, request_len_ptr, QUERY_BLOCK
    )
    queries = stop - start
    if block * BLOCK_M >= queries * HEADS_PER_KV:
        return
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token, member = packed // HEADS_PER_KV, head * HEADS_PER_KV + packed % HEADS_PER_KV
    channel = tl.arange(0, SIZE_PADDED)
    held = (token < queries)[:, None] & (channel < SIZE)[None, :]
    place = (row + token).to(tl.int64)
    asked = place * q_row + member * q_head
    query = tl.load(query_ptr + asked[:, None] + channel[None, :], mask=held, other=0.0)

    line = sequence_at(slot, tl.program_id(1), place_ptr, number_stride, slots, step).to(tl.int64)
    length = tl.load(seq_len_ptr + line)
    last_key = length - queries + token
    whole, begin, end = _key_blocks(
        block, split, splits, queries, length, page_ptr is not None, HEADS_PER_KV, BLOCK_M, BLOCK_N
    )
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, SIZE_PADDED], tl.float32)
    for at in range(begin, tl.minimum(end, whole)):
        top, total, found = _step(
            query, top, total, found, at, last_key, start + token, member, length,
            key_ptr, value_ptr, table_ptr + line * width, page_ptr,
            columns_ptr, diagonals_ptr, true_ptr, bytes_each, true_bytes, pcl, reach, dense_below,
            k_page, k_row, v_page, v_row, scale, softcap,
            SIZE, SIZE_PADDED, PAGE, BLOCK_N, CAPPED, UPCAST, False,
        )  # fmt: skip
    pages = page_ptr + line * width if page_ptr is not None else None
    for at in range(tl.maximum(begin, whole), end):
        top, total, found = _step(
            query, top, total, found, at, last_key, start + token, member, length,
            key_ptr, value_ptr, table_ptr + line * width, pages,
            columns_ptr, diagonals_ptr, true_ptr, bytes_each, true_bytes, pcl, reach, dense_below,
            k_page, k_row, v_page, v_row, scale, softcap,
            SIZE, SIZE_PADDED, PAGE, BLOCK_N, CAPPED, UPCAST, True,
        )  # fmt: skip

    _store(
        found * value_scale, top, total, token < queries, place, member, split,
        output_ptr, part_ptr, sum_ptr, o_row, o_head, tokens, heads, SIZE, SIZE_PADDED,
    )  # fmt: skip


@triton.jit
def _key_blocks(
    block, split, splits, queries, length,
    MASKED: tl.constexpr, HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Up to which block of keys all of a block's rows see everything; a split's first and end.

    A sequence's own blocks are shared out evenly, so that sparse heads keep a GPU as busy as dense
    ones, and a graph that was captured for long requests serves short ones; parts of less than
    LEAST_BLOCKS would spend their time on starting and merging.
    """
    first_token = block * BLOCK_M // HEADS_PER_KV
    last_token = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // HEADS_PER_KV, queries - 1)
    whole = 0 if MASKED else (length - queries + first_token + 1) // BLOCK_N
    blocks = tl.cdiv(length - queries + last_token + 1, BLOCK_N)
    each = blocks
    if splits > 1:
        each = tl.maximum(tl.cdiv(blocks, splits), LEAST_BLOCKS)
    return whole, split * each, tl.minimum(split * each + each, blocks)


@triton.jit
def _store(
    found, top, total, present, place, member, split,
    output_ptr, part_ptr, sum_ptr, o_row, o_head, tokens, heads,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """Stores a block of rows: the output, or where keys are split what this split found.

    With an output goes its log-sum-exp, where it is wanted, with a split's part log2 of the sum.
    """
    total = tl.where(total > 0, total, 1.0)
    found = found / total[:, None]
    channel = tl.arange(0, SIZE_PADDED)
    held = present[:, None] & (channel < SIZE)[None, :]
    cell = (split * tokens + place) * heads + member
    sums = top + tl.log2(total)
    if part_ptr is None:
        ptrs = output_ptr + (place * o_row + member * o_head)[:, None] + channel[None, :]
        tl.store(ptrs, found.to(output_ptr.dtype.element_ty), mask=held)
        sums *= LN2
    else:
        tl.store(part_ptr + cell[:, None] * SIZE + channel[None, :], found, mask=held)
    if sum_ptr is not None:
        tl.store(sum_ptr + cell, sums, mask=present)


@triton.jit
def _step(
    query, top, total, found, at, last_key, position, member, length,
    key_ptr, value_ptr, table_ptr, page_ptr,
    columns_ptr, diagonals_ptr, true_ptr, bytes_each, true_bytes, pcl, reach, dense_below,
    k_page, k_row, v_page, v_row, scale, softcap,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds a block of keys to the running softmax."""
    key_at = at * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, SIZE_PADDED)
    stored = (key_at < length)[:, None] & (channel < SIZE)[None, :]
    if PAGE % BLOCK_N == 0:
        page = tl.load(table_ptr + at * BLOCK_N // PAGE).to(tl.int64)
    else:
        page = tl.load(table_ptr + key_at // PAGE, mask=key_at < length, other=0).to(tl.int64)
    inside = key_at % PAGE
    key_at_ptr = key_ptr + (page * k_page + inside * k_row)[:, None] + channel[None, :]
    value_at_ptr = value_ptr + (page * v_page + inside * v_row)[:, None] + channel[None, :]
    if MASKED or SIZE != SIZE_PADDED:
        key = tl.load(key_at_ptr, mask=stored, other=0.0)
        value = tl.load(value_at_ptr, mask=stored, other=0.0)
    else:
        key = tl.load(key_at_ptr)
        value = tl.load(value_at_ptr)
    scores = product(query, tl.trans(key.to(query.dtype)), UPCAST) * scale
    if CAPPED:
        scores = capped(scores, softcap)
    scores *= LOG2E
    if MASKED:
        seen = key_at[None, :] <= last_key[:, None]
        if page_ptr is not None:
            number = tl.load(page_ptr + key_at // PAGE, mask=key_at < length, other=0)
            seen &= token_visible(
                position[:, None], (number * PAGE + inside)[None, :], member[:, None],
                columns_ptr, diagonals_ptr, true_ptr, bytes_each, true_bytes, pcl, reach,
                dense_below,
            )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet has no maximum to subtract.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    total = total * fade + tl.sum(weights, 1)
    found = found * fade[:, None] + product(weights.to(query.dtype), value.to(query.dtype), UPCAST)
    return higher, total, found


@triton.jit
def capped(scores, softcap):
    """Soft-capping by tanh, which 1 - 2 / (e^2x + 1) gives without overflow."""
    return softcap * (1 - 2 / (tl.exp(scores * 2 / softcap) + 1))


@triton.jit
def product(left, right, UPCAST: tl.constexpr):
    """A product in float32; the interpreter gets bfloat16 wrong."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")
