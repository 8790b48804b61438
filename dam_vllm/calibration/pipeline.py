"""Calibration from end to end, resumable (paper, Stage 1)."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dam_vllm.calibration.budget import check_disk, choose_pcl, free_bytes, layer_groups
from dam_vllm.calibration.capture import observe_forward
from dam_vllm.calibration.checkpoint import Checkpoint
from dam_vllm.calibration.config import CalibrationConfig
from dam_vllm.calibration.corpus import read_documents
from dam_vllm.calibration.coverage import Coverage
from dam_vllm.calibration.errors import CalibrationError, CalibrationStopped
from dam_vllm.calibration.fit import fit_masks, with_measures
from dam_vllm.calibration.mean_maps import MapSums, MeanMaps, pair_counts
from dam_vllm.calibration.model import ModelSource
from dam_vllm.calibration.windows import TokenisedTexts, cut, pad, tokenise
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.masks.mask_set import Header, MaskSet
from dam_vllm.masks.shape import ModelShape

CHECKPOINT_SECONDS = 60.0
DOCUMENTS_PER_WINDOW = 4
MEMORY_SHARE = 0.5


@dataclass(frozen=True)
class Job:
    """What to calibrate.

    Attributes:
        source: the model.
        data: where the texts come from (`corpus.read_documents`).
        field: key of the text in JSONL lines and data set rows.
        config: the settings.
        output: mask file to write.
        memory_gib: memory that the maps may take, or None for half of what is free.
    """

    source: ModelSource
    data: str
    field: str
    config: CalibrationConfig
    output: Path
    memory_gib: float | None = None

    @property
    def checkpoint(self) -> Path:
        """Folder of the unfinished calibration."""
        return self.output.with_name(self.output.name + ".partial")


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


def calibrate(job: Job, reporter: Reporter | None = None) -> MaskSet:
    """Makes a mask file; goes on where an interrupted run of the same job stopped.

    Args:
        job: what to calibrate.
        reporter: hears progress and may stop the run.

    Returns:
        The masks that were written.

    Raises:
        CalibrationError: for an input that cannot be honoured.
        FingerprintError: if the model's identity cannot be read.
        CalibrationStopped: if the reporter stopped it; the checkpoint holds its state.
    """
    return _Run(job, reporter or Reporter()).run()


class _Run:
    def __init__(self, job: Job, reporter: Reporter) -> None:
        self.job = job
        self.config = job.config
        self.reporter = reporter
        self.work = 0
        self.total = 0

    def run(self) -> MaskSet:
        shape = self.job.source.shape()
        identity = fingerprint(self.job.source.name, self.job.source.revision)
        texts = self._texts()
        checkpoint = Checkpoint(self.job.checkpoint, self._settings(texts, identity.model_dump()))
        chosen = checkpoint.chosen or self._choose(checkpoint, shape, texts)
        self.layers = [layer for group in chosen["groups"] for layer in group]
        windows, held_out = self._windows(texts, chosen["pcl"])
        self.reporter.say(
            f"PCL {chosen['pcl']} tokens ({chosen['reason']}); {len(windows)} windows to "
            f"calibrate on, {len(held_out)} held out; {len(self.layers)} layers in "
            f"{len(chosen['groups'])} group(s)"
        )
        batches, measured = self._batches(windows), self._batches(held_out)
        self.total = sum(self._cost(batches, group) for group in chosen["groups"])
        self.total += self._cost(measured, self.layers)
        model = self.job.source.load()
        counts = pair_counts([len(window) for window in windows], chosen["pcl"])
        for group in chosen["groups"]:
            self._capture(model, group, batches, counts, checkpoint)
        header = Header(
            kind="calibrated",
            model=self.job.source.name,
            fingerprint=identity,
            layer_types=shape.layer_types,
            pcl=chosen["pcl"],
            parameters=self._parameters(chosen["pcl"], windows, held_out),
        )
        tokens = MeanMaps(checkpoint.load_layer, counts)
        masks = fit_masks(header, shape, tokens, None, self.config, self.job.source.device)
        coverage = self._measure(model, measured, masks)
        masks = with_measures(masks, *coverage.result())
        save_mask_set(masks, self.job.output)
        checkpoint.remove()
        return masks

    def _texts(self) -> TokenisedTexts:
        documents = read_documents(
            self.job.data, self.job.field, self.config.texts * DOCUMENTS_PER_WINDOW
        )
        texts = tokenise(
            documents, self.job.source.tokenizer(), self.config.held_out, self.config.seed
        )
        if not any(texts.calibration):
            raise CalibrationError(f"--data {self.job.data!r} holds too little text to calibrate")
        return texts

    def _settings(self, texts: TokenisedTexts, identity: dict[str, Any]) -> dict[str, Any]:
        source = self.job.source
        return {
            "config": self.config.model_dump(mode="json"),
            "fingerprint": identity,
            "texts": texts.digest(),
            "device": str(source.device),
            "dtype": source.dtype,
            "memory_gib": self.job.memory_gib,
            "versions": _versions(),
        }

    def _choose(
        self, checkpoint: Checkpoint, shape: ModelShape, texts: TokenisedTexts
    ) -> dict[str, Any]:
        if self.job.memory_gib is None:
            memory = int(free_bytes(self.job.source.device) * MEMORY_SHARE)
        else:
            memory = int(self.job.memory_gib * 2**30)
        bounds = [value for value in (shape.max_length, self.config.window) if value is not None]
        length = choose_pcl(
            self.config.pcl, texts, self._split()[0], shape.heads, min(bounds, default=None), memory
        )
        window = self.config.window
        if shape.max_length is not None and window is not None and window > shape.max_length:
            raise CalibrationError(
                f"window is {window}, must be at most the model's {shape.max_length} positions"
            )
        if self.config.min_support is not None and self.config.min_support > length.pcl:
            raise CalibrationError(
                f"min_support is {self.config.min_support}, must be at most the PCL ({length.pcl})"
            )
        layers = [index for index, kind in enumerate(shape.layer_types) if kind == "full"]
        groups = layer_groups(layers, shape.heads, length.pcl, memory)
        self.job.output.parent.mkdir(parents=True, exist_ok=True)
        check_disk(self.job.output.parent, len(layers), len(groups[0]), shape.heads, length.pcl)
        checkpoint.choose({"pcl": length.pcl, "reason": length.reason, "groups": groups})
        assert checkpoint.chosen is not None
        return checkpoint.chosen

    def _split(self) -> tuple[int, int]:
        """Largest numbers of calibration and held-out windows."""
        share = self.config.held_out
        held_out = max(1, round(self.config.texts * share)) if share else 0
        return self.config.texts - held_out, held_out

    def _windows(self, texts: TokenisedTexts, pcl: int) -> tuple[list[list[int]], list[list[int]]]:
        calibration, held_out = self._split()
        window = self.config.window or pcl
        return (
            cut(texts.calibration, texts.prefix, pcl, calibration),
            cut(texts.held_out, texts.prefix, window, held_out),
        )

    def _batches(self, windows: list[list[int]]) -> list[list[list[int]]]:
        size = self.config.batch_size
        return [windows[start : start + size] for start in range(0, len(windows), size)]

    @staticmethod
    def _cost(batches: list[list[list[int]]], layers: list[int]) -> int:
        """Tokens times layers run; the pass ends at the last layer observed."""
        return sum(len(batch) * len(batch[0]) for batch in batches) * (layers[-1] + 1)

    def _advance(self, batch: list[list[int]], layers: list[int]) -> None:
        self.work += self._cost([batch], layers)
        self.reporter.progress(self.work, self.total)

    def _capture(
        self,
        model: torch.nn.Module,
        group: list[int],
        batches: list[list[list[int]]],
        counts: Any,
        checkpoint: Checkpoint,
    ) -> None:
        """Captures the mean maps of a group of layers and stores them."""
        if all(checkpoint.has_layer(layer) for layer in group):
            self.work += self._cost(batches, group)
            return
        sums, done = self._resume(group, len(counts), checkpoint)
        self.work += self._cost(batches[:done], group)
        saved = time.monotonic()
        for index, batch in enumerate(batches[done:], start=done + 1):
            ids, lengths = pad(batch)
            sums.start_batch(lengths)
            observe_forward(model, ids.to(self.job.source.device), group, sums.observe)
            self._advance(batch, group)
            stop = self.reporter.stop()
            if stop or time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint.save_group(sums, index)
                saved = time.monotonic()
            if stop:
                raise CalibrationStopped
        for layer in group:
            mean = sums.mean(layer, counts, self.config.amplification.epsilon)
            checkpoint.save_layer(layer, mean)

    def _resume(self, group: list[int], pcl: int, checkpoint: Checkpoint) -> tuple[MapSums, int]:
        device = self.job.source.device
        stored = checkpoint.load_group(group)
        if stored is not None:
            return MapSums(group, stored[0].to(device)), stored[1]
        heads = self.job.source.shape().heads
        return MapSums(group, torch.zeros(len(group), heads, pcl, pcl, device=device)), 0

    def _measure(
        self, model: torch.nn.Module, batches: list[list[list[int]]], masks: MaskSet
    ) -> Coverage:
        """Measures coverage on held-out windows; short enough to be done anew when stopped."""
        coverage = Coverage(masks)
        for batch in batches:
            ids, lengths = pad(batch)
            coverage.start_batch(lengths)
            device = self.job.source.device
            observe_forward(model, ids.to(device), self.layers, coverage.observe)
            self._advance(batch, self.layers)
            if self.reporter.stop():
                raise CalibrationStopped
        return coverage

    def _parameters(
        self, pcl: int, windows: list[list[int]], held_out: list[list[int]]
    ) -> dict[str, Any]:
        return self.config.model_dump(mode="json", by_alias=True) | {
            "pcl": pcl,
            "min_support": self.config.support(pcl),
            "window": self.config.window or pcl,
            "data": self.job.data,
            "calibration_windows": len(windows),
            "calibration_tokens": sum(map(len, windows)),
            "held_out_windows": len(held_out),
            "held_out_tokens": sum(map(len, held_out)),
            "device": self.job.source.device.type,
            "dtype": self.job.source.dtype,
            "versions": _versions(),
        }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("dam-vllm", "torch", "transformers")}
