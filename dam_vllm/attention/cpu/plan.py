"""The plan: a batch's selections as virtual sequences over virtual pages.

A paged cache [blocks, kv_heads, page, ...] seen as [blocks * kv_heads, 1, page, ...] has one
*virtual page* for each (block, KV head), with id block * kv_heads + head. Each (KV head, query
block) becomes a *virtual sequence* whose block table lists only the pages that were selected, the
query block's own pages last, so that a stock causal paged kernel computes exact attention over
them. Virtual sequences run head by head: queries must lie as [kv_heads, tokens, heads_per_kv,
head_size].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.attention.cpu.kernel import UnreadSpans
from dam_vllm.attention.query_blocks import QueryBlocks
from dam_vllm.masks.mask_set import BoolArray
from dam_vllm.masks.page_tables import PageSelector
from dam_vllm.masks.tails import span_pages, unread_spans


@dataclass(frozen=True)
class Plan:
    """Virtual sequences of a batch; n = kv_heads * query blocks of them a layer.

    Attributes:
        block_table: int32 [layers, n, width], virtual page ids; after a sequence's end, 0.
        seq_lens: int32 [layers, n], virtual lengths in tokens.
        query_start_loc: int32 [n + 1], rows of the head-by-head queries.
        unread: by layer, what tails stand for; None without.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    unread: Sequence[UnreadSpans | None]


@dataclass(frozen=True)
class VirtualPages:
    """Where the virtual pages of a batch's requests lie: id = block * scale + offset.

    Attributes:
        blocks: int32 [groups, requests, n], block tables of vLLM's cache groups.
        group: int64 [layers, heads], the group of each head.
        offset: int64 [layers, heads].
        scale: virtual pages a block.
    """

    blocks: torch.Tensor
    group: torch.Tensor
    offset: torch.Tensor
    scale: int

    @classmethod
    def of_layers(cls, block_table: torch.Tensor, layers: int, kv_heads: int) -> "VirtualPages":
        """Pages of layers whose caches [blocks, kv_heads, page, ...] share one block table.

        Args:
            block_table: int32 [requests, n].
            layers: how many.
            kv_heads: KV heads of each.

        Returns:
            The pages, ids counted from the start of each layer's own cache.
        """
        offset = torch.arange(kv_heads).expand(layers, kv_heads)
        return cls(block_table[None], torch.zeros_like(offset), offset, kv_heads)

    def take(self, layer: int, heads: torch.Tensor) -> "VirtualPages":
        """The pages of some heads of one layer; heads as int64 [n]."""
        where = (slice(layer, layer + 1), heads)
        return VirtualPages(self.blocks, self.group[where], self.offset[where], self.scale)

    def tables(self) -> torch.Tensor:
        """Block tables of virtual pages, int32 [layers, heads, requests, n]."""
        ids = self.blocks[self.group] * self.scale + self.offset[..., None, None]
        return ids.int()


def build_plan(
    selector: PageSelector, query_blocks: QueryBlocks, where: VirtualPages, tails: BoolArray
) -> Plan:
    """Turns the selections of all layers and heads into virtual sequences.

    Args:
        selector: the worker's page tables.
        query_blocks: the batch's query blocks.
        where: virtual pages of the same layers and heads.
        tails: [layers, heads], which have tails.

    Returns:
        The plan.
    """
    pages = int((query_blocks.stop.max() - 1) // selector.page) + 1
    selected = selector.select(query_blocks.index, pages)
    return plan_pages(selected, where, query_blocks, selector.page, tails)


def plan_pages(
    selected: torch.Tensor,
    where: VirtualPages,
    query_blocks: QueryBlocks,
    page: int,
    tails: BoolArray,
) -> Plan:
    """Turns selected pages into virtual sequences.

    Args:
        selected: bool [layers, heads, query_blocks, pages], own pages included.
        where: virtual pages of the same layers and heads.
        query_blocks: the batch's query blocks.
        page: tokens a page.
        tails: [layers, heads], which have tails.

    Returns:
        The plan; its queries hold these heads alone, in that order.
    """
    layers, count, _, pages = selected.shape
    last = query_blocks.stop.numpy() - 1
    last_page = last // page
    causal = selected.numpy() & (np.arange(pages) <= last_page[:, None])
    counts = causal.sum(-1)
    lens = (counts - 1) * page + (last - last_page * page + 1)
    rows = np.arange(count)[:, None] * query_blocks.tokens + query_blocks.row.numpy()
    starts = np.full(rows.size + 1, count * query_blocks.tokens, dtype=np.int32)
    starts[:-1] = rows.ravel()
    shape = (layers, count * len(last))
    table = _compact(
        causal.reshape(*shape, pages), counts.reshape(shape), where, query_blocks.request
    )
    return Plan(
        block_table=torch.from_numpy(table),
        seq_lens=torch.from_numpy(lens.reshape(shape).astype(np.int32)),
        query_start_loc=torch.from_numpy(starts),
        unread=_unread(causal, where, query_blocks, page, tails),
    )


def _unread(
    read: BoolArray, where: VirtualPages, query_blocks: QueryBlocks, page: int, tails: BoolArray
) -> list[UnreadSpans | None]:
    """What tails stand for, by layer; see `plan_pages`."""
    result: list[UnreadSpans | None] = [None] * len(read)
    if not tails.any() or read.shape[-1] < span_pages(page):
        return result
    unread = unread_spans(read[tails], query_blocks.start.numpy() // page, page)
    heads, blocks, spans = unread.shape
    last_pages = np.zeros((1, heads * blocks, read.shape[-1]), dtype=bool)
    each = span_pages(page)
    last_pages[0, :, each - 1 : spans * each : each] = unread.reshape(-1, spans)
    counts = last_pages.sum(-1)
    theirs = VirtualPages(
        where.blocks, where.group[tails][None], where.offset[tails][None], where.scale
    )
    table = _compact(last_pages, counts, theirs, query_blocks.request)
    layer, head = tails.nonzero()
    sequences = head[:, None] * blocks + np.arange(blocks)
    for row in np.unique(layer):
        which = np.flatnonzero(np.repeat(layer == row, blocks) & (counts[0] > 0))
        if len(which):
            parts = sequences.ravel()[which], table[0, which], counts[0, which]
            result[row] = UnreadSpans(*map(torch.from_numpy, parts))
    return result


def _compact(
    selected: np.ndarray, counts: np.ndarray, where: VirtualPages, request: torch.Tensor
) -> np.ndarray:
    """Moves the ids of selected pages to the front of each row.

    Args:
        selected: bool [layers, n, pages], n = heads * query blocks.
        counts: int64 [layers, n], selected pages of each row.
        where: virtual pages.
        request: int64 [query_blocks].

    Returns:
        int32 [layers, n, counts.max()].
    """
    row, page = np.divmod(np.flatnonzero(selected), selected.shape[2])
    each = counts.ravel()
    table = np.zeros((each.size, each.max()), dtype=np.int32)
    position = np.arange(len(page)) - np.repeat(each.cumsum() - each, each)
    blocks, asking = where.blocks.numpy(), request.numpy()
    start = (where.group.numpy()[..., None] * blocks.shape[1] + asking) * blocks.shape[2]
    offset = where.offset.numpy()[..., None] + np.zeros_like(asking)
    block = blocks.ravel()[start.ravel()[row] + page]
    table[row, position] = block * where.scale + offset.ravel()[row]
    return table.reshape(*counts.shape, -1)
