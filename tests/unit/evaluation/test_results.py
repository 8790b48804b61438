"""Rows to the worst task, the stored report, tables and pictures."""

import json

import numpy as np
import pytest
from rich.console import Console

from dam_vllm.evaluation.heat_map import accuracies, heat_map
from dam_vllm.evaluation.results import page_density, quality, score_rows, worst
from dam_vllm.evaluation.settings import STOCK, Place, Subject
from dam_vllm.evaluation.show import agreement_table, score_table, worst_line
from dam_vllm.evaluation.state import State


def row(masks, task, length, accuracy, **more):
    depths = None if task == "words" else [accuracy, None, 0.5, 1.0, accuracy]
    values = {"density": 0.25, "seconds": 0.125, "samples": 20, "depths": depths}
    return {"masks": masks, "task": task, "length": length, "accuracy": accuracy} | values | more


@pytest.fixture
def rows():
    return [
        row("dense", "lines", 512, 0.9, density=1.0),
        row("dense", "words", 512, 0.2, density=1.0),
        row("dense", "lines", 1024, 0.8, density=1.0),
        row("dense", "words", 1024, 0.1, density=1.0),
        row("a", "lines", 512, 0.7),
        row("a", "words", 512, 0.1),
        row("a", "lines", 1024, 0.5),
        row("a", "words", 1024, 0.0),
        row("b", "lines", 512, 0.9),
        row("b", "words", 512, 0.3),
        row("b", "lines", 1024, 0.8),
        row("b", "words", 1024, 0.0),
        row("streaming@a", "lines", 512, 0.0),
        row("streaming@a", "words", 512, 0.0),
    ]


AGREED = [
    {"masks": name, "length": 512, "windows": 2, "perplexity": 9.0, "kl": 0.1, "top1": 0.5,
     "density": 0.25}
    for name in ("dense", "a", "b")
]  # fmt: skip


def test_worst_is_by_difference_to_dense(rows):
    first, second = worst(rows, ["a", "b"])
    assert (first["task"], first["length"], first["accuracy"]) == ("lines", 1024, 0.5)
    assert first["difference"] == pytest.approx(-0.3)
    assert (second["task"], second["length"]) == ("words", 1024)
    assert worst_line(first) == (
        "a: worst task lines at 1024 tokens, accuracy 0.50, dense 0.80 (-0.30)"
    )


def test_quality_is_one_files_own_and_json(rows, settings):
    found = json.loads(json.dumps(quality(settings(), rows, AGREED, "a")))
    assert found["tasks"]["lines"]["1024"] == {"accuracy": 0.5, "dense": 0.8, "density": 0.25}
    assert list(found["tasks"]) == ["lines", "words"]
    assert found["worst"]["length"] == 1024
    assert found["agreement"] == {"512": {"perplexity": 9.0, "kl": 0.1, "top1": 0.5}}
    assert (found["samples"], found["seed"], found["page"]) == (3, 5, 32)


def test_rows_take_medians_and_bins(settings, tmp_path):
    chosen = settings(tasks=("lines",), lengths=(512,), samples=4)
    state = State(tmp_path)
    answers = [(True, 0.05), (False, 0.15), (True, 0.19), (True, 1.0)]
    for index, (right, depth) in enumerate(answers):
        record = {"right": right, "seconds": float(index**2), "depth": depth}
        state.add(("k", "lines", 512, index), record | {"read": index, "dense": 6})
    (found,) = score_rows(chosen, state, [Place(Subject("a", "k"), 512)])
    assert found["accuracy"] == 0.75
    assert found["seconds"] == 2.5
    assert found["density"] == 6 / 24
    assert found["depths"] == [pytest.approx(2 / 3), None, None, None, 1.0]


def test_density_without_counts_is_that_of_dense():
    assert page_density([{"right": True}]) == 1.0
    assert page_density([{"read": 0, "dense": 0}]) == 1.0
    assert STOCK.masks is None


def test_tables_hold_every_figure(rows):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(score_table(rows))
    console.print(agreement_table(AGREED))
    text = console.export_text()
    for part in ("0.50 (-0.30)", "0.250  0.12 s", "streaming@a", "20 questions", "0.5000", "-"):
        assert part in text
    assert "0.90 (" in text  # b's, not dense's
    assert text.count("0.90 (+0.00)") == 1


def test_panels_are_lengths_by_depths(rows, tmp_path, drawn):
    image = accuracies([r for r in rows if (r["masks"], r["task"]) == ("a", "lines")])
    np.testing.assert_array_equal(
        image, [[0.7, 0.5], [np.nan, np.nan], [0.5, 0.5], [1, 1], [0.7, 0.5]]
    )
    image = accuracies([r for r in rows if (r["masks"], r["task"]) == ("a", "words")])
    np.testing.assert_array_equal(image, [[0.1, 0.0]])
    heat_map(rows, tmp_path / "map.png")
    panels = {axes.get_title(): axes for axes in drawn[-1].axes if axes.get_images()}
    panels = {title: axes for title, axes in panels.items() if "\n" in title}
    assert "lines\na" in panels
    for title, axes in panels.items():
        task, name = title.split("\n")
        own = [row for row in rows if (row["masks"], row["task"]) == (name, task)]
        (shown,) = axes.get_images()
        np.testing.assert_array_equal(shown.get_array().filled(np.nan), accuracies(own))
        assert shown.get_clim() == (0, 1)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == [
            str(row["length"]) for row in own
        ]
        finite = np.isfinite(accuracies(own)).sum()
        assert len(axes.texts) == finite
