"""From mean maps to a mask set (paper, Stage 1: amplify, threshold, match)."""

import dataclasses

import numpy as np
import torch

from dam_vllm.calibration.memory import full_layers
from dam_vllm.calibration.settings import CalibrationConfig
from dam_vllm.calibration.static.amplify import Statistics, amplify
from dam_vllm.calibration.static.maps import MeanMaps
from dam_vllm.calibration.static.page_patterns import match_pages
from dam_vllm.calibration.static.patterns import Patterns, match, true_mask
from dam_vllm.masks.density import density
from dam_vllm.masks.mask_set import (
    FloatArray,
    Header,
    HeadMode,
    MaskSet,
    lower_bytes,
    pack_lower,
)
from dam_vllm.masks.model_shape import ModelShape

DENSITY_PAGE = 16
DENSITY_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def map_statistics(maps: MeanMaps, layers: list[int], device: torch.device) -> Statistics:
    """Statistics over all full-attention layers' token maps, which amplification needs.

    Args:
        maps: maps of tokens.
        layers: global indices of the full-attention layers.
        device: where to compute.

    Returns:
        The statistics.
    """
    statistics = Statistics()
    for layer in layers:
        statistics.update(maps.load(layer).to(device))
    return statistics


def layer_patterns(
    mean_map: torch.Tensor,
    counts: np.ndarray,
    statistics: Statistics,
    config: CalibrationConfig,
    tau: float,
    mu: float,
) -> tuple[Patterns, torch.Tensor]:
    """One layer's patterns below the PCL, and its true mask, for some tau and mu.

    Args:
        mean_map: of tokens, float32 [heads, pcl, pcl], on any device.
        counts: int64 [pcl], windows that hold a query at each position.
        statistics: of `map_statistics`.
        config: the other settings.
        tau: threshold of amplified attention.
        mu: lowest share of a kept pattern.

    Returns:
        The kept patterns, bool [heads, pcl] each, and the true mask, bool [heads, pcl, pcl].
    """
    mask = true_mask(amplify(mean_map, counts, statistics, config.amplification), tau)
    return match(mask, mu, config.support(mask.shape[-1])), mask


def layer_patterns_beyond(
    page_map: torch.Tensor,
    counts: np.ndarray,
    pcl: int,
    statistics: Statistics,
    config: CalibrationConfig,
    tau: float,
    mu: float,
) -> Patterns:
    """One layer's patterns from the PCL up to the reach, for some tau and mu.

    Args:
        page_map: float32 [heads, pages, pages], on any device.
        counts: int64 [pages], queries of each page over all windows.
        pcl: Pattern Capture Length of the token maps.
        statistics: of the token maps.
        config: the other settings.
        tau: threshold of amplified attention.
        mu: lowest share of a kept pattern.

    Returns:
        The kept patterns, bool [heads, reach - pcl] each: its first entry is position or
        distance pcl. `near.extended(beyond)` joins them to those of `layer_patterns`.
    """
    page = config.map_page
    # The same share of the map as below the PCL.
    support = max(1, config.support(pcl) * len(counts) // pcl)
    kept = match_pages(
        page_map,
        counts / page,
        page,
        statistics,
        config.amplification,
        tau,
        mu,
        support,
    )
    return Patterns(kept.columns[:, pcl:], kept.diagonals[:, pcl:])


def fit_masks(
    header: Header,
    shape: ModelShape,
    tokens: MeanMaps,
    pages: MeanMaps | None,
    config: CalibrationConfig,
    device: torch.device,
) -> MaskSet:
    """Makes the masks of all full-attention layers, one layer in memory at a time.

    Args:
        header: of the mask set; the statistics are added to its parameters.
        shape: of the model.
        tokens: maps up to the PCL.
        pages: maps of pages up to the header's reach, or None where it is the PCL.
        config: the settings.
        device: where to compute.

    Returns:
        The masks; every KV head is static, and coverage and density are not measured yet.
    """
    layers, heads, pcl = len(shape.layer_types), shape.heads, header.pcl
    full = full_layers(shape)
    statistics = map_statistics(tokens, full, device)
    columns = np.zeros((layers, heads, header.reach or pcl), dtype=bool)
    diagonals = np.zeros_like(columns)
    bits = np.zeros((layers, heads, lower_bytes(pcl)), dtype=np.uint8)
    chosen = (statistics, config, config.tau, config.mu)
    for layer in full:
        patterns, mask = layer_patterns(tokens.load(layer).to(device), tokens.counts, *chosen)
        if pages is not None:
            page_map = pages.load(layer).to(device)
            patterns = patterns.extended(
                layer_patterns_beyond(page_map, pages.counts, pcl, *chosen)
            )
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
    measured = dataclasses.replace(masks, coverage=coverage, coverage_extended=extended)
    return with_densities(measured)


def with_densities(masks: MaskSet) -> MaskSet:
    """Adds density at several lengths."""
    lengths = sorted({masks.pcl, *DENSITY_LENGTHS})
    heads, kv_heads = density(masks, lengths, DENSITY_PAGE)
    return dataclasses.replace(
        masks,
        density_lengths=np.array(lengths, dtype=np.int32),
        density_heads=heads,
        density_kv=kv_heads,
    )
