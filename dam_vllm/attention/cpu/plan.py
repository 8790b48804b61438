"""The plan: a batch's selections as virtual sequences over virtual pages.

A paged cache [blocks, kv_heads, page, ...] seen as [blocks * kv_heads, 1, page, ...] has one
*virtual page* for each (block, KV head), with id block * kv_heads + head. Each (KV head, query
block) becomes a *virtual sequence* whose block table lists only the pages that were selected, the
query block's own pages last, so that a stock causal paged kernel computes exact attention over
them. Virtual sequences run head by head: queries must lie as [kv_heads, tokens, heads_per_kv,
head_size].
"""

from dataclasses import dataclass

import torch

from dam_vllm.attention.query_blocks import QueryBlocks
from dam_vllm.masks.page_tables import PageSelector


@dataclass(frozen=True)
class Plan:
    """Virtual sequences of a batch; n = kv_heads * query blocks of them a layer.

    Attributes:
        block_table: int32 [layers, n, width], virtual page ids; after a sequence's end, 0.
        seq_lens: int32 [layers, n], virtual lengths in tokens.
        query_start_loc: int32 [n + 1], rows of the head-by-head queries.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor


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


def build_plan(selector: PageSelector, query_blocks: QueryBlocks, where: VirtualPages) -> Plan:
    """Turns the selections of all layers and heads into virtual sequences.

    Args:
        selector: the worker's page tables.
        query_blocks: the batch's query blocks.
        where: virtual pages of the same layers and heads.

    Returns:
        The plan.
    """
    pages = int((query_blocks.stop.max() - 1) // selector.page) + 1
    return plan_pages(
        selector.select(query_blocks.index, pages), where, query_blocks, selector.page
    )


def plan_pages(
    selected: torch.Tensor, where: VirtualPages, query_blocks: QueryBlocks, page: int
) -> Plan:
    """Turns selected pages into virtual sequences.

    Args:
        selected: bool [layers, heads, query_blocks, pages], own pages included.
        where: virtual pages of the same layers and heads.
        query_blocks: the batch's query blocks.
        page: tokens a page.

    Returns:
        The plan; its queries hold these heads alone, in that order.
    """
    layers, count, _, pages = selected.shape
    last = query_blocks.stop - 1
    last_page = last // page
    selected = selected & (torch.arange(pages) <= last_page[:, None])
    shape = (layers, count * len(last))
    counts = selected.sum(-1, dtype=torch.int32).view(shape)
    table = _compact(selected.view(*shape, pages), counts, where, query_blocks.request)
    tail = (last - last_page * page + 1).repeat(count)
    rows = torch.arange(count)[:, None] * query_blocks.tokens + query_blocks.row
    return Plan(
        block_table=table,
        seq_lens=((counts - 1) * page + tail).int(),
        query_start_loc=torch.cat(
            [rows.flatten(), torch.tensor([count * query_blocks.tokens])]
        ).int(),
    )


def _compact(
    selected: torch.Tensor, counts: torch.Tensor, where: VirtualPages, request: torch.Tensor
) -> torch.Tensor:
    """Moves the ids of selected pages to the front of each row.

    Args:
        selected: bool [layers, n, pages], n = heads * query blocks.
        counts: int32 [layers, n], selected pages of each row.
        where: virtual pages.
        request: int64 [query_blocks].

    Returns:
        int32 [layers, n, counts.max()].
    """
    layer, row, page = selected.nonzero(as_tuple=True)
    width = int(counts.max())
    table = torch.zeros((*counts.shape, width), dtype=torch.int32)
    flat = counts.flatten()
    position = torch.arange(len(page)) - torch.repeat_interleave(flat.cumsum(0) - flat, flat)
    _, requests, blocks = where.blocks.shape
    start = ((where.group[..., None] * requests + request) * blocks).view(counts.shape)
    offset = where.offset[..., None].expand(*where.offset.shape, len(request)).flatten(1)
    block = where.blocks.flatten()[start[layer, row] + page]
    table[layer, row, position] = (block * where.scale + offset[layer, row]).int()
    return table
