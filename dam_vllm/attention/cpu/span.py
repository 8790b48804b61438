"""Query blocks of a request that are scored together in prefill."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """Neighbouring query blocks, each a page; a row is a query of a query head.

    Attributes:
        index: int64 [query_blocks], their own pages.
        present: bool [query_blocks, rows], which rows this step holds.
        static: bool [query_blocks, pages], pages that are read anyway; up to the last own page.
    """

    index: torch.Tensor
    present: torch.Tensor
    static: torch.Tensor
