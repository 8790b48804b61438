"""Counts the pages that prompts read, for evaluations (`--worker-extension-cls`)."""

from dataclasses import dataclass
from typing import Any

import torch

from dam_vllm.attention.plan import Tiles


@dataclass
class Counts:
    """Pages times queries, summed over tiles, layers and KV heads, of prefill alone.

    Both are added up where they arise, so that a GPU need not be waited for.

    Attributes:
        read: what was read.
        dense: what dense causal attention would have read.
    """

    read: torch.Tensor | int = 0
    dense: torch.Tensor | int = 0

    def add_prefill(self, pages: torch.Tensor, tiles: Tiles, new: torch.Tensor, page: int) -> None:
        """Counts a step's tiles, but for those of decoding.

        Args:
            pages: int [..., tiles], pages read.
            tiles: the step's tiles.
            new: int [requests], queries of each request; one is decoding.
            page: tokens a page.
        """
        queries = (tiles.stop - tiles.start) * (new[tiles.request] > 1)
        self.add(pages, queries, tiles.stop, page)

    def add(
        self, pages: torch.Tensor, queries: torch.Tensor, stop: torch.Tensor, page: int
    ) -> None:
        """Counts tiles.

        Args:
            pages: int [..., tiles], pages read.
            queries: int [tiles].
            stop: int [tiles], position after each tile's last query.
            page: tokens a page.
        """
        causal = (stop - 1) // page + 1
        self.read = self.read + (pages * queries).sum()
        self.dense = self.dense + (causal * queries).sum() * (pages.numel() // len(queries))


COUNTS = Counts()


class PageCounters:
    """Worker extension: `collective_rpc("dam_pages")`."""

    def dam_pages(self) -> dict[str, Any]:
        """Pages counted since the last call, {"read": int, "dense": int} of this worker."""
        found = {name: int(value) for name, value in vars(COUNTS).items()}
        COUNTS.read = COUNTS.dense = 0
        return found
