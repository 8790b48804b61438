"""What a calibration captures: the PCL, the reach, and the layers of each pass over the texts."""

from pathlib import Path
from typing import Any

import torch

from dam_vllm.calibration.budget import (
    check_disk,
    check_reach,
    choose_pcl,
    free_bytes,
    layer_groups,
)
from dam_vllm.calibration.config import CalibrationConfig
from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.windows import TokenisedTexts, split
from dam_vllm.masks.shape import ModelShape

MEMORY_SHARE = 0.5


def full_layers(shape: ModelShape) -> list[int]:
    """Global indices of the layers to calibrate."""
    return [index for index, kind in enumerate(shape.layer_types) if kind == "full"]


def map_memory(memory_gib: float | None, device: torch.device) -> int:
    """Bytes that maps may take: what the user gives, or half of what is free."""
    if memory_gib is None:
        return int(free_bytes(device) * MEMORY_SHARE)
    return int(memory_gib * 2**30)


def choose_lengths(
    config: CalibrationConfig,
    shape: ModelShape,
    texts: TokenisedTexts,
    memory: int,
    folder: Path,
) -> dict[str, Any]:
    """Chooses lengths and groups of layers.

    Args:
        config: the settings.
        shape: of the model.
        texts: the tokenised texts.
        memory: bytes that the maps may take.
        folder: where the checkpoint will lie.

    Returns:
        JSON values: "pcl", the "reason" why it is not longer, "groups" of layers whose maps of
        tokens are captured together, and "page_groups" for maps of pages where there is a reach.

    Raises:
        CalibrationError: for a length that the model, the texts, memory or disk do not allow.
    """
    bounds = [value for value in (shape.max_length, config.window) if value is not None]
    length = choose_pcl(
        config.pcl, texts, split(config)[0], shape.heads, min(bounds, default=None), memory
    )
    _check(config, length.pcl, shape)
    layers = full_layers(shape)
    groups = layer_groups(layers, shape.heads, length.pcl, memory)
    kinds = [(length.pcl, groups)]
    chosen = {"pcl": length.pcl, "reason": length.reason, "groups": groups}
    if config.reach is not None:
        page = config.map_page
        check_reach(config.reach, page, length.pcl, texts, shape.heads, shape.max_length, memory)
        page_groups = layer_groups(layers, shape.heads, config.reach // page, memory)
        kinds.append((config.reach // page, page_groups))
        chosen["page_groups"] = page_groups
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder, shape.heads, kinds)
    return chosen


def _check(config: CalibrationConfig, pcl: int, shape: ModelShape) -> None:
    """Refuses settings that the model or the PCL do not allow."""
    window = config.window
    if shape.max_length is not None and window is not None and window > shape.max_length:
        raise CalibrationError(
            f"window is {window}, must be at most the model's {shape.max_length} positions"
        )
    if config.min_support is not None and config.min_support > pcl:
        raise CalibrationError(
            f"min_support is {config.min_support}, must be at most the PCL ({pcl})"
        )
