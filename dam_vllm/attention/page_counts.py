"""Counts the pages that heads read, where they are planned; nothing waits for a GPU."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from dam_vllm.attention.query_blocks import QueryBlocks
from dam_vllm.masks.rounding import ceil_div

PHASES = ("prefill", "decode")
# Upper bounds of what a step's density is sorted into.
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class QueryWeights:
    """How much a step's query blocks count, on the CPU.

    Attributes:
        queries: float64 [query_blocks, phases], a block's queries; sums of products are exact, and
            fast.
        causal: float64 [query_blocks], pages up to its end.
    """

    queries: np.ndarray
    causal: np.ndarray

    @classmethod
    def of(cls, query_blocks: QueryBlocks, new: torch.Tensor, page: int) -> Self:
        """Weights of query blocks.

        Args:
            query_blocks: the step's.
            new: int [requests], queries of each request.
            page: tokens a page.
        """
        start, stop = query_blocks.start.numpy(), query_blocks.stop.numpy()
        decodes = new.numpy()[query_blocks.request.numpy()] == 1
        queries = (stop - start).astype(np.float64)
        by_phase = np.stack([queries * ~decodes, queries * decodes], axis=1)
        return cls(by_phase, ceil_div(stop, page).astype(np.float64))


class PageCounts:
    """What the masked layers of one worker read since it began.

    A query counts every page that its query block reads, and for a dense head every page up to the
    query block's end. Requests with one query in a step decode, the others prefill.

    Attributes:
        layers: global indices of the layers, ascending.
        first_head: global id of the rank's first KV head.
        pages: int64 [phases, 2, layers, kv_heads] on the device, of steps that are planned: pages
            read, and pages that dense heads would have read.
        whole: int64 [phases, layers] on the host, of steps that read everything: pages a KV head.
        steps: int64 [phases, densities] on the device, steps that were planned by their density.
        densities: float64 [phases] on the device, sum of these densities.
        whole_steps: int64 [phases] on the host, steps that read everything.
        plan_seconds: time that the host spent on planning.
        rehearsed: whether what was counted is to be forgotten, since it was no request's: steps
            before a CUDA graph was captured.
    """

    def __init__(
        self, layers: Sequence[int], heads: int, first_head: int, device: torch.device
    ) -> None:
        """Counts from 0 on.

        Args:
            layers: global indices, ascending.
            heads: KV heads of the rank.
            first_head: global id of the first of them.
            device: where pages are planned.
        """
        self.layers, self.first_head = tuple(layers), first_head
        phases = len(PHASES)
        self.densities = torch.zeros(phases, dtype=torch.float64, device=device)
        zeros = self.densities.long().new_zeros
        self.pages = zeros(phases, 2, len(layers), heads)
        self.steps = zeros(phases, len(DENSITIES))
        self._closed = zeros(phases, 2)
        self.whole = np.zeros((phases, len(layers)), np.int64)
        self.whole_steps = np.zeros(phases, np.int64)
        self.plan_seconds, self.rehearsed = 0.0, False

    def row(self, layer: int) -> int:
        """Where a layer, told by its global index, is counted."""
        return self.layers.index(layer)

    def clear(self) -> None:
        """Counts from 0 on."""
        for each in (self.pages, self.steps, self.densities, self._closed):
            each.zero_()
        self.whole[:], self.whole_steps[:], self.plan_seconds = 0, 0, 0.0
        self.rehearsed = False

    def begin_step(self) -> None:
        """Ends the step before, whose layers have run."""
        if self.rehearsed:
            self.clear()
        self.close_step()

    @contextmanager
    def planning(self) -> Iterator[None]:
        """Adds the time that passes in it to `plan_seconds`."""
        began = time.perf_counter()
        yield
        self.plan_seconds += time.perf_counter() - began

    def add(
        self, where: tuple[torch.Tensor, torch.Tensor], pages: torch.Tensor, weights: QueryWeights
    ) -> None:
        """Counts query blocks of some heads, on the CPU.

        Args:
            where: int64 [n] each, rows of layers and local KV heads, each pair once.
            pages: int [n, query_blocks], pages read.
            weights: of the query blocks.
        """
        counted, (rows, heads) = self.pages.numpy(), (each.numpy() for each in where)
        read = pages.numpy().astype(np.float64) @ weights.queries
        dense = weights.causal @ weights.queries
        counted[:, 0, rows, heads] += read.astype(np.int64).T
        counted[:, 1, rows, heads] += dense.astype(np.int64)[:, None]

    def add_whole(
        self,
        layers: Sequence[int],
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        query_block: int,
        page: int,
    ) -> None:
        """Counts a step all of whose queries read everything.

        Args:
            layers: global indices.
            query_start_loc: int32 [requests + 1], on the CPU.
            seq_lens: int32 [requests], on the CPU.
            query_block: tokens a query block.
            page: tokens a page.
        """
        if self.rehearsed:
            self.clear()
        new = np.diff(query_start_loc.numpy()).astype(np.int64)
        pages = pages_up_to(seq_lens.numpy().astype(np.int64), new, query_block, page)
        rows, first = [self.row(layer) for layer in layers], self.layers[0] in layers
        for phase, which in enumerate((new > 1, new == 1)):
            self.whole[phase, rows] += pages[which].sum()
            self.whole_steps[phase] += first and which.any()

    def close_step(self) -> None:
        """Sorts what was counted since the last call, a step, by its density; on the CPU."""
        totals = torch.from_numpy(self.pages.numpy().sum(axis=(2, 3)))
        for phase, (read, dense) in enumerate((totals - self._closed).tolist()):
            if dense:
                self.steps[phase, int(np.searchsorted(DENSITIES[:-1], read / dense))] += 1
                self.densities[phase] += read / dense
        self._closed = totals

    def report(self) -> dict[str, Any]:
        """All that was counted, as JSON values; waits for the device.

        Returns:
            "layers"; "first_head"; "plan_seconds"; and by phase "read" and "dense", int
            [layers, kv_heads]; "steps", int [densities]; "densities", their sum.
        """
        self.begin_step()
        pages = self.pages.cpu().numpy() + self.whole[:, None, :, None]
        steps, densities = self.steps.cpu().numpy(), self.densities.cpu().numpy()
        steps = steps + np.pad(self.whole_steps[:, None], ((0, 0), (len(DENSITIES) - 1, 0)))
        by_phase = {
            "read": pages[:, 0],
            "dense": pages[:, 1],
            "steps": steps,
            "densities": densities + self.whole_steps,
        }
        told = {
            name: dict(zip(PHASES, each.tolist(), strict=True)) for name, each in by_phase.items()
        }
        return told | {
            "layers": list(self.layers),
            "first_head": self.first_head,
            "plan_seconds": self.plan_seconds,
        }


def pages_up_to(stop: np.ndarray, new: np.ndarray, query_block: int, page: int) -> np.ndarray:
    """Pages up to the ends of the query blocks of requests' queries, summed over queries.

    Args:
        stop: int64 [requests], tokens of each up to its last query.
        new: int64 [requests], queries of each.
        query_block: tokens a query block, a multiple of the page.
        page: tokens a page.

    Returns:
        int64 [requests].
    """

    def before(position: np.ndarray) -> np.ndarray:
        """Of all queries before a position, in query blocks that are whole."""
        blocks, rest = position // query_block, position % query_block
        own = query_block // page
        return own * (query_block * blocks * (blocks + 1) // 2 + rest * (blocks + 1))

    # The last query block ends with the request.
    last = np.maximum((stop - 1) // query_block * query_block, stop - new)
    return before(last) - before(stop - new) + (stop - last) * ceil_div(stop, page)
