"""Counts of engines and ranks put together, how long they are waited for, and as metrics."""

import asyncio

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dam_vllm.attention.page_counts import PageCounts
from dam_vllm.endpoint.counts import Live
from dam_vllm.endpoint.metrics import DamCollector


def worker(rng, first_head=0, layers=(0, 2)):
    """A worker's report, of two steps: one planned, one that reads everything."""
    counts = PageCounts(layers, 2, first_head, torch.device("cpu"))
    counts.pages[:, 1] += torch.from_numpy(rng.integers(50, 90, (2, len(layers), 2)))
    counts.pages[:, 0] += torch.from_numpy(rng.integers(1, 20, (2, len(layers), 2)))
    counts.begin_step()
    starts, lens = torch.tensor([0, 1, 41]).int(), torch.tensor([100, 40]).int()
    counts.add_whole(layers, starts, lens, 128, 16)
    counts.plan_seconds = float(rng.random())
    return counts.report() | {"page": 16, "dense_until": 128}


def engine(*workers, freed=0):
    return {"workers": list(workers), "freed_pages": freed}


def live(reports):
    async def read():
        return reports

    return Live(read, reports)


def total(report, kind, phase):
    return np.array(report[kind][phase]).sum()


def test_heads_of_ranks_stand_side_by_side_and_shared_ones_count_once(rng):
    first, second, copy = worker(rng), worker(rng, first_head=2), worker(rng, first_head=2)
    snapshot = asyncio.run(live({0: engine(first, second, copy)}).counts(1.0))
    for phase in ("prefill", "decode"):
        pages = snapshot.pages(phase)
        assert sorted(pages) == [(layer, head) for layer in (0, 2) for head in range(4)]
        for (layer, head), found in pages.items():
            report, row = (first, second)[head // 2], (0, 2).index(layer)
            wanted = (report[kind][phase][row][head % 2] for kind in ("read", "dense"))
            assert found == tuple(wanted)


def test_stages_and_engines_add_up(rng):
    stages = worker(rng, layers=(0, 1)), worker(rng, layers=(2, 3))
    other = worker(rng, layers=(0, 1, 2, 3))
    reports = {0: engine(*stages), 1: engine(other)}
    pages = asyncio.run(live(reports).counts(1.0)).pages("decode")
    for layer in range(4):
        of_stage = stages[layer // 2]["read"]["decode"][layer % 2]
        of_other = other["read"]["decode"][layer]
        assert [pages[layer, head][0] for head in (0, 1)] == np.add(of_stage, of_other).tolist()


def test_metrics_of_each_engine(rng):
    reports = {0: engine(worker(rng), worker(rng, 2), freed=7), 3: engine(worker(rng), freed=9)}
    collector, registry = DamCollector(), CollectorRegistry()
    registry.register(collector)
    assert generate_latest(registry) == b""
    collector.snapshot, collector.model_name = asyncio.run(live(reports).counts(1.0)), "model"
    families = {
        each.name: each
        for each in text_string_to_metric_families(generate_latest(registry).decode())
    }

    def value(name, **labels):
        family = families[name.removesuffix("_total").removesuffix("_bucket").removesuffix("_sum")]
        (found,) = (
            each.value
            for each in family.samples
            if each.name == name and each.labels == {"model_name": "model", **labels}
        )
        return found

    for index, report in reports.items():
        own = {"engine": str(index)}
        assert value("vllm:dam_freed_pages_total", **own) == report["freed_pages"]
        first = report["workers"][0]
        seconds = value("vllm:dam_plan_seconds_total", **own)
        assert seconds == pytest.approx(first["plan_seconds"])
        for phase in ("prefill", "decode"):
            own["phase"] = phase
            for kind in ("read", "dense"):
                wanted = sum(total(each, kind, phase) for each in report["workers"])
                assert value(f"vllm:dam_pages_{kind}_total", **own) == wanted
            planned = value("vllm:dam_step_density_sum", **own) - 1
            buckets = [
                (float(each.labels["le"]), each.value)
                for each in families["vllm:dam_step_density"].samples
                if each.name.endswith("_bucket") and own.items() <= each.labels.items()
            ]
            wanted = [(planned <= bound) + (bound >= 1) for bound, _ in buckets]
            assert [count for _, count in buckets] == wanted
            assert buckets[-1][0] == float("inf")


def test_who_cannot_wait_gets_what_was_there():
    """One reading at a time, however many ask; one that fails leaves what was read before."""
    reports, asked = [{0: engine(freed=each)} for each in range(3)], []

    async def run():
        gate = asyncio.Event()

        async def read():
            asked.append(len(asked))
            await gate.wait()
            if len(asked) == 2:
                raise RuntimeError("dead")
            return reports[1]

        slow = Live(read, reports[0])
        early = await asyncio.gather(*(slow.counts(0.01) for _ in range(3)))
        gate.set()
        later = await slow.counts(1.0)
        failed = await slow.counts(1.0)
        return [each.engines[0].freed_pages for each in (*early, later, failed)]

    assert asyncio.run(run()) == [0, 0, 0, 1, 1]
    assert asked == [0, 1]
