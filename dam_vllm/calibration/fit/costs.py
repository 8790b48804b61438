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
        sums: the sums of weights on the pages that are read, over their density.
        spans: means of all spans.
    """

    sums: float
    spans: float


TAILS: dict[str, dict[int, MeasuredTail]] = {
    "cpu": {
        32: MeasuredTail(0.20, 0.02),
    },
    # FlashAttention tells the sums. Products with means of 128 tokens; not measured.
    "cuda": {128: MeasuredTail(0.0, 0.02)},
}


def tail_costs(platform: str, head_size: int, densities: np.ndarray) -> np.ndarray:
    """What a tail costs, in units of a head's dense attention.

    Args:
        platform: kind of device, "cpu" or "cuda".
        head_size: channels of a head.
        densities: of heads that have one.

    Returns:
        float64 like the densities.
    """
    table = sorted(TAILS[platform].items())
    sizes = np.log2([size for size, _ in table])
    sums, spans = (
        np.interp(np.log2(head_size), sizes, part)
        for part in ([each.sums for _, each in table], [each.spans for _, each in table])
    )
    return np.asarray(densities * sums + (1 - densities) * spans)
