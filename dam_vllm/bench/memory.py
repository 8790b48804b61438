"""KV memory: vLLM's own capacity, pages held, and requests a second, dense against DAM."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from dam_vllm.bench.model import Model, write_model
from dam_vllm.bench.on_vllm.memory_run import RESULT
from dam_vllm.bench.report import Row
from dam_vllm.bench.timing import Advance
from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.server import ServerError, failure

TARGETS = (
    "target: capacity ratio >= 1.4 with half of the heads bounded; rates are requests a second "
    "over those of the stock backend, and of dam with kv_free off"
)
SHAPE = Model(layers=16, hidden=128, intermediate=256, heads=4, kv_heads=4, head_size=32)
LIMITS, BOUNDED = (32768, 131072), (0.25, 0.5, 0.75, 1.0)
PAGE, CHUNK, SINKS, WINDOW = 128, 1024, 4, 512
WATCHED = 16384
DEMO_LIMIT, DEMO_PAGE = 8192, 32
ROOM = 2.2
# Throughput in a cache of fixed size.
REQUESTS, TOKENS, NEW, BUSY_LENGTH, BUSY_ROOM = 8, 4096, 384, 4608, 1.2
BUSY_BOUNDED = (0.5, 0.75)


@dataclass(frozen=True)
class Case:
    """A model, its masks and vLLM's limits.

    Attributes:
        name: for the table.
        model: folder.
        masks: mask file.
        bounded: share of KV heads that are bounded.
        length: longest request in tokens.
        page: tokens a page.
        page_bytes: bytes of a page of all layers.
        dummy: whether the weights are random.
    """

    name: str
    model: Path
    masks: Path
    bounded: float
    length: int
    page: int
    page_bytes: int
    dummy: bool

    def run(
        self, dam: Mapping[str, Any] | None, room: float = ROOM, **setup: int
    ) -> dict[str, Any]:
        """Starts an engine.

        Args:
            dam: `dam` options beside the masks, or None for the stock backend.
            room: requests of the model's length that fit into the cache with all pages kept.
            setup: further parts of `dam_vllm.bench.on_vllm.memory_run.measure`'s setup.

        Returns:
            What `measure` found.

        Raises:
            ServerError: if the engine failed.
        """
        arguments: dict[str, Any] = {
            "model": str(self.model),
            "load_format": "dummy" if self.dummy else "auto",
            "dtype": "bfloat16",
            "block_size": self.page,
            "max_model_len": self.length,
            "max_num_batched_tokens": CHUNK,
            "kv_cache_memory_bytes": int(room * ceil_div(self.length, self.page) * self.page_bytes),
            "enable_prefix_caching": False,
            "enforce_eager": True,
        }
        if dam is not None:
            config = {"dam": {"masks": str(self.masks), **dam}}
            arguments |= {"attention_backend": "dam", "additional_config": config}
        whole = {"arguments": arguments, "prompt": 0, "requests": 0, **setup}
        done = subprocess.run(
            [sys.executable, "-m", "dam_vllm.bench.on_vllm.memory_run", json.dumps(whole)],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ServerError(failure("vLLM ended", done.stdout + done.stderr))
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
        found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
        return found


def total(demo_masks: Path | None) -> int:
    """Engines that `measure` starts."""
    throughput = 1 + 2 * len(BUSY_BOUNDED)
    return len(LIMITS) * (1 + len(BOUNDED)) + throughput + (0 if demo_masks is None else 2)


def measure(demo_masks: Path | None, plot: Path | None, advance: Advance) -> list[Row]:
    """Measures capacity and pages held, then requests a second.

    Args:
        demo_masks: mask file for the demo model, or None to leave it out.
        plot: image of the pages held against tokens, or None.
        advance: called after each engine.

    Returns:
        A row a case; those of throughput last.
    """
    rows: list[Row] = []
    curves: dict[str, list[list[int]]] = {}
    with TemporaryDirectory(prefix="dam-bench-") as folder:
        for cases in _cases(Path(folder), demo_masks):
            rows += _compare(cases, curves, advance)
        rows += _throughput(Path(folder), advance)
    if plot is not None:
        plot_held(curves, plot)
    return rows


def bounded_masks(masks: MaskSet, share: float) -> MaskSet:
    """Masks of which a share of KV heads, drawn at random over layers, is bounded."""
    modes = np.full(masks.modes.size, HeadMode.DENSE, dtype=np.uint8)
    count = round(share * masks.modes.size)
    modes[np.random.default_rng(0).permutation(masks.modes.size)[:count]] = HeadMode.STATIC
    return replace(masks, modes=modes.reshape(masks.modes.shape))


def _cases(folder: Path, demo_masks: Path | None) -> list[list[Case]]:
    """Cases that share a dense peer."""
    result = []
    if demo_masks is not None:
        masks = load_mask_set(demo_masks)
        bounded = float((masks.modes == HeadMode.STATIC).mean())
        bytes_ = masks.layers * masks.kv_heads * DEMO_PAGE * 2 * 32 * 2
        demo = Case(
            "demo model", model_dir(), demo_masks, bounded, DEMO_LIMIT, DEMO_PAGE, bytes_, False
        )
        result.append([demo])
    return result + [[_case(folder, limit, share) for share in BOUNDED] for limit in LIMITS]


def _case(folder: Path, length: int, share: float) -> Case:
    model = write_model(folder / str(length), SHAPE, length)
    file = folder / f"{length}-{share}.safetensors"
    save_mask_set(bounded_masks(streaming(str(model), SINKS, WINDOW), share), file)
    page_bytes = SHAPE.layers * SHAPE.kv_heads * PAGE * 2 * SHAPE.head_size * 2
    return Case(f"{SHAPE.layers} layers", model, file, share, length, PAGE, page_bytes, True)


def _compare(
    cases: Sequence[Case], curves: dict[str, list[list[int]]], advance: Advance
) -> list[Row]:
    """Rows of cases that differ in their masks alone."""
    first = cases[0]
    prompt = min(WATCHED, first.length - 64) if first.length != LIMITS[-1] else 0
    dense = first.run(None, prompt=prompt)
    advance()
    if prompt:
        curves[f"{first.name}, dense"] = dense["held"]
    rows = []
    for case in cases:
        found = case.run({}, prompt=prompt)
        advance()
        row = _capacity(case, case.name, dense["capacity"], found["capacity"])
        if prompt:
            curves[f"{case.name}, {case.bounded:.0%} of heads bounded"] = found["held"]
            row |= {"watched_tokens": prompt, "peak_mib_dense": _peak(dense)}
            row |= {"peak_mib_dam": _peak(found), "peak_ratio": _peak(dense) / _peak(found)}
        rows.append(row)
    return rows


def _peak(found: Mapping[str, Any]) -> float:
    return float(max(held for _, held in found["held"]) / 2**20)


def _throughput(folder: Path, advance: Advance) -> list[Row]:
    """Requests a second in a cache that holds one dense request and little more."""

    def rate(case: Case, options: Mapping[str, Any] | None) -> tuple[float, float]:
        found = case.run(options, BUSY_ROOM, requests=REQUESTS, tokens=TOKENS, new=NEW)
        advance()
        return REQUESTS / found["seconds"], found["capacity"]

    cases = [_case(folder, BUSY_LENGTH, share) for share in BUSY_BOUNDED]
    dense, dense_capacity = rate(cases[0], None)
    rows: list[Row] = []
    for case in cases:
        kept, _ = rate(case, {"dense_below": 0, "kv_free": "off"})
        dam, capacity = rate(case, {"dense_below": 0})
        rows.append(
            _capacity(case, f"{REQUESTS} requests at once", dense_capacity, capacity)
            | {"rate_over_dense": dam / dense, "rate_over_kept": dam / kept}
        )
    return rows


def _capacity(case: Case, name: str, dense: float, dam: float) -> Row:
    return {
        "bench": "memory",
        "case": name,
        "bounded": case.bounded,
        "max_model_len": case.length,
        "capacity_dense": dense,
        "capacity_dam": dam,
        "capacity_ratio": dam / dense,
    }


def plot_held(curves: Mapping[str, Sequence[Sequence[int]]], path: Path) -> None:
    """Draws the memory that one request's pages take against its tokens.

    Args:
        curves: by label, pairs of tokens and bytes.
        path: image file; its suffix chooses the format.

    Raises:
        ValueError: for a suffix that matplotlib cannot write.
    """
    from matplotlib.figure import Figure

    models = sorted({label.split(",")[0] for label in curves})
    figure = Figure((6 * len(models), 4), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)
    for model, area in zip(models, axes[0], strict=True):
        for label, points in curves.items():
            if label.startswith(f"{model}, "):
                held = [bytes_ / 2**20 for _, bytes_ in points]
                area.plot([tokens for tokens, _ in points], held, label=label.split(", ")[1])
        area.set_title(model)
        area.set_xlabel("tokens of the request")
        area.set_ylabel("pages held (MiB)")
        area.grid(linewidth=0.3)
        area.legend()
    figure.savefig(path, dpi=110)
