"""Means of spans, written in the step that holds a span's last token."""

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.plan import MOVING
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_at
from dam_vllm.masks.tails import span_pages

# Tokens that a program adds up at a time.
TOKENS = 32


def write_means(
    means: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    homes: Homes,
    query_blocks: DeviceQueryBlocks,
    block_table: torch.Tensor,
) -> None:
    """Writes the means of spans whose last token is among a part's queries: one launch.

    Args:
        means: [virtual pages, 2, head_size], written at the spans' last pages.
        key: [virtual pages, page, head_size], the last dimension contiguous.
        value: [virtual pages, page, head_size], likewise.
        homes: of the heads with tails.
        query_blocks: the part's queries; a span is one or several query blocks.
        block_table: int32 [requests, n], or [groups, requests, n] where the heads lie in groups.
    """
    page, size = key.shape[1:]
    span = span_pages(page) * page
    assert span % query_blocks.query_block == 0
    _write_means[(len(query_blocks), len(homes.offsets))](
        key, value, means, homes.offsets, homes.groups, block_table, *query_blocks.arguments,
        *key.stride()[:2], *value.stride()[:2], block_table.stride(0), block_table.stride(-2),
        homes.scale, QUERY_BLOCK=query_blocks.query_block, PAGE=page, SPAN=span, TOKENS=TOKENS,
        SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["group_stride", "block_stride"], do_not_specialize_on_alignment=MOVING
)
def _write_means(
    key_ptr, value_ptr, mean_ptr, head_ptr, group_ptr, block_ptr,
    request_ptr, offset_ptr, query_start_ptr, request_len_ptr,
    k_page, k_row, v_page, v_row, group_stride, block_stride, kv_heads,
    QUERY_BLOCK: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr, TOKENS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """One slot and one head: adds a span up if the slot's last query ends it."""
    at = tl.program_id(1)
    request, _, _, start, stop = query_block_at(
        tl.program_id(0), request_ptr, offset_ptr, query_start_ptr, request_len_ptr, QUERY_BLOCK
    )
    if start >= stop or stop % SPAN > 0:
        return
    head = tl.load(head_ptr + at)
    block_ptr += request.to(tl.int64) * block_stride
    if group_ptr is not None:
        block_ptr += tl.load(group_ptr + at).to(tl.int64) * group_stride
    channel = tl.arange(0, SIZE_PADDED)
    keys = tl.zeros([SIZE_PADDED], tl.float32)
    values = tl.zeros([SIZE_PADDED], tl.float32)
    for first in range(0, SPAN, TOKENS):
        token = first + tl.arange(0, TOKENS)
        held = (token < SPAN)[:, None] & (channel < SIZE)[None, :]
        position = stop - SPAN + token
        block = tl.load(block_ptr + position // PAGE, mask=token < SPAN, other=0)
        page, row = block.to(tl.int64) * kv_heads + head, position % PAGE
        key_at = key_ptr + (page * k_page + row * k_row)[:, None] + channel[None, :]
        value_at = value_ptr + (page * v_page + row * v_row)[:, None] + channel[None, :]
        keys += tl.sum(tl.load(key_at, mask=held, other=0.0).to(tl.float32), 0)
        values += tl.sum(tl.load(value_at, mask=held, other=0.0).to(tl.float32), 0)
    last = tl.load(block_ptr + (stop - 1) // PAGE).to(tl.int64) * kv_heads + head
    target = mean_ptr + last * 2 * SIZE + channel
    tl.store(target, (keys / SPAN).to(mean_ptr.dtype.element_ty), mask=channel < SIZE)
    tl.store(target + SIZE, (values / SPAN).to(mean_ptr.dtype.element_ty), mask=channel < SIZE)
