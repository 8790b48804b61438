"""Block sizes of the Triton kernel, by GPU.

The table is small on purpose: two kinds of work (many rows share their keys, or few do) and two
widths of a head. A block of keys is at most 64 tokens, so that pages of 64 tokens and more need
one look-up a block; registers decide the rest, since a program holds its rows' output, a block of
scores and, in shared memory, `stages` blocks of keys and values.
"""

import functools
from dataclasses import dataclass

import torch

FEW_ROWS, NARROW_HEAD, MOST_SPLITS = 32, 128, 32


@dataclass(frozen=True)
class Tuning:
    """How the kernel cuts its work.

    Attributes:
        block_m: rows a program, at most.
        block_n: keys a step.
        warps: a program.
        stages: blocks of keys in flight.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


# By major compute capability, whether few rows share their keys, whether a head is wide.
TABLE = {
    (8, False, False): Tuning(128, 64, 8, 2),
    (8, False, True): Tuning(64, 32, 4, 2),
    (8, True, False): Tuning(32, 64, 4, 2),
    (8, True, True): Tuning(32, 32, 4, 2),
    (9, False, False): Tuning(128, 64, 8, 3),
    (9, False, True): Tuning(128, 32, 8, 2),
    (9, True, False): Tuning(32, 64, 4, 3),
    (9, True, True): Tuning(32, 32, 4, 3),
}
OTHER, NEWEST = 8, 9
INTERPRETED, INTERPRETED_PROCESSORS = Tuning(32, 32, 4, 1), 6


def tuning(device: torch.device, head_size: int, rows: int) -> Tuning:
    """Block sizes for a launch.

    Args:
        device: a GPU, or the CPU under Triton's interpreter.
        head_size: channels a head.
        rows: rows of the longest tile.

    Returns:
        The table's entry; older GPUs take that of 8.0, newer ones that of 9.0.
    """
    if device.type == "cpu":
        return INTERPRETED
    major = NEWEST if torch.cuda.get_device_capability(device)[0] >= NEWEST else OTHER
    return TABLE[major, rows <= FEW_ROWS, head_size > NARROW_HEAD]


def split_count(device: torch.device, programs: int, keys: int, block_n: int) -> int:
    """Parts into which each sequence's keys are split, so that the GPU is full.

    Args:
        device: as for `tuning`.
        programs: programs without splitting.
        keys: longest sequence in tokens.
        block_n: keys a step; a part has at least four.

    Returns:
        At least 1. It depends on the shapes alone, as a CUDA graph's launches must.
    """
    wanted = 2 * _processors(device) // programs
    return max(1, min(wanted, keys // (4 * block_n), MOST_SPLITS))


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
