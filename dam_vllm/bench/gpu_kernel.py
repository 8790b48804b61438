"""Attention of one layer on a GPU: DAM's two kernels against dense and flex, in turn."""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from dam_vllm.bench import peers, serving
from dam_vllm.bench.fa3 import Flash
from dam_vllm.bench.gpu_case import Case, Inputs, copies, draw, geometry
from dam_vllm.bench.gpu_timing import Call, EagerTimer, Run, Timer
from dam_vllm.bench.reference import expected, relative_error, sample
from dam_vllm.bench.report import Row
from dam_vllm.bench.roof import Roof
from dam_vllm.bench.scattered import Selection, Spread, every_page, scattered, work
from dam_vllm.bench.timing import Advance, alternate, ratio

TARGETS = (
    "targets on an H200 against paged FA3: speed-up x density >= 0.85 for chunks of 4096 at 32768 "
    "and more from density 0.1 on, >= 0.80 for decoding 32 x 32768; speed-up >= 0.95 at density "
    "1; contiguous: FA3 on a whole prompt's keys as they are computed\n"
    "dam's times are a layer's, with its share of the plan of all layers (plan: one layer by "
    "itself); eager: with launches, the others without; roof: share of the longer of bytes / copy "
    "bandwidth and operations / bf16 rate\n"
    "each KV head reads page 0, its query block's own, and pages at random distances of its own; "
    "heads: even, mixed as in fitted masks, dynamic: a quarter chooses, reuse: it does so in one "
    "layer of four, tail: as even, with means of what is unread (those three are not compared with "
    "an oracle here; where heads choose, queries are rotated and new keys and values stored too, "
    "which no other time holds)"
)
SECONDS, LEAST_ROUNDS = 5.0, 5
DENSE, SPARSE = ("fa3", "contiguous", "sdpa"), ("flex", "triton", "flash")
EAGER, EAGER_ROUNDS = ("fa3", "triton", "flash"), 5
Key = tuple[str, int | None]  # a peer, and which selection it reads


def measure(
    cases: Sequence[Case],
    densities: Sequence[float],
    spreads: Sequence[Spread],
    flash: Flash | None,
    flex_up_to: int,
    rounds: int,
    roof: Roof,
    device: torch.device,
    timer: Timer,
    advance: Advance,
) -> Iterator[Row]:
    """Times peers on random inputs.

    Args:
        cases: geometries.
        densities: wanted ones; the nearest that the page size allows is taken.
        spreads: how they are spread over heads.
        flash: FlashAttention, or None where there is none.
        flex_up_to: most tokens of all requests that flex_attention is timed at; some versions
            address less than 2**31 numbers.
        rounds: most measurements of each peer; fewer where they take long.
        roof: what the device does at most.
        device: where.
        timer: that of the device.
        advance: called once a case and density.

    Yields:
        A row a case and density; times in milliseconds, medians. A peer that fails has none and
        is named under "failed".
    """
    for case in cases:
        found = [scattered(case, density, spread) for density in densities for spread in spreads]
        selections = _distinct(found)
        bench = _Bench(case, selections, device, timer)
        seconds = bench.run(flash, case.batch * case.tokens <= flex_up_to, rounds)
        _free(device)
        for index in range(len(selections)):
            yield bench.row(index, seconds, roof)
        for _ in found:
            advance()


