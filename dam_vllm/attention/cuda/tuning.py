"""Block sizes of the Triton kernel.

The table is small on purpose. Three things decide: whether many rows share their keys (prefill) or
few (decoding), whether a head is wider than 128 channels, and whether a program may use the 227 KiB
of shared memory of data-centre GPUs (compute capability 9 and 10) or the 99 KiB of all others.
Within these, an entry is the largest block whose registers do not spill, as the compiler reports
it; `dam-vllm bench tune` measures the neighbours of an entry on a GPU. Looking up a page goes
before loading its keys and takes a stage of its own: with 2 to 4 stages one block is on its way
while another is used, with 5 two are, where memory allows it. Token masks hold positions and three
look-ups in registers, so they take smaller blocks.
"""

import functools
from dataclasses import dataclass

import torch

from dam_vllm.masks.rounding import ceil_div

FEW_ROWS, NARROW_HEAD, MOST_SPLITS = 32, 128, 64
# Blocks of keys that a part of a sequence has at least.
LEAST_PART = 4


@dataclass(frozen=True)
class Tuning:
    """How the kernel cuts its work.

    Attributes:
        block_m: rows a program, at most.
        block_n: keys a step.
        warps: a program.
        stages: of the pipeline that looks up pages and loads keys.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int


# By shared memory (large or not), whether few rows share their keys, whether a head is wide.
TABLE = {
    (True, False, False): Tuning(128, 64, 8, 5),
    (True, False, True): Tuning(128, 32, 8, 5),
    (True, True, False): Tuning(32, 64, 4, 5),
    (True, True, True): Tuning(32, 32, 4, 5),
    (False, False, False): Tuning(128, 64, 8, 2),
    (False, False, True): Tuning(64, 32, 8, 2),
    (False, True, False): Tuning(32, 64, 4, 2),
    (False, True, True): Tuning(32, 32, 4, 2),
}
TOKEN_MASKS = {False: Tuning(64, 32, 8, 2), True: Tuning(32, 32, 4, 2)}
LARGE_MEMORY = (9, 10)
INTERPRETED, INTERPRETED_PROCESSORS = Tuning(32, 32, 4, 1), 4


def tuning(device: torch.device, head_size: int, rows: int, exact: bool) -> Tuning:
    """Block sizes for a launch.

    Args:
        device: a GPU, or the CPU under Triton's interpreter.
        head_size: channels a head.
        rows: rows of the longest query block.
        exact: whether there are token masks.
    """
    if device.type == "cpu":
        return INTERPRETED
    few = rows <= FEW_ROWS
    if exact:
        return TOKEN_MASKS[few]
    large = torch.cuda.get_device_capability(device)[0] in LARGE_MEMORY
    return TABLE[large, few, head_size > NARROW_HEAD]


def split_count(device: torch.device, programs: int, blocks: int) -> int:
    """Parts into which a sequence's keys are split, so that the GPU is full.

    Sparse heads end before dense ones beside them, so twice as many programs are asked for as fill
    the GPU twice.

    Args:
        device: as for `tuning`.
        programs: programs without splitting.
        blocks: of keys in the longest sequence there can be.

    Returns:
        At least 1. It depends on the shapes alone, as a CUDA graph's launches must.
    """
    wanted = ceil_div(4 * processors(device), programs)
    return max(1, min(wanted, blocks // LEAST_PART, MOST_SPLITS))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a few where Triton interprets."""
    if device.type == "cpu":
        return INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
