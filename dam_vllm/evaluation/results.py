"""From stored answers to rows: accuracy, density and time; agreement; the worst task."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dam_vllm import __version__
from dam_vllm.evaluation.settings import DENSE, Place, Settings
from dam_vllm.evaluation.state import State
from dam_vllm.machine import machine

Row = dict[str, Any]
DEPTHS = 5


def score_rows(settings: Settings, state: State, places: Sequence[Place]) -> list[Row]:
    """One row for each subject, task and length.

    Args:
        settings: of the evaluation.
        state: with an answer to every question.
        places: what was measured.

    Returns:
        Rows with "masks", "task", "length", "accuracy", "density" (of the prompts' prefill),
        "seconds" (median time to the first token), "samples", and "depths", the accuracy in
        `DEPTHS` bins from the text's start to its end, or None where answers have no depth.
    """
    rows = []
    for place in places:
        for task in settings.tasks:
            keys = settings.question_keys(place.subject.key, task, place.length)
            records = [state[key] for key in keys]
            rows.append(
                {
                    "masks": place.subject.name,
                    "task": task,
                    "length": place.length,
                    "accuracy": _accuracy(records),
                    "density": page_density(records),
                    "seconds": statistics.median(record["seconds"] for record in records),
                    "samples": len(records),
                    "depths": _by_depth(records),
                }
            )
    return rows


def agreement_rows(settings: Settings, state: State, places: Sequence[Place]) -> list[Row]:
    """One row for each subject and length, if there was a text.

    Args:
        settings: of the evaluation.
        state: with a record of every window.
        places: what was measured.

    Returns:
        Rows with "masks", "length", "windows", "perplexity", "kl" (from dense in nats a token,
        an estimate from below), "top1" (agreement with dense), and "density".
    """
    rows = []
    for place in places if settings.windows else []:
        keys = settings.window_keys(place.subject.key, place.length)
        records = [state[key] for key in keys]
        rows.append(
            {
                "masks": place.subject.name,
                "length": place.length,
                "windows": len(records),
                "perplexity": math.exp(_mean(records, "nll")),
                "kl": _mean(records, "kl"),
                "top1": _mean(records, "top1"),
                "density": page_density(records),
            }
        )
    return rows


def page_density(records: Sequence[Mapping[str, Any]]) -> float:
    """Pages read over pages of dense attention; 1 where none were counted (stock vLLM)."""
    dense = sum(record.get("dense", 0) for record in records)
    return sum(record["read"] for record in records) / dense if dense else 1.0


def worst(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Where each mask file loses most against dense.

    Args:
        rows: of `score_rows`, dense among them.
        names: of the mask files.

    Returns:
        A row a file with "masks", "task", "length", "accuracy", "dense" and "difference".
    """
    base = dense_accuracy(rows)
    result = []
    for name in names:
        own = [row for row in rows if row["masks"] == name]
        row = min(own, key=lambda row: row["accuracy"] - base[row["task"], row["length"]])
        found = {key: row[key] for key in ("masks", "task", "length", "accuracy")}
        found["dense"] = base[row["task"], row["length"]]
        result.append(found | {"difference": row["accuracy"] - found["dense"]})
    return result


def dense_accuracy(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """Dense accuracy by task and length."""
    return {(row["task"], row["length"]): row["accuracy"] for row in rows if row["masks"] == DENSE}


def quality(settings: Settings, rows: Sequence[Row], agreed: Sequence[Row], name: str) -> Row:
    """The report that a mask file keeps about itself.

    Args:
        settings: of the evaluation.
        rows: of `score_rows`.
        agreed: of `agreement_rows`.
        name: of the mask file.

    Returns:
        JSON values: "tasks" by task and length, "worst", "agreement" by length, and settings.
    """
    base = dense_accuracy(rows)
    tasks: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["masks"] == name:
            tasks.setdefault(row["task"], {})[str(row["length"])] = {
                "accuracy": row["accuracy"],
                "dense": base[row["task"], row["length"]],
                "density": row["density"],
            }
    measured = ("perplexity", "kl", "top1")
    found = worst(rows, [name])[0]
    del found["masks"]
    return {
        "tasks": tasks,
        "worst": found,
        "agreement": {
            str(row["length"]): {key: row[key] for key in measured}
            for row in agreed
            if row["masks"] == name
        },
        "samples": settings.samples,
        "seed": settings.seed,
        "page": settings.page,
        "dense_below": settings.dense_below,
        "version": __version__,
    }


def results(
    settings: Settings, rows: Sequence[Row], agreed: Sequence[Row], losses: Sequence[Row]
) -> Row:
    """All results for a JSON file.

    Args:
        settings: of the evaluation.
        rows: of `score_rows`.
        agreed: of `agreement_rows`.
        losses: of `worst`.

    Returns:
        "rows", "agreement", "worst", and what they were measured with and on.
    """
    chosen = asdict(settings)
    del chosen["text"]
    return {
        "rows": list(rows),
        "agreement": list(agreed),
        "worst": list(losses),
        "settings": chosen,
        "version": __version__,
        "machine": machine(),
    }


def _accuracy(records: Sequence[Mapping[str, Any]]) -> float:
    return sum(record["right"] for record in records) / len(records)


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(record[name] for record in records)


def _by_depth(records: Sequence[Mapping[str, Any]]) -> list[float | None] | None:
    if any(record["depth"] is None for record in records):
        return None
    bins: list[list[Mapping[str, Any]]] = [[] for _ in range(DEPTHS)]
    for record in records:
        bins[min(DEPTHS - 1, int(record["depth"] * DEPTHS))].append(record)
    return [_accuracy(found) if found else None for found in bins]
