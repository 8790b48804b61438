"""How long the maps may be, and how many layers are captured at once, within memory."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.settings import CalibrationConfig
from dam_vllm.calibration.texts import TokenisedTexts, count_full, split
from dam_vllm.masks.file import longest_pcl
from dam_vllm.masks.model_shape import ModelShape

MAP_BYTES = 4
STEP = 64
"""A chosen PCL is a multiple of it where it is not shorter."""
SCRATCH = 2
"""One-layer maps that amplifying and matching a layer need beside the captured ones."""
TEXTS = "the texts' lengths (--data)"
POSITIONS = "the model's max_position_embeddings"
WELL_FILLED = 8
"""Whole windows that the texts must give for a PCL, so that a row's mean is of several texts."""


@dataclass(frozen=True)
class ChosenLength:
    """Attributes: the PCL in tokens, and what bounds it, in words for the user."""

    pcl: int
    reason: str


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device (main memory for "cpu")."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise CalibrationError("free memory is unknown here: give --memory-gib")


def choose_pcl(
    asked: int | None,
    texts: TokenisedTexts,
    windows: int,
    heads: int,
    memory: int,
    further: dict[str, int],
) -> ChosenLength:
    """Chooses the PCL: the longest that full attention can be captured for (paper, Stage 1).

    Args:
        asked: PCL that the user wants, or None for the longest.
        texts: the tokenised texts.
        windows: calibration windows wanted.
        heads: query heads of a layer.
        memory: bytes that the maps may take.
        further: other bounds in tokens, by reason.

    Returns:
        The PCL and why it is not longer.

    Raises:
        CalibrationError: if `asked` is more than the texts, the model or memory allow, or no
            PCL is possible.
    """
    bounds = _bounds(texts, heads, 1, memory) | further
    if asked is not None:
        reason, bound = min(bounds.items(), key=lambda item: item[1])
        if asked > bound:
            raise CalibrationError(f"pcl is {asked}, must be at most {bound} for {reason}")
        return ChosenLength(asked, "as asked")
    bounds[TEXTS] = _by_texts(texts, windows)
    reason, bound = min(bounds.items(), key=lambda item: item[1])
    if bound < 2:
        raise CalibrationError(f"no Pattern Capture Length is possible for {reason}")
    return ChosenLength(bound // STEP * STEP if bound >= STEP else bound, reason)


def check_reach(
    reach: int,
    page: int,
    pcl: int,
    texts: TokenisedTexts,
    heads: int,
    max_length: int | None,
    memory: int,
) -> None:
    """Refuses a reach that maps of pages cannot be captured for.

    Args:
        reach: length in tokens that the maps of pages are to span.
        page: tokens a page.
        pcl: the Pattern Capture Length.
        texts: the tokenised texts, of which one must fill a window.
        heads: query heads of a layer.
        max_length: longest position of the model, if there is a bound.
        memory: bytes that the maps may take.

    Raises:
        CalibrationError: naming the reach, what bounds it and the bound.
    """
    if reach <= pcl:
        raise CalibrationError(f"reach is {reach}, must be more than the PCL ({pcl})")
    bounds = _bounds(texts, heads, page, memory)
    if max_length is not None:
        bounds[POSITIONS] = max_length
    reason, bound = min(bounds.items(), key=lambda item: item[1])
    if reach > bound:
        raise CalibrationError(f"reach is {reach}, must be at most {bound} for {reason}")


def _bounds(texts: TokenisedTexts, heads: int, page: int, memory: int) -> dict[str, int]:
    """Longest maps in tokens that memory and the longest text allow, by reason."""
    cells = int((memory / ((1 + SCRATCH) * heads * MAP_BYTES)) ** 0.5)
    return {
        f"memory ({memory / 2**30:.1f} GiB, see --memory-gib)": cells * page,
        TEXTS: len(texts.prefix) + max(map(len, texts.calibration)),
    }


def layer_passes(layers: list[int], heads: int, size: int, memory: int) -> list[list[int]]:
    """Cuts the layers to capture into passes whose maps of `size` cells a side fit in memory."""
    most = max(1, memory // (heads * size * size * MAP_BYTES) - SCRATCH)
    return [layers[start : start + most] for start in range(0, len(layers), most)]


def check_disk(folder: Path, heads: int, passes: list[tuple[int, list[list[int]]]]) -> None:
    """Refuses to start where the checkpoint would not fit on disk.

    Args:
        folder: where the checkpoint will lie.
        heads: query heads of a layer.
        passes: cells a side of each kind of maps, and the layers of each pass.

    Raises:
        CalibrationError: naming what is needed and what is free.
    """
    cells = sum((sum(map(len, layers)) + len(layers[0])) * size * size for size, layers in passes)
    needed = cells * heads * MAP_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CalibrationError(
            f"--output: the checkpoint needs {needed / 2**30:.1f} GiB, {folder} has "
            f"{free / 2**30:.1f} GiB free; a smaller --pcl or --reach needs less"
        )


def _by_texts(texts: TokenisedTexts, windows: int) -> int:
    """The longest window of which the texts give enough whole ones."""
    prefix, documents = len(texts.prefix), texts.calibration
    wanted = min(windows, WELL_FILLED)
    low, high = prefix + 1, prefix + max(map(len, documents))
    while low < high:
        middle = (low + high + 1) // 2
        if count_full(documents, prefix, middle) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low


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
    """Chooses lengths and the layers of each pass.

    Args:
        config: the settings.
        shape: of the model.
        texts: the tokenised texts.
        memory: bytes that the maps may take.
        folder: where the checkpoint will lie.

    Returns:
        JSON values: "pcl", the "reason" why it is not longer, "passes", the layers whose maps of
        tokens are captured together, and "page_passes" for maps of pages where there is a reach.

    Raises:
        CalibrationError: for a length that the model, the texts, memory or disk do not allow.
    """
    most = longest_pcl(len(shape.layer_types), shape.heads, config.reach)
    bounds = {"what a mask file may hold": most}
    if shape.max_length is not None:
        bounds[POSITIONS] = shape.max_length
    if config.window is not None:
        bounds["the window asked for"] = config.window
    length = choose_pcl(config.pcl, texts, split(config)[0], shape.heads, memory, bounds)
    _check(config, length.pcl, shape)
    layers = full_layers(shape)
    passes = layer_passes(layers, shape.heads, length.pcl, memory)
    kinds = [(length.pcl, passes)]
    chosen = {"pcl": length.pcl, "reason": length.reason, "passes": passes}
    if config.reach is not None:
        page = config.map_page
        check_reach(config.reach, page, length.pcl, texts, shape.heads, shape.max_length, memory)
        page_passes = layer_passes(layers, shape.heads, config.reach // page, memory)
        kinds.append((config.reach // page, page_passes))
        chosen["page_passes"] = page_passes
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
