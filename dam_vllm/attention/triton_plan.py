"""Selected pages as compact block tables, made on the device: `attention.plan` without the host."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dam_vllm.attention.select import PageSelector
from dam_vllm.attention.triton_geometry import DeviceTiles, page_arguments, static_pages, tile_at

BLOCK = 1024


@dataclass(frozen=True)
class DevicePlan:
    """Virtual sequences of a part of a batch: one for each slot and KV head.

    Attributes:
        table: int32 [slots, kv_heads, width], virtual pages; what lies after a sequence's end is
            not set.
        pages: int32 [slots, kv_heads, width], the same pages by their number in the request, or
            None where nobody asks.
        seq_lens: int32 [slots, kv_heads], virtual lengths in tokens, 0 for empty slots; strided.
        starts: int32 [slots + 1], first query row of each slot.
    """

    table: torch.Tensor
    pages: torch.Tensor | None
    seq_lens: torch.Tensor
    starts: torch.Tensor

    @classmethod
    def empty(
        cls, tiles: DeviceTiles, kv_heads: int, width: int, numbered: bool = False
    ) -> "DevicePlan":
        """Room for a plan.

        Args:
            tiles: the part's queries.
            kv_heads: KV heads of the layer.
            width: most pages of a request.
            numbered: whether `pages` is wanted.
        """
        slots, new = len(tiles), tiles.request.new_empty
        table = new(slots, kv_heads, width)
        return cls(
            table=table,
            pages=torch.empty_like(table) if numbered else None,
            # Each head's lengths lie together, as FlashAttention wants them in prefill.
            seq_lens=new(kv_heads, slots).t(),
            starts=new(slots + 1),
        )


def plan_heads(
    plan: DevicePlan,
    heads: torch.Tensor,
    selector: PageSelector,
    tiles: DeviceTiles,
    block_table: torch.Tensor,
    chosen: torch.Tensor | None = None,
) -> None:
    """Fills in some heads of a plan, and its starts.

    Args:
        plan: written.
        heads: int32 [n], KV heads.
        selector: their page tables, of one layer.
        tiles: the part's queries, cut by the selector's tile.
        block_table: int32 [requests, at least the plan's width], vLLM's.
        chosen: bool [n, slots, width], pages beyond the selector's, or None.
    """
    slots, kv_heads, width = plan.table.shape
    _plan_kernel[(slots, len(heads))](
        plan.table,
        plan.pages,
        plan.seq_lens,
        plan.starts,
        heads,
        block_table,
        None if chosen is None else chosen.view(torch.uint8),
        *tiles.arguments,
        **page_arguments(selector),
        block_stride=block_table.stride(0),
        len_slot=plan.seq_lens.stride(0),
        len_head=plan.seq_lens.stride(1),
        slots=slots,
        kv_heads=kv_heads,
        width=width,
        TILE=tiles.tile,
        PAGE=selector.page,
        OWN=selector.own,
        BLOCK=min(BLOCK, triton.next_power_of_2(width)),
    )


# What changes from step to step must not make a kernel be compiled anew.
@triton.jit(do_not_specialize=["len_slot", "len_head", "slots", "width"])
def _plan_kernel(
    table_ptr, page_ptr, seq_len_ptr, start_ptr, head_ptr, block_ptr, chosen_ptr,
    request_ptr, offset_ptr, query_start_ptr, request_len_ptr,
    near_ptr, columns_ptr, distances_ptr,
    near_tiles, near_pages, columns, distances, dense_tiles,
    block_stride, len_slot, len_head, slots, kv_heads, width,
    TILE: tl.constexpr, PAGE: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot and one head: walks the pages up to the tile's last, keeps those that are read."""
    slot, at = tl.program_id(0), tl.program_id(1)
    head = tl.load(head_ptr + at)
    request, index, row, start, stop = tile_at(
        slot, request_ptr, offset_ptr, query_start_ptr, request_len_ptr, TILE
    )
    last_page = tl.where(start < stop, (stop - 1) // PAGE, -1)
    line = (slot * kv_heads + head).to(tl.int64) * width
    count = 0
    for first in range(0, last_page + 1, BLOCK):
        page = first + tl.arange(0, BLOCK)
        read = static_pages(
            page, at, index, last_page, near_ptr, columns_ptr, distances_ptr,
            near_tiles, near_pages, columns, distances, dense_tiles, OWN,
        )  # fmt: skip
        if chosen_ptr is not None:
            bits = chosen_ptr + (at * slots + slot).to(tl.int64) * width + page
            read |= tl.load(bits, mask=page <= last_page, other=0) > 0
        place = line + count + tl.cumsum(read.to(tl.int32), 0) - 1
        block = tl.load(block_ptr + request.to(tl.int64) * block_stride + page, mask=read, other=0)
        tl.store(table_ptr + place, block * kv_heads + head, mask=read)
        if page_ptr is not None:
            tl.store(page_ptr + place, page, mask=read)
        count += tl.sum(read.to(tl.int32), 0)
    length = tl.where(count > 0, (count - 1) * PAGE + stop - last_page * PAGE, 0)
    tl.store(seq_len_ptr + slot * len_slot + head * len_head, length)
    if at == 0:
        tl.store(start_ptr + slot, row)
        if slot == slots - 1:
            tl.store(start_ptr + slots, row + tl.maximum(stop - start, 0))
