"""Counts on the device what a step reads: plans add to it, one launch a step sorts it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dam_vllm.attention.page_counts import DENSITIES, PHASES, PageCounts

BLOCK = 1024


class DeviceCounts(PageCounts):
    """`PageCounts` whose plans are made on a GPU, which is not waited for.

    Attributes:
        bounds: float64 [densities], on the device.
    """

    def __init__(
        self, layers: Sequence[int], heads: int, first_head: int, device: torch.device
    ) -> None:
        super().__init__(layers, heads, first_head, device)
        self.bounds = torch.tensor(DENSITIES, dtype=torch.float64, device=device)

    def close_step(self) -> None:
        """See `PageCounts`; waits for nothing."""
        _close_step[(len(PHASES),)](
            self.pages,
            self._closed,
            self.bounds,
            self.steps,
            self.densities,
            cells=self.pages[0, 0].numel(),
            BOUNDS=len(DENSITIES),
            BLOCK=BLOCK,
        )

    def tally(self, heads: Sequence[tuple[int, int]]) -> "Tally":
        """Where to count a plan's heads, told as (global layer index, local KV head)."""
        count = self.pages.shape[3]
        cells = [self.row(layer) * count + head for layer, head in heads]
        return Tally(self.pages, torch.tensor(cells, dtype=torch.int32, device=self.pages.device))


@dataclass(frozen=True)
class Tally:
    """Where a plan's heads are counted.

    Attributes:
        pages: `PageCounts.pages`.
        cells: int32 [n], of each head its place in the last two dimensions.
    """

    pages: torch.Tensor
    cells: torch.Tensor

    def arguments(self, decodes: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What a kernel takes to count in a phase: counts, places, distance to dense heads'."""
        return self.pages[int(decodes)], self.cells, self.pages.stride(1)


@triton.jit
def _close_step(
    page_ptr, closed_ptr, bound_ptr, step_ptr, density_ptr, cells,
    BOUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One phase."""
    phase = tl.program_id(0)
    read = tl.zeros((BLOCK,), tl.int64)
    dense = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, cells, BLOCK):
        cell = first + tl.arange(0, BLOCK)
        at = page_ptr + phase * 2 * cells + cell
        read += tl.load(at, mask=cell < cells, other=0)
        dense += tl.load(at + cells, mask=cell < cells, other=0)
    all_read = tl.sum(read, 0)
    all_dense = tl.sum(dense, 0)
    closed = closed_ptr + phase * 2
    new_read = all_read - tl.load(closed)
    new_dense = all_dense - tl.load(closed + 1)
    tl.store(closed, all_read)
    tl.store(closed + 1, all_dense)
    if new_dense > 0:
        density = new_read.to(tl.float64) / new_dense.to(tl.float64)
        bucket = 0
        for number in range(BOUNDS - 1):
            bucket += (density > tl.load(bound_ptr + number)).to(tl.int32)
        step = step_ptr + phase * BOUNDS + bucket
        tl.store(step, tl.load(step) + 1)
        tl.store(density_ptr + phase, tl.load(density_ptr + phase) + density)
