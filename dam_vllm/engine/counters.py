"""Counts the pages that prompts read, for evaluations (`--worker-extension-cls`)."""

from dataclasses import dataclass
from typing import Any

import torch

from dam_vllm.attention.plan import Tiles


@dataclass
class Counts:
    """Pages times queries, summed over tiles, layers and KV heads, of prefill alone.

    Attributes:
        read: what was read.
        dense: what dense causal attention would have read.
    """

    read: int = 0
    dense: int = 0

    def add(self, pages: torch.Tensor, tiles: Tiles, new: torch.Tensor, page: int) -> None:
        """Counts a step.

        Args:
            pages: int [..., tiles], pages read.
            tiles: the step's tiles.
            new: int [requests], queries of each request; one is decoding, which is not counted.
            page: tokens a page.
        """
        queries = (tiles.stop - tiles.start) * (new[tiles.request] > 1)
        causal = (tiles.stop - 1) // page + 1
        self.read += int((pages * queries).sum())
        self.dense += int((causal * queries).sum()) * (pages.numel() // len(queries))


COUNTS = Counts()


class PageCounters:
    """Worker extension: `collective_rpc("dam_pages")`."""

    def dam_pages(self) -> dict[str, Any]:
        """Pages counted since the last call, {"read": int, "dense": int} of this worker."""
        found = vars(COUNTS).copy()
        COUNTS.read = COUNTS.dense = 0
        return found
