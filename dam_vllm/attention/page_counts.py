"""Counts the pages that prompts read, where they are planned; nothing waits for a GPU."""

from dataclasses import dataclass

import torch

from dam_vllm.attention.query_blocks import QueryBlocks, cut_query_blocks


@dataclass
class Counts:
    """Pages times queries, summed over query blocks, layers and KV heads, of prefill alone.

    Both are added up where they arise, so that a GPU need not be waited for.

    Attributes:
        read: what was read.
        dense: what dense causal attention would have read.
    """

    read: torch.Tensor | int = 0
    dense: torch.Tensor | int = 0

    def add_prefill(
        self, pages: torch.Tensor, query_blocks: QueryBlocks, new: torch.Tensor, page: int
    ) -> None:
        """Counts a step's query blocks, but for those of decoding.

        Args:
            pages: int [..., query_blocks], pages read.
            query_blocks: the step's query blocks.
            new: int [requests], queries of each request; one is decoding.
            page: tokens a page.
        """
        queries = (query_blocks.stop - query_blocks.start) * (new[query_blocks.request] > 1)
        self.add(pages, queries, query_blocks.stop, page)

    def add_dense(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        query_block: int,
        page: int,
        heads: int,
    ) -> None:
        """Counts a step whose queries read everything.

        Args:
            query_start_loc: int32 [requests + 1], on the CPU.
            seq_lens: int32 [requests], on the CPU.
            query_block: tokens a query block.
            page: tokens a page.
            heads: KV heads of all layers.
        """
        query_blocks = cut_query_blocks(query_start_loc, seq_lens, query_block)
        causal = (query_blocks.stop - 1) // page + 1
        self.add_prefill(causal.expand(heads, -1), query_blocks, query_start_loc.diff(), page)

    def add(
        self, pages: torch.Tensor, queries: torch.Tensor, stop: torch.Tensor, page: int
    ) -> None:
        """Counts query blocks.

        Args:
            pages: int [..., query_blocks], pages read.
            queries: int [query_blocks].
            stop: int [query_blocks], position after each query block's last query.
            page: tokens a page.
        """
        causal = (stop - 1) // page + 1
        self.read = self.read + (pages * queries).sum()
        self.dense = self.dense + (causal * queries).sum() * (pages.numel() // len(queries))


COUNTS = Counts()
