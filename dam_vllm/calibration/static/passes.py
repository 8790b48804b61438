"""Captures mean maps, of tokens or of pages, some layers a pass, resumable."""

import time
from dataclasses import dataclass
from functools import partial

import torch

from dam_vllm.calibration.capture import observe_forward
from dam_vllm.calibration.checkpoint import Checkpoint, MapKind
from dam_vllm.calibration.errors import CalibrationStopped
from dam_vllm.calibration.progress import Work, cost
from dam_vllm.calibration.static.maps import MapSums, MeanMaps, pair_counts
from dam_vllm.calibration.texts import Batch, pad

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class MapPlan:
    """What one kind of maps is captured from.

    Attributes:
        kind: which maps.
        batches: windows, batch by batch.
        passes: the layers that each pass captures, by global index.
        heads: query heads of a layer.
        size: cells a side of a map.
        page: tokens a cell.
        epsilon: added to the counts.
    """

    kind: MapKind
    batches: list[Batch]
    passes: list[list[int]]
    heads: int
    size: int
    page: int
    epsilon: float

    def maps(self, checkpoint: Checkpoint) -> MeanMaps:
        """The maps, once they are captured, as the checkpoint holds them."""
        lengths = [len(window) for batch in self.batches for window in batch]
        counts = pair_counts(lengths, self.size, self.page)
        return MeanMaps(partial(checkpoint.load_layer, self.kind), counts, self.page)

    @property
    def cost(self) -> int:
        """Tokens times layers that all passes run."""
        return sum(cost(self.batches, layers) for layers in self.passes)


def capture_maps(
    model: torch.nn.Module, plan: MapPlan, checkpoint: Checkpoint, device: torch.device, work: Work
) -> MeanMaps:
    """Captures one kind of maps of all layers into the checkpoint.

    Args:
        model: loaded for capture, on `device`.
        plan: what to capture.
        checkpoint: holds what an earlier run did, and takes the maps.
        device: where the model runs and the sums are held.
        work: counts the batches.

    Returns:
        The maps.

    Raises:
        CalibrationStopped: if the caller stopped it; the checkpoint holds its state.
    """
    maps = plan.maps(checkpoint)
    for layers in plan.passes:
        if all(checkpoint.has_layer(plan.kind, layer) for layer in layers):
            work.skip(plan.batches, layers)
            continue
        sums, done = _resume(plan, layers, checkpoint, device)
        work.skip(plan.batches[:done], layers)
        saved = time.monotonic()
        for index, batch in enumerate(plan.batches[done:], start=done + 1):
            ids, lengths = pad(batch)
            sums.start_batch(lengths)
            observe_forward(model, ids.to(device), layers, sums.observe)
            stop = work.advance(batch, layers)
            if stop or time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint.save_pass(plan.kind, sums, index)
                saved = time.monotonic()
            if stop:
                raise CalibrationStopped
        for layer in layers:
            checkpoint.save_layer(plan.kind, layer, sums.mean(layer, maps.counts, plan.epsilon))
    return maps


def _resume(
    plan: MapPlan, layers: list[int], checkpoint: Checkpoint, device: torch.device
) -> tuple[MapSums, int]:
    """The sums of the pass in work and the batches they hold."""
    stored = checkpoint.load_pass(plan.kind, layers)
    if stored is not None:
        return MapSums(layers, stored[0].to(device), plan.page), stored[1]
    sums = torch.zeros(len(layers), plan.heads, plan.size, plan.size, device=device)
    return MapSums(layers, sums, plan.page), 0
