"""Calibration from end to end, resumable (paper, Stage 1)."""

import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dam_vllm.calibration.capture import observe_forward
from dam_vllm.calibration.checkpoint import Checkpoint
from dam_vllm.calibration.errors import CalibrationError, CalibrationStopped
from dam_vllm.calibration.fit.candidates import Pattern
from dam_vllm.calibration.fit.inputs import FitInputs, Prompt, fit_cost, fit_prompts
from dam_vllm.calibration.fit.run import fit_modes
from dam_vllm.calibration.fit.store import FitStore
from dam_vllm.calibration.lock import alone_in
from dam_vllm.calibration.memory import choose_lengths, full_layers, map_memory
from dam_vllm.calibration.model import ModelSource
from dam_vllm.calibration.progress import Reporter, Work, cost
from dam_vllm.calibration.settings import CalibrationConfig, for_platform
from dam_vllm.calibration.static.build import fit_masks, with_measures
from dam_vllm.calibration.static.coverage import Coverage
from dam_vllm.calibration.static.passes import MapPlan, capture_maps
from dam_vllm.calibration.texts import (
    Batch,
    TokenisedTexts,
    Windows,
    batches,
    cut,
    make_windows,
    pad,
    read_documents,
    tokenise,
)
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.masks.mask_set import Header, MaskSet
from dam_vllm.masks.model_shape import ModelShape

DOCUMENTS_PER_WINDOW = 4
MASKS = "masks.safetensors"


