"""What a platform gives: one object that plans a step, and runs its layers.

The same two calls serve on every platform (FlashInfer's plan and run): what follows from the step's
geometry alone is planned once, each layer then runs with its queries and its cache.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Step:
    """Where a step's queries and pages lie, as vLLM tells it.

    Attributes:
        query_start_loc: int32 [requests + 1], first query row of each request, on the device.
        query_start_loc_cpu: the same, on the CPU.
        seq_lens: int32 [requests], tokens of each request up to its last query, on the device.
        block_table: int32 [requests, n], pages of each request, on the device.
        tokens: query rows, without padding.
        max_query_len: most queries of a request.
        max_seq_len: most tokens of a request, or more.
        seq_lens_cpu: int32 [requests], `seq_lens` on the CPU, or upper bounds where tokens are
            guessed ahead; None where vLLM does not tell.
    """

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    tokens: int
    max_query_len: int
    max_seq_len: int
    seq_lens_cpu: torch.Tensor | None = None

    def one_by_one(self, which: torch.Tensor) -> "Step":
        """The same queries, those of some requests each as a request of its own.

        Args:
            which: bool [requests], on the CPU.

        Returns:
            The step, nothing of which waited for the device.
        """
        if not bool(which.any()):
            return self
        starts, queries = self.query_start_loc_cpu, self.query_start_loc_cpu.diff()
        counts = torch.where(which, queries, 1)
        request = torch.repeat_interleave(counts)
        offset = torch.arange(len(request)) - (counts.cumsum(0) - counts)[request]
        begins = torch.cat([starts[request] + offset, starts[-1:]]).int()
        later = ((counts - 1)[request] - offset).int()
        rows, last = self._move(request), self.seq_lens_cpu
        return replace(
            self,
            query_start_loc=self._move(begins),
            query_start_loc_cpu=begins,
            seq_lens=self.seq_lens[rows] - self._move(later),
            block_table=self.block_table[rows],
            max_query_len=int(begins.diff().max()),
            seq_lens_cpu=None if last is None else last[request] - later,
        )

    def _move(self, host: torch.Tensor) -> torch.Tensor:
        """To the device, without waiting for it."""
        device = self.seq_lens.device
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class Runner(Protocol):
    """Runs plans of some layers of one worker."""

    @property
    def layers(self) -> Collection[str]:
        """Names of the layers that it serves."""

    def run(
        self, plan: Any, layer: str, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Computes a layer's attention.

        Args:
            plan: of this step, made by it.
            layer: its name, one of `layers`.
            query: [tokens, heads, head_size], rotated where a head is dynamic; rows beyond the
                step's tokens are padding.
            cache: [blocks, kv_heads, page, 2 * head_size], vLLM's, new keys and values in it.
            output: [tokens, heads, head_size], written.
        """


class SparseAttention(Runner, Protocol):
    """Sparse attention of some layers of one worker on one platform."""

    def plan(self, step: Step) -> Any:
        """What all layers of the step share; on a GPU without waiting for the device."""


@dataclass(frozen=True)
class Planned:
    """A step's plan and what runs it: all that a layer needs of the metadata.

    Attributes:
        attention: runs it.
        plan: made by it.
    """

    attention: Runner
    plan: Any

    def covers(self, layer: str) -> bool:
        """Whether the plan serves a layer; others are vLLM's own."""
        return layer in self.attention.layers

    def run(
        self, layer: str, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """`Runner.run` with this plan."""
        self.attention.run(self.plan, layer, query, cache, output)
