"""Tails: means of spans that a query block does not read, added to what it read.

A span counts as one key, as often as it has tokens (`dam_vllm.masks.tails`). The kernel goes on
with the softmax where attention left it, from an output and the log-sum-exp of its scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.bundle import Part
from dam_vllm.attention.cuda.choices import Choices
from dam_vllm.attention.cuda.merge import LOG2E
from dam_vllm.attention.cuda.paged import INTERPRETED, Softmax, capped, product
from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.plan import MOVING, page_arguments, static_pages
from dam_vllm.attention.cuda.query_blocks import query_block_at
from dam_vllm.attention.cuda.tuning import NARROW_HEAD
from dam_vllm.attention.span_means import SpanMeans
from dam_vllm.masks.page_tables import PageSelector
from dam_vllm.masks.tails import span_pages

# Rows and warps a program, of narrow heads and of wide ones, and means a step: means are few, and
# to look up what is read takes registers.
NARROW, WIDE, SPANS = (64, 4), (32, 8), 32


@dataclass(frozen=True)
class TailHeads:
    """KV heads of a layer that have tails.

    Attributes:
        ids: local KV heads.
        softmax: how their means weigh; its scales hold all factors of quantised queries, keys and
            values.
    """

    ids: Sequence[int]
    softmax: Softmax


class Read(NamedTuple):
    """What attention gave for a part's queries, head by head or seen so.

    Attributes:
        query: [heads, tokens, heads_per_kv, head_size], rotated as the heads' keys are.
        output: likewise.
        lse: float32 [heads, tokens, heads_per_kv], natural log-sum-exp of the scores.
    """

    query: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class Tail:
    """Heads with tails among some heads of a layer whose pages are selected alike.

    Attributes:
        heads: int32 [n], KV heads.
        numbers: int32 [n], which ones they are among all these heads.
        rows: int32 [n], their rows in the selector and the homes.
        selector: page tables of all these heads, or more.
        homes: where these lie.
        softmax: of the heads with tails.
        means: the worker's.
        chosen: where pages beyond the selector's are kept, and int32 [rows], each one's row there;
            None where there are none.
    """

    heads: torch.Tensor
    numbers: torch.Tensor
    rows: torch.Tensor
    selector: PageSelector
    homes: Homes
    softmax: Softmax
    means: SpanMeans
    chosen: tuple[Choices, torch.Tensor] | None = None

    @classmethod
    def of(
        cls,
        tails: TailHeads,
        ids: Sequence[int],
        first: int,
        selector: PageSelector,
        homes: Homes,
        means: SpanMeans,
        chosen: tuple[Choices, torch.Tensor] | None = None,
    ) -> Self | None:
        """Those of some heads that have tails, or None.

        Args:
            tails: of the layer.
            ids: the heads, in the order of their rows.
            first: row of the first one.
            selector: as above, like what follows.
            homes: likewise.
            means: likewise.
            chosen: likewise.
        """
        found = [(head, number) for number, head in enumerate(ids) if head in tails.ids]
        if not found:
            return None
        heads, numbers = torch.tensor(found, dtype=torch.int32).t().contiguous()
        device = homes.offsets.device
        return cls(
            heads.to(device), numbers.to(device), (numbers + first).to(device), selector, homes,
            tails.softmax, means, chosen,
        )  # fmt: skip

    def add(self, read: Read, key: torch.Tensor, part: Part, gathered: bool) -> None:
        """Adds the tails to outputs, where they lie: one launch.

        Args:
            read: of all KV heads of the layer, or of these heads alone, in their order.
            key: [virtual pages, page, head_size], the cache's.
            part: where the queries lie.
            gathered: whether it is of these heads alone.
        """
        means = self.means.of(key, read.output.dtype)
        query_blocks = part.query_blocks[self.selector.query_block]
        heads_per_kv, size = read.query.shape[2:]
        each = span_pages(self.selector.page)
        # As for attention: only two sizes, however few queries a step has.
        most = heads_per_kv * (1 if query_blocks.most_queries == 1 else query_blocks.query_block)
        rows, warps = NARROW if size <= NARROW_HEAD else WIDE
        block_m = max(16, min(rows, triton.next_power_of_2(most)))
        row_blocks = triton.cdiv(query_blocks.most_queries * heads_per_kv, block_m)
        bits = row_of = None
        if self.chosen is not None:
            choices, row_of = self.chosen
            bits = choices.part(part.before, len(query_blocks), part.width)
        _add_tail[(len(query_blocks) * row_blocks, len(self.heads))](
            *read, means, self.numbers if gathered else self.heads, self.rows,
            self.homes.offsets, self.homes.groups, part.block_table, bits, row_of,
            *query_blocks.arguments, **page_arguments(self.selector),
            q_head=read.query.stride(0), q_token=read.query.stride(1),
            q_member=read.query.stride(2), o_head=read.output.stride(0),
            o_token=read.output.stride(1), o_member=read.output.stride(2),
            l_head=read.lse.stride(0), l_token=read.lse.stride(1), l_member=read.lse.stride(2),
            group_stride=part.block_table.stride(0), block_stride=part.block_table.stride(-2),
            chosen_stride=0 if bits is None else bits.stride(0),
            kv_heads=self.homes.scale, width=part.width, row_blocks=row_blocks,
            scale=self.softmax.scale, softcap=self.softmax.softcap,
            value_scale=self.softmax.value_scale, count=math.log2(each * self.selector.page),
            HEADS_PER_KV=heads_per_kv, SIZE=size, SIZE_PADDED=triton.next_power_of_2(size),
            QUERY_BLOCK=query_blocks.query_block, PAGE=self.selector.page, OWN=self.selector.own,
            EACH=each, BLOCK_M=block_m, BLOCK_N=SPANS, CAPPED=self.softmax.softcap > 0,
            UPCAST=INTERPRETED, num_warps=warps, num_stages=2,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "l_head", "l_token", "l_member", "group_stride", "block_stride", "chosen_stride", "width",
        "row_blocks",
    ],
    do_not_specialize_on_alignment=MOVING,
)  # fmt: skip
def _add_tail(
    query_ptr, output_ptr, lse_ptr, mean_ptr, head_ptr, place_ptr, home_ptr, group_ptr, block_ptr,
    chosen_ptr, row_ptr, request_ptr, offset_ptr, query_start_ptr, request_len_ptr,
    near_ptr, columns_ptr, distances_ptr,
    near_blocks, near_pages, columns, distances, dense_blocks,
    q_head, q_token, q_member, o_head, o_token, o_member, l_head, l_token, l_member,
    group_stride, block_stride, chosen_stride, kv_heads, width, row_blocks,
    scale, softcap, value_scale, count,
    HEADS_PER_KV: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, PAGE: tl.constexpr, OWN: tl.constexpr, EACH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of rows of a query block, one KV head."""
    slot, block = tl.program_id(0) // row_blocks, tl.program_id(0) % row_blocks
    request, index, row, start, stop = query_block_at(
        slot, request_ptr, offset_ptr, query_start_ptr, request_len_ptr, QUERY_BLOCK
    )
    spans = index * OWN // EACH  # that end before the query block
    if block * BLOCK_M >= (stop - start) * HEADS_PER_KV or spans == 0:
        return
    at = tl.load(place_ptr + tl.program_id(1))
    head = tl.load(head_ptr + tl.program_id(1)).to(tl.int64)
    home = tl.load(home_ptr + at)
    block_ptr += request.to(tl.int64) * block_stride
    if group_ptr is not None:
        block_ptr += tl.load(group_ptr + at).to(tl.int64) * group_stride
    if chosen_ptr is not None:
        chosen_ptr += tl.load(row_ptr + at).to(tl.int64) * chosen_stride + slot.to(tl.int64) * width
    packed = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token, member = packed // HEADS_PER_KV, packed % HEADS_PER_KV
    channel = tl.arange(0, SIZE_PADDED)
    present, inside = token < stop - start, channel < SIZE
    held = present[:, None] & inside[None, :]
    place = (row + token).to(tl.int64)
    asked = query_ptr + head * q_head + place * q_token + member * q_member
    query = tl.load(asked[:, None] + channel[None, :], mask=held, other=0.0)
    outputs = output_ptr + head * o_head + place * o_token + member * o_member
    outputs = outputs[:, None] + channel[None, :]
    found = tl.load(outputs, mask=held, other=0.0).to(tl.float32)
    lse = lse_ptr + head * l_head + place * l_token + member * l_member
    top = tl.load(lse, mask=present, other=0.0) * LOG2E
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    added = 0
    for first in range(0, spans, BLOCK_N):
        span = first + tl.arange(0, BLOCK_N)
        unread = span < spans
        for number in tl.static_range(EACH):
            page = span * EACH + number
            read = static_pages(
                page, at, index, (stop - 1) // PAGE, near_ptr, columns_ptr, distances_ptr,
                near_blocks, near_pages, columns, distances, dense_blocks, OWN,
            )  # fmt: skip
            if chosen_ptr is not None:
                read |= tl.load(chosen_ptr + page, mask=span < spans, other=0) > 0
            unread &= ~read
        last = tl.load(block_ptr + span * EACH + EACH - 1, mask=unread, other=0).to(tl.int64)
        mean = mean_ptr + ((last * kv_heads + home) * 2 * SIZE)[:, None] + channel[None, :]
        kept = unread[:, None] & inside[None, :]
        key = tl.load(mean, mask=kept, other=0.0)
        value = tl.load(mean + SIZE, mask=kept, other=0.0)
        scores = product(query.to(key.dtype), tl.trans(key), UPCAST) * scale
        if CAPPED:
            scores = capped(scores, softcap)
        scores = tl.where(unread[None, :], scores * LOG2E + count, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, fade = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total = total * fade + tl.sum(weights, 1)
        found *= fade[:, None]
        found += product(weights.to(value.dtype), value, UPCAST) * value_scale
        top = higher
        added += tl.sum(unread.to(tl.int32), 0)
    # Where nothing was added, outputs keep their bits.
    if added > 0:
        tl.store(outputs, (found / total[:, None]).to(output_ptr.dtype.element_ty), mask=held)
