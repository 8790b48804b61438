"""What Prometheus is told, in the form and under the names of vLLM's own metrics."""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from dam_vllm.attention.page_counts import DENSITIES
from dam_vllm.endpoint.counts import EngineCounts, Phase, Snapshot

PHASES: tuple[Phase, ...] = ("prefill", "decode")
BOUNDS = [*(f"{bound:g}" for bound in DENSITIES[:-1]), "1.0", "+Inf"]


class DamCollector(Collector):
    """Tells the last snapshot.

    Attributes:
        snapshot: what to tell, None for nothing.
        model_name: label of all metrics.
    """

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.model_name = ""

    def describe(self) -> list[Metric]:
        """Nothing: what is told is known when it is asked for."""
        return []

    def collect(self) -> Iterator[Metric]:
        if self.snapshot is None:
            return
        labels = ["model_name", "engine"]
        read = CounterMetricFamily(
            "vllm:dam_pages_read",
            "KV-cache pages read, summed over queries, layers with masks and KV heads.",
            labels=[*labels, "phase"],
        )
        dense = CounterMetricFamily(
            "vllm:dam_pages_dense",
            "KV-cache pages that dense attention would have read, summed likewise.",
            labels=[*labels, "phase"],
        )
        density = HistogramMetricFamily(
            "vllm:dam_step_density",
            "Pages read over pages of dense attention, of each step (of an engine's first rank).",
            labels=[*labels, "phase"],
        )
        seconds = CounterMetricFamily(
            "vllm:dam_plan_seconds",
            "Time that the host spent on planning steps (of an engine's first rank).",
            labels=labels,
        )
        freed = CounterMetricFamily(
            "vllm:dam_freed_pages",
            "KV-cache pages given back to vLLM while their requests ran.",
            labels=labels,
        )
        for index, engine in self.snapshot.engines.items():
            own = [self.model_name, str(index)]
            for phase in PHASES:
                pages = engine.pages(phase).values()
                read.add_metric([*own, phase], sum(each for each, _ in pages))
                dense.add_metric([*own, phase], sum(each for _, each in pages))
                density.add_metric([*own, phase], *_histogram(engine, phase))
            seconds.add_metric(own, engine.workers[0].plan_seconds if engine.workers else 0.0)
            freed.add_metric(own, engine.freed_pages)
        yield from (read, dense, density, seconds, freed)


def _histogram(engine: EngineCounts, phase: Phase) -> tuple[list[tuple[str, float]], float]:
    """Buckets up to each bound, and the sum. Ranks run the same steps: the first one tells."""
    if not engine.workers:
        return [(bound, 0) for bound in BOUNDS], 0.0
    first = engine.workers[0]
    counts = list(accumulate(first.steps[phase]))
    return list(zip(BOUNDS, [*counts, counts[-1]], strict=True)), first.densities[phase]
