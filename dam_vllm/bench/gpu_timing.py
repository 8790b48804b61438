"""Time on a GPU: steps are recorded as a CUDA graph and its replays timed by CUDA events.

Replays leave out what a step's launches cost the host, which in serving runs ahead of the GPU or
replays graphs itself; the same calls by the host's clock show them.
"""

import time
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


class EagerTimer:
    """Times calls by the host's clock, launches included, until the device is done."""

    def bind(self, calls: Sequence[Call]) -> Run:
        return lambda: [call() for call in calls]

    def seconds(self, run: Run) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
