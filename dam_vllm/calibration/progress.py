"""What a calibration tells its caller, and how its work is counted."""

from collections.abc import Callable
from dataclasses import dataclass

from dam_vllm.calibration.texts import Batch


@dataclass
class Reporter:
    """What the caller hears and says while a job runs.

    Attributes:
        say: called with a line for the user.
        progress: called with (work done, all work) in tokens times layers.
        stop: asked after each batch; True saves a checkpoint and stops.
    """

    say: Callable[[str], None] = lambda line: None
    progress: Callable[[int, int], None] = lambda done, total: None
    stop: Callable[[], bool] = lambda: False


def cost(batches: list[Batch], layers: list[int]) -> int:
    """Tokens times layers run; the pass ends at the last layer observed."""
    return sum(len(batch) * len(batch[0]) for batch in batches) * (layers[-1] + 1)


class Work:
    """Counts the work of all passes together."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        """Starts at nothing done of `total` tokens times layers."""
        self._reporter = reporter
        self._total = total
        self._done = 0

    def skip(self, batches: list[Batch], layers: list[int]) -> None:
        """Counts what an earlier run did."""
        self._done += cost(batches, layers)

    def advance(self, batch: Batch, layers: list[int]) -> bool:
        """Counts a batch, reports it, and returns whether the caller wants to stop."""
        self._done += cost([batch], layers)
        self._reporter.progress(self._done, self._total)
        return self._reporter.stop()

    def end(self) -> None:
        """Counts what turned out to be needless, such as choices that nothing proposed."""
        if self._done < self._total:
            self._done = self._total
            self._reporter.progress(self._done, self._total)
