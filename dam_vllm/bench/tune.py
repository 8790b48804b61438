"""Block sizes of the Triton kernel for the GPU at hand: a walk from the table's entries.

From an entry on, the walk goes to the fastest neighbour, which differs in one block size, in warps
or in up to two stages, until none is faster. Keys lie behind a look-up of their page, so that two
more stages put one more block of keys in flight. A neighbour that does not compile, that needs more
shared memory than there is, or that computes something else is passed over.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dam_vllm.attention.cuda.paged import Softmax, attend_paged
from dam_vllm.attention.cuda.plan import DevicePlan
from dam_vllm.attention.cuda.tuning import FEW_ROWS, LARGE_MEMORY, NARROW_HEAD, Tuning, tuning
from dam_vllm.bench.gpu_case import Case, Inputs, copies, draw, geometry
from dam_vllm.bench.gpu_timing import Call, Timer
from dam_vllm.bench.peers import plan_call, virtual_pages
from dam_vllm.bench.report import Row
from dam_vllm.bench.scattered import scattered
from dam_vllm.bench.timing import Advance

KV_HEADS, HEADS_PER_KV, DENSITY = 8, 4, 0.2
GAIN, AGREEMENT = 0.99, 2e-2  # what is less faster is noise; what differs more is wrong
LEAST_BLOCK, MOST_BLOCK, MOST_WARPS, MOST_STAGES = 16, 256, 8, 9
BLOCKS = ("block_m", "block_n", "warps", "stages")
Cost = Callable[[Tuning], float | None]


@dataclass(frozen=True)
class Entry:
    """One entry of the table, and what it is measured on.

    Attributes:
        few: whether few rows share their keys.
        wide: whether heads are wider than 128 channels.
        cases: geometries.
    """

    few: bool
    wide: bool
    cases: tuple[Case, ...]


def entries(head_sizes: Sequence[int], page: int, tokens: int, batch: int) -> list[Entry]:
    """The table's entries that some heads use.

    Args:
        head_sizes: channels a head.
        page: tokens a page.
        tokens: length of the prompt, and of each request that decodes.
        batch: requests that decode together.
    """
    found = []
    for few in (False, True):
        phase = ("decode", batch) if few else ("prefill", 1)
        for wide in (False, True):
            cases = tuple(
                Case(phase[0], HEADS_PER_KV * KV_HEADS, KV_HEADS, size, page, tokens, phase[1])
                for size in head_sizes
                if (size > NARROW_HEAD) == wide
            )
            if cases:
                found.append(Entry(few, wide, cases))
    return found


def measure(
    wanted: Sequence[Entry], rounds: int, device: torch.device, timer: Timer, advance: Advance
) -> Iterator[Row]:
    """Walks from each entry.

    Args:
        wanted: entries of the table.
        rounds: measurements of each candidate.
        device: a GPU.
        timer: that of the device.
        advance: called once an entry.

    Yields:
        A row for each candidate, the best of an entry marked; its time is relative to that of
        the table's entry, the geometric mean over head sizes.
    """
    for entry in wanted:
        trials = [_Trial(case, rounds, device, timer) for case in entry.cases]

        def cost(candidate: Tuning, trials: Sequence[_Trial] = trials) -> float | None:
            ratios = [trial.relative(candidate) for trial in trials]
            known = [ratio for ratio in ratios if ratio is not None]
            return statistics.geometric_mean(known) if len(known) == len(ratios) else None

        # Fewer rows than a block's are padded up to 16, so its size makes no difference.
        names = ("block_n", "warps", "stages") if entry.few else BLOCKS
        start = tuning(device, entry.cases[0].head_size, FEW_ROWS + (not entry.few), exact=False)
        best, tried = walk(start, cost, names)
        for candidate, relative in tried.items():
            yield {
                "bench": "tune",
                "rows": f"{'up to' if entry.few else 'over'} {FEW_ROWS}",
                "head_sizes": ", ".join(str(case.head_size) for case in entry.cases),
                "block_m": candidate.block_m,
                "block_n": candidate.block_n,
                "warps": candidate.warps,
                "stages": candidate.stages,
                "relative": relative,
                "best": line(entry, candidate, device) if candidate == best else None,
            }
        advance()


def walk(
    start: Tuning, cost: Cost, names: Sequence[str]
) -> tuple[Tuning, dict[Tuning, float | None]]:
    """Goes to the fastest neighbour until none is faster.

    Args:
        start: where from.
        cost: time of a candidate, None where it cannot run.
        names: fields that may change.

    Returns:
        The best candidate, and the cost of each that was tried, in this order.
    """
    best, tried = start, {start: cost(start)}
    while True:
        for each in neighbours(best, names):
            if each not in tried:
                tried[each] = cost(each)
        known = {each: time for each, time in tried.items() if time is not None}
        fastest = min(known, key=known.__getitem__, default=best)
        if known.get(fastest, math.inf) >= GAIN * known.get(best, math.inf):
            return best, tried
        best = fastest


def neighbours(tuned: Tuning, names: Sequence[str] = BLOCKS) -> list[Tuning]:
    """Block sizes and warps halved and doubled, up to two stages fewer and more."""
    limits = {"warps": (1, MOST_WARPS), "stages": (1, MOST_STAGES)}
    found = []
    for name in names:
        value = getattr(tuned, name)
        least, most = limits.get(name, (LEAST_BLOCK, MOST_BLOCK))
        near = (value - 2, value - 1, value + 1, value + 2)
        around = near if name == "stages" else (value // 2, value * 2)
        found += [replace(tuned, **{name: new}) for new in around if least <= new <= most]
    return found


def line(entry: Entry, tuned: Tuning, device: torch.device) -> str:
    """The entry as it stands in the table."""
    large = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in LARGE_MEMORY
    values = (tuned.block_m, tuned.block_n, tuned.warps, tuned.stages)
    return f"({large}, {entry.few}, {entry.wide}): Tuning{values},"


def table_lines(rows: Sequence[Row]) -> str:
    """The best entries, as `attention/cuda/tuning.py` holds them."""
    return "\n".join(row["best"] for row in rows if row["best"])


class _Trial:
    """A case in which candidates are timed, without the plan, which they share."""

    def __init__(self, case: Case, rounds: int, device: torch.device, timer: Timer) -> None:
        self._case, self._rounds, self._timer = case, rounds, timer
        self._where = geometry(case, device)
        selector = scattered(case, DENSITY).selector(device)
        self._inputs = draw(case, device, copies(case, DENSITY, device))
        self._plans = [plan_call(case, self._where, each, selector) for each in self._inputs]
        self._wanted: torch.Tensor | None = None
        self._seconds: float | None = None

    def relative(self, candidate: Tuning) -> float | None:
        """Time as a share of the first candidate's that can run, None for one that cannot."""
        output = torch.full_like(self._inputs[0].query, torch.nan)
        calls = [
            self._call(each, plan, candidate, output)
            for each, plan in zip(self._inputs, self._plans, strict=True)
        ]
        try:
            found = calls[0]().float()
            for call in calls[1:]:
                call()
            run = self._timer.bind(calls)
            self._timer.seconds(run)
            seconds = statistics.median(self._timer.seconds(run) for _ in range(self._rounds))
        except Exception:  # the compiler and the driver refuse in many ways
            return None
        self._wanted = found if self._wanted is None else self._wanted
        if not (found - self._wanted).norm() < AGREEMENT * self._wanted.norm():
            return None
        self._seconds = seconds if self._seconds is None else self._seconds
        return seconds / self._seconds

    def _call(
        self, each: Inputs, plan: DevicePlan, candidate: Tuning, output: torch.Tensor
    ) -> Call:
        softmax = Softmax(self._case.scale)
        paged = (
            each.query,
            *virtual_pages(self._case, each),
            output,
            plan,
            self._where.query_blocks,
        )

        def call() -> torch.Tensor:
            attend_paged(*paged, self._where.every, self._case.kv_heads, softmax, tuned=candidate)
            return output

        return call