class _Bench:
    """One case: what is timed, how far off the outputs are, and what failed."""

    def __init__(
        self, case: Case, selections: Sequence[Selection], device: torch.device, timer: Timer
    ) -> None:
        self._case, self._selections = case, selections
        self._device, self._timer = device, timer
        self._sampled = sample(case, device)
        self._wanted: dict[int | None, torch.Tensor] = {}
        self._errors: dict[Key, float] = {}
        self._failures: dict[Key, str] = {}
        self._eager: dict[Key, float] = {}

    def run(self, flash: Flash | None, with_flex: bool, rounds: int) -> dict[Key, list[float]]:
        """Seconds of one call in each round, by peer."""
        if with_flex:
            torch.compiler.reset()  # each shape is compiled by itself, and only a few are kept
        least = min(each.density for each in self._selections)
        count = copies(self._case, least, self._device)
        inputs = draw(self._case, self._device, count)
        runs: dict[Key, Run] = {}
        for key, make in self._peers(inputs, flash, with_flex).items():
            try:
                runs[key] = self._prepare(key, make(), inputs[0])
            except Exception as error:  # what one peer lacks must not cost the others' figures
                self._failures[key] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if key in self._failures:
                _free(self._device)
        once = sum(self._timer.seconds(run) for run in runs.values())
        fitting = int(SECONDS / once) if once else 0
        times = alternate(runs, min(rounds, max(fitting, LEAST_ROUNDS)), clock=self._timer.seconds)
        return {key: [each / count for each in values] for key, values in times.items()}

    def _peers(
        self, inputs: Sequence[Inputs], flash: Flash | None, with_flex: bool
    ) -> dict[Key, Callable[[], list[Call]]]:
        """What makes each peer's calls."""
        case, where = self._case, geometry(self._case, self._device)
        made: dict[Key, Callable[[], list[Call]]] = {}
        if flash is not None:
            dense = partial(peers.flash_calls, case, where, inputs, flash)
            made["fa3", None] = partial(dense, True)
            if case.phase == "prefill":
                made["contiguous", None] = partial(dense, False)
        if case.phase != "chunk":  # its causal mask begins at the first key
            made["sdpa", None] = partial(peers.sdpa_calls, case, inputs)
        for index, selection in enumerate(self._selections):
            made["plan", index] = partial(peers.plan_calls, case, where, inputs, selection)
            dam = partial(serving.dam_calls, case, where, inputs, selection)
            made["triton", index] = partial(dam, None)
            if flash is not None:
                made["flash", index] = partial(dam, flash.varlen)
            if with_flex and selection.exact:
                made["flex", index] = partial(peers.flex_calls, case, inputs, selection)
        return made

    def _prepare(self, key: Key, calls: Sequence[Call], first: Inputs) -> Run:
        """Compiles a peer, checks what it computes, and records its calls."""
        output = calls[0]()
        name, index = key
        if name != "plan" and (index is None or self._selections[index].exact):
            if index not in self._wanted:
                pages = None if index is None else self._selections[index].pages
                self._wanted[index] = expected(self._case, first, pages, self._sampled)
            self._errors[key] = relative_error(output, self._sampled, self._wanted[index])
        for call in calls[1:]:
            call()
        if name in EAGER and self._device.type == "cuda":
            timer = EagerTimer()
            times = [timer.seconds(timer.bind(calls)) for _ in range(EAGER_ROUNDS)]
            self._eager[key] = statistics.median(times) / len(calls)
        return self._timer.bind(calls)

    def row(self, index: int, seconds: Mapping[Key, Sequence[float]], roof: Roof) -> Row:
        """What was found for one selection."""
        case, selection = self._case, self._selections[index]
        keys: dict[str, Key] = {name: (name, None) for name in DENSE}
        keys |= {name: (name, index) for name in (*SPARSE, "plan")}
        times = {
            name: statistics.median(seconds[key]) for name, key in keys.items() if key in seconds
        }
        works = dict.fromkeys(DENSE, work(case, every_page(case).expand(case.kv_heads, -1, -1)))
        works |= dict.fromkeys(SPARSE, selection.work)
        baseline = next((name for name in DENSE if name in times), None)
        row: Row = {
            "bench": "kernel",
            "phase": case.phase,
            "gqa": case.heads_per_kv,
            "tokens": case.tokens,
            "batch": case.batch,
            "queries": case.queries,
            "page": case.page,
            "heads": str(selection.spread),
            "density": selection.density,
        }
        row |= {f"{name}_ms": 1e3 * times[name] if name in times else None for name in keys}
        eager = {name: self._eager.get(keys[name]) for name in EAGER}
        row |= {
            f"{name}_eager_ms": None if found is None else 1e3 * found
            for name, found in eager.items()
        }
        for name in ("triton", "flash"):
            speedup = None
            if baseline is not None and name in times:
                speedup = ratio(seconds[keys[baseline]], seconds[keys[name]])
            row[f"{name}_speedup"] = speedup
            row[f"{name}_x_density"] = None if speedup is None else speedup * selection.density
        row["baseline"], row["bound"] = baseline, roof.bound(selection.work)
        for name in ("fa3", "contiguous", "triton", "flash"):
            share = roof.seconds(works[name]) / times[name] if name in times else None
            row[f"{name}_roof"] = share
        row |= {f"{name}_error": self._errors.get(keys[name]) for name in (*DENSE, *SPARSE)}
        failed = [
            f"{name}: {self._failures[key]}" for name, key in keys.items() if key in self._failures
        ]
        return row | ({"failed": failed} if failed else {})


def failures(rows: Sequence[Row]) -> str:
    """A line for each way in which peers failed, with the first case in which one did."""
    seen: dict[str, str] = {}
    for row in rows:
        for text in row.get("failed", ()):
            case = f"{row['phase']} {row['batch']} x {row['tokens']}, GQA {row['gqa']}"
            seen.setdefault(text, f"{text[:300]} ({case}, density {row['density']:.2g})")
    return "\n".join(seen.values())


def _distinct(selections: Sequence[Selection]) -> list[Selection]:
    """Those that read other pages than all before them."""
    found: dict[tuple[Spread | None, bytes], Selection] = {}
    for each in selections:
        kind = None if each.exact else each.spread
        found.setdefault((kind, each.pages.numpy().tobytes()), each)
    return list(found.values())


def _free(device: torch.device) -> None:
    """Gives back the memory of what is no longer used; recorded graphs keep theirs apart."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
