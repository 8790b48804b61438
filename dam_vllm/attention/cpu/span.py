"""Query blocks that are scored together."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """Query blocks, each within a page; a row is a query of a query head.

    Attributes:
        index: int64 [query_blocks], their own pages, contiguous.
        present: bool [query_blocks, rows], which rows this step holds.
        static: bool [query_blocks, pages], pages that are read anyway.
    """

    index: torch.Tensor
    present: torch.Tensor
    static: torch.Tensor
