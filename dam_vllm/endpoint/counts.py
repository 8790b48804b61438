"""What the engines of a server counted, read from them and put together."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

logger = logging.getLogger("vllm.dam")

Phase = Literal["prefill", "decode"]
Reports = Mapping[int, Mapping[str, Any]]


class WorkerCounts(BaseModel):
    """What one worker counted; see `PageCounts.report`.

    Attributes:
        layers: global indices.
        first_head: global id of its first KV head.
        page: tokens a page.
        dense_until: positions below it read everything, in tokens.
        read: by phase, pages read, [layers, kv_heads].
        dense: by phase, pages that dense heads would have read.
        steps: by phase, steps by their density.
        densities: by phase, sum of these densities.
        plan_seconds: host's time for planning.
    """

    layers: list[int]
    first_head: int
    page: int
    dense_until: int
    read: dict[Phase, list[list[int]]]
    dense: dict[Phase, list[list[int]]]
    steps: dict[Phase, list[int]]
    densities: dict[Phase, float]
    plan_seconds: float


class EngineCounts(BaseModel):
    """What one engine counted.

    Attributes:
        workers: of its ranks, those that hold masked layers.
        freed_pages: pages given back to vLLM while their requests ran.
    """

    workers: list[WorkerCounts]
    freed_pages: int

    def pages(self, phase: Phase) -> dict[tuple[int, int], tuple[int, int]]:
        """Pages read, and what dense heads would have read, by layer and KV head.

        Of ranks that share a KV head the first one tells; dynamic heads of the others choose for
        query heads of their own.
        """
        found: dict[tuple[int, int], tuple[int, int]] = {}
        for worker in self.workers:
            read, dense = worker.read[phase], worker.dense[phase]
            for row, layer in enumerate(worker.layers):
                for head, pages in enumerate(zip(read[row], dense[row], strict=True)):
                    found.setdefault((layer, worker.first_head + head), pages)
        return found


@dataclass(frozen=True)
class Snapshot:
    """What was read last.

    Attributes:
        engines: by number.
        taken: when, by `time.monotonic`.
    """

    engines: Mapping[int, EngineCounts]
    taken: float

    @property
    def age(self) -> float:
        """Seconds since it was read."""
        return time.monotonic() - self.taken

    def pages(self, phase: Phase) -> dict[tuple[int, int], tuple[int, int]]:
        """`EngineCounts.pages`, added up over engines."""
        total: dict[tuple[int, int], tuple[int, int]] = {}
        for engine in self.engines.values():
            for head, (read, dense) in engine.pages(phase).items():
                before = total.get(head, (0, 0))
                total[head] = (before[0] + read, before[1] + dense)
        return total


class Live:
    """Reads counts when somebody asks, and once at a time.

    An engine answers between two steps, so that an answer can take as long as a step does. Whoever
    cannot wait gets what was read before.
    """

    def __init__(self, read: Callable[[], Awaitable[Reports]], first: Reports) -> None:
        """Reads by a function; `first` is what it gave."""
        self._read = read
        self._snapshot = _snapshot(first)
        self._task: asyncio.Task[None] | None = None

    async def counts(self, patience: float) -> Snapshot:
        """What was counted.

        Args:
            patience: seconds to wait at most for an answer.

        Returns:
            The counts of now, or those that were read last.
        """
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._refresh())
        await asyncio.wait({self._task}, timeout=patience)
        return self._snapshot

    async def _refresh(self) -> None:
        try:
            self._snapshot = _snapshot(await self._read())
        except Exception as error:  # an engine that died is told by vLLM itself
            logger.warning("DAM: counts could not be read: %s", error)


def _snapshot(reports: Reports) -> Snapshot:
    engines = {index: EngineCounts.model_validate(each) for index, each in reports.items()}
    return Snapshot(engines, time.monotonic())
