"""From mean maps to a mask set (paper, Stage 1: amplify, threshold, match)."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from dam_vllm.calibration.amplify import Statistics, amplify
from dam_vllm.calibration.config import CalibrationConfig
from dam_vllm.calibration.match import match, true_mask
from dam_vllm.masks.mask_set import (
    FloatArray,
    Header,
    HeadMode,
    MaskSet,
    lower_bytes,
    pack_lower,
)
from dam_vllm.masks.pages import density
from dam_vllm.masks.shape import ModelShape

DENSITY_PAGE = 16
DENSITY_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def fit_masks(
    header: Header,
    shape: ModelShape,
    load: Callable[[int], torch.Tensor],
    counts: np.ndarray,
    config: CalibrationConfig,
    device: torch.device,
) -> MaskSet:
    """Makes the masks of all full-attention layers, one layer in memory at a time.

    Args:
        header: of the mask set; the statistics are added to its parameters.
        shape: of the model.
        load: gives a layer's mean map, float32 [heads, pcl, pcl].
        counts: int64 [pcl], windows that hold a query at each position.
        config: the settings.
        device: where to compute.

    Returns:
        The masks; every KV head is static, and coverage and density are not measured yet.
    """
    layers, heads, pcl = len(shape.layer_types), shape.heads, header.pcl
    full = [layer for layer, kind in enumerate(shape.layer_types) if kind == "full"]
    statistics = Statistics()
    for layer in full:
        statistics.update(load(layer).to(device))
    columns = np.zeros((layers, heads, pcl), dtype=bool)
    diagonals = np.zeros((layers, heads, pcl), dtype=bool)
    bits = np.zeros((layers, heads, lower_bytes(pcl)), dtype=np.uint8)
    min_support = config.min_support or max(1, pcl // 8)
    for layer in full:
        amplified = amplify(load(layer).to(device), counts, statistics, config.amplification)
        mask = true_mask(amplified, config.tau)
        patterns = match(mask, config.mu, min_support)
        columns[layer] = patterns.columns.cpu().numpy()
        diagonals[layer] = patterns.diagonals.cpu().numpy()
        bits[layer] = pack_lower(mask.cpu().numpy())
    parameters = header.parameters | {"mean_attention": statistics.report()}
    return MaskSet(
        columns=columns,
        diagonals=diagonals,
        true_bits=bits,
        modes=np.full((layers, shape.kv_heads), HeadMode.STATIC, dtype=np.uint8),
        header=header.model_copy(update={"parameters": parameters}),
    )


def with_measures(masks: MaskSet, coverage: FloatArray, extended: FloatArray) -> MaskSet:
    """Adds coverage, float32 [layers, heads] each, and density at several lengths."""
    lengths = sorted({masks.pcl, *DENSITY_LENGTHS})
    heads, kv_heads = density(masks, lengths, DENSITY_PAGE)
    return dataclasses.replace(
        masks,
        coverage=coverage,
        coverage_extended=extended,
        density_lengths=np.array(lengths, dtype=np.int32),
        density_heads=heads,
        density_kv=kv_heads,
    )
