"""What choosing pages and tails cost: measured tables by platform and head size."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measured:
    """Shares of the dense attention that a dynamic head replaces.

    Attributes:
        channels: channels that scored.
        choosing: scoring and choice.
        rotation: of queries and keys.
    """

    channels: int
    choosing: float
    rotation: float


MEASURED: dict[str, dict[int, Measured]] = {
    # By head size. `dam-vllm bench scoring --channels 16`, 16k tokens, page 32, the mean of top-k
    # and top-p: docs/benchmarks.md.
    "cpu": {
        32: Measured(16, 0.129, 0.010),
        64: Measured(16, 0.073, 0.016),
        128: Measured(16, 0.039, 0.026),
    },
    # One H200, bf16, chunks of 4096 tokens, 32k tokens, top-k; at 128k .47 and .02.
    "cuda": {128: Measured(32, 0.50, 0.09)},
}


def choosing_costs(platform: str, head_size: int, channels: np.ndarray) -> np.ndarray:
    """What a dynamic head pays to choose, in units of its dense attention.

    Scoring grows with the channels; between head sizes, what it takes over its share of the
    products is interpolated, and beyond them the nearest one counts.

    Args:
        platform: kind of device, "cpu" or "cuda".
        head_size: channels of a head.
        channels: int [n], channels that score; 0 for heads that choose nothing.

    Returns:
        float64 [n].
    """
    table = sorted(MEASURED[platform].items())
    sizes = np.log2([size for size, _ in table])
    factors = [each.choosing * 2 * size / each.channels for size, each in table]
    rotations = [each.rotation for _, each in table]
    factor, rotation = (np.interp(np.log2(head_size), sizes, part) for part in (factors, rotations))
    return np.where(channels > 0, channels / (2 * head_size) * factor + rotation, 0.0)


@dataclass(frozen=True)
class MeasuredTail:
    """Shares of the dense attention that a head with a tail replaces.

    Attributes:
        sums: of weights on the pages that are read, over their density.
        means: of spans.
    """

    sums: float
    means: float


TAILS: dict[str, dict[int, MeasuredTail]] = {
    # By head size, as above, with densities of .04 and .24.
    "cpu": {
        32: MeasuredTail(0.26, 0.026),
        64: MeasuredTail(0.22, 0.025),
        128: MeasuredTail(0.19, 0.029),
    },
    # FlashAttention tells the sums. Means are guessed from products with one of 128 tokens.
    "cuda": {128: MeasuredTail(0.0, 0.02)},
}


def tail_costs(platform: str, head_size: int, densities: np.ndarray) -> np.ndarray:
    """What a tail costs, in units of a head's dense attention.

    Args:
        platform: kind of device, "cpu" or "cuda".
        head_size: channels of a head; between those measured, interpolated.
        densities: of heads that have one.

    Returns:
        float64 like the densities.
    """
    table = sorted(TAILS[platform].items())
    sizes, wanted = np.log2([size for size, _ in table]), np.log2(head_size)
    sums = np.interp(wanted, sizes, [each.sums for _, each in table])
    means = np.interp(wanted, sizes, [each.means for _, each in table])
    return np.asarray(densities * sums + means)
