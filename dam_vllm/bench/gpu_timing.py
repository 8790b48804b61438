"""Time on a GPU: steps are recorded as a CUDA graph and its replays timed by CUDA events.

Replays leave out what a step's launches cost the host, which in serving runs ahead of the GPU or
replays graphs itself.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], torch.Tensor]
Run = Callable[[], object]


class Timer(Protocol):
    """Times calls on a device."""

    def bind(self, calls: Sequence[Call]) -> Run:
        """What runs calls in a row, all of which have run before."""

    def seconds(self, run: Run) -> float:
        """Time of one run."""


class CudaTimer:
    """Times replays of recorded calls."""

    def bind(self, calls: Sequence[Call]) -> Run:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for call in calls:
                call()

        def run(kept: Sequence[Call] = calls) -> None:
            # A graph does not keep the tensors alive whose memory it reads; the calls do.
            graph.replay()

        return run

    def seconds(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