@dataclass(frozen=True)
class Job:
    """What to calibrate.

    Attributes:
        source: the model.
        data: where the texts come from (`texts.read_documents`).
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


def calibrate(job: Job, reporter: Reporter | None = None) -> MaskSet:
    """Makes a mask file; goes on where an interrupted run of the same job stopped.

    Args:
        job: what to calibrate.
        reporter: hears progress and may stop the run.

    Returns:
        The masks that were written.

    Raises:
        CalibrationError: for an input that cannot be honoured, and while another process
            calibrates into the same file.
        FingerprintError: if the model's identity cannot be read.
        CalibrationStopped: if the reporter stopped it; the checkpoint holds its state.
        OSError: if something cannot be written; what was done until then is in the checkpoint.
    """
    with alone_in(job.checkpoint):
        return _Run(job, reporter or Reporter()).run()


class _Run:
    def __init__(self, job: Job, reporter: Reporter) -> None:
        self.job = job
        self.config = for_platform(job.config, job.source.device.type)
        self.reporter = reporter

    def run(self) -> MaskSet:
        shape = self.job.source.shape()
        identity = fingerprint(self.job.source.name, self.job.source.revision)
        texts = self._texts()
        checkpoint = Checkpoint(self.job.checkpoint, self._settings(texts, identity.model_dump()))
        chosen = checkpoint.chosen
        if chosen is None:
            memory = map_memory(self.job.memory_gib, self.job.source.device)
            chosen = choose_lengths(self.config, shape, texts, memory, self.job.output.parent)
            # What was free then bounds a run that goes on too: other passes round otherwise.
            chosen["memory"] = memory
            checkpoint.choose(chosen)
        pcl, reach, layers = chosen["pcl"], self.config.reach, full_layers(shape)
        windows = make_windows(texts, self.config, pcl)
        self.reporter.say(
            f"PCL {pcl} tokens ({chosen['reason']}); {windows.report()}; {len(layers)} layers in "
            f"{len(chosen['passes'])} pass(es) within {chosen['memory'] / 2**30:.2f} GiB"
        )
        plans = self._plans(windows, chosen, shape.heads)
        measured = batches(windows.held_out, self.config.batch_size)
        prompts = self._fit_prompts(texts, shape)
        total = sum(plan.cost for plan in plans) + cost(measured, layers)
        if self.config.fit is not None:
            total += fit_cost(prompts, shape, self.config.fit)
        work = Work(self.reporter, total)
        model, device = self.job.source.load(), self.job.source.device
        maps = [capture_maps(model, plan, checkpoint, device, work) for plan in plans]
        header = Header(
            kind="calibrated",
            model=self.job.source.name,
            fingerprint=identity,
            layer_types=shape.layer_types,
            pcl=pcl,
            reach=reach,
            parameters=self._parameters(pcl, windows),
        )
        build = partial(fit_masks, header, shape, maps[0], maps[1] if reach else None)
        if self.config.fit is None:
            masks = build(self.config, device)
        else:
            masks = self._fit(model, shape, prompts, build, checkpoint, chosen["memory"], work)
        coverage = self._measure(model, measured, masks, layers, work)
        work.end()
        masks = with_measures(masks, *coverage.result())
        whole = checkpoint.folder / MASKS
        save_mask_set(masks, whole)
        os.replace(whole, self.job.output)
        checkpoint.remove()
        return masks

    def _fit_prompts(self, texts: TokenisedTexts, shape: ModelShape) -> list[Prompt]:
        """Texts of the fit; none without one."""
        fit = self.config.fit
        if fit is None:
            return []
        if shape.max_length is not None and max(fit.lengths) > shape.max_length:
            raise CalibrationError(
                f"fit.lengths holds {max(fit.lengths)}, must be at most the model's "
                f"{shape.max_length} positions"
            )
        channels = max(fit.channels or [1])
        if shape.head_size is not None and channels > shape.head_size:
            raise CalibrationError(
                f"fit.channels holds {channels}, must be at most the model's "
                f"{shape.head_size} channels a head"
            )
        plain = cut(texts.held_out, texts.prefix, max(fit.lengths), fit.plain)
        return fit_prompts(self.job.source.tokenizer(), fit, plain)

    def _fit(
        self,
        model: Any,
        shape: ModelShape,
        prompts: list[Prompt],
        build: Callable[[CalibrationConfig, torch.device], MaskSet],
        checkpoint: Checkpoint,
        memory: int,
        work: Work,
    ) -> MaskSet:
        """Chooses every KV head's mode among static patterns, budgets and dense."""
        config = self.config.fit
        assert config is not None
        # Nothing reaches an infinite threshold: the bare pattern.
        grid = [(math.inf, 1.0), *itertools.product(config.taus, config.mus)]
        patterns = [
            Pattern(
                f"tau {tau:g} mu {mu:g}" if math.isfinite(tau) else "nothing",
                partial(
                    build,
                    self.config.model_copy(update={"tau": tau, "mu": mu}),
                    self.job.source.device,
                ),
            )
            for tau, mu in grid
        ]
        store = FitStore(checkpoint.folder)
        inputs = FitInputs(model, shape, config, patterns, store, work, memory)
        return fit_modes(inputs, prompts)

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

    def _plans(self, windows: Windows, chosen: dict[str, Any], heads: int) -> list[MapPlan]:
        """What to capture: token maps, and maps of pages where there is a reach."""
        size, pcl, reach = self.config.batch_size, chosen["pcl"], self.config.reach
        epsilon = self.config.amplification.epsilon
        plans = [
            MapPlan(
                "tokens", batches(windows.short, size), chosen["passes"], heads, pcl, 1, epsilon
            )
        ]
        if reach is not None:
            page = self.config.map_page
            # About as many tokens a pass as the token maps' batches have.
            long = batches(windows.long, max(1, size * pcl // reach))
            passes = chosen["page_passes"]
            plans.append(MapPlan("pages", long, passes, heads, reach // page, page, epsilon))
        return plans

    def _measure(
        self,
        model: torch.nn.Module,
        measured: list[Batch],
        masks: MaskSet,
        layers: list[int],
        work: Work,
    ) -> Coverage:
        """Measures coverage on held-out windows; short enough to be done anew when stopped."""
        coverage = Coverage(masks)
        for batch in measured:
            ids, lengths = pad(batch)
            coverage.start_batch(lengths)
            device = self.job.source.device
            observe_forward(model, ids.to(device), layers, coverage.observe)
            if work.advance(batch, layers):
                raise CalibrationStopped
        return coverage

    def _parameters(self, pcl: int, windows: Windows) -> dict[str, Any]:
        # A fit reports its own settings with what came of them.
        return self.config.model_dump(mode="json", by_alias=True, exclude={"fit"}) | {
            "pcl": pcl,
            "min_support": self.config.support(pcl),
            "window": self.config.window or pcl,
            "data": self.job.data,
            "calibration_windows": len(windows.short),
            "calibration_tokens": sum(map(len, windows.short)),
            "long_windows": [len(window) for window in windows.long],
            "held_out_windows": len(windows.held_out),
            "held_out_tokens": sum(map(len, windows.held_out)),
            "device": self.job.source.device.type,
            "dtype": self.job.source.dtype,
            "versions": _versions(),
        }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("dam-vllm", "torch", "transformers")}
