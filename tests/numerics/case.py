"""One random layer and batch."""

from dataclasses import dataclass

import numpy as np
import torch

SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
PAGES = (16, 32, 48, 64, 80, 96, 128, 256)
KINDS = (
    (torch.float32, "auto"),
    (torch.float16, "auto"),
    (torch.bfloat16, "auto"),
    (torch.bfloat16, "fp8"),
    (torch.float16, "fp8"),
    (torch.bfloat16, "fp8_e5m2"),
)


@dataclass(frozen=True)
class Case:
    """One layer and one batch.

    Attributes:
        requests: of each, its length and how many of its last tokens are new.
        dtype: of queries, keys and values.
        cache_dtype: vLLM's name of the cache's.
        scale: factor of the scores.
        scales: factors of the stored keys and values.
        dense_below: query positions below it read everything.
    """

    heads_per_kv: int
    kv_heads: int
    size: int
    page: int
    requests: list[tuple[int, int]]
    dtype: torch.dtype
    cache_dtype: str
    softcap: float
    scale: float
    scales: tuple[float, float]
    dense_below: int
    dynamic: bool

    @property
    def heads(self):
        return self.heads_per_kv * self.kv_heads

    @property
    def starts(self):
        return np.cumsum([0, *(count for _, count in self.requests)])


def draw(rng):
    """A random case."""
    dtype, cache_dtype = KINDS[rng.integers(len(KINDS))]
    if not torch.cpu._is_avx512_supported():
        cache_dtype = "auto"
    fp8 = cache_dtype != "auto"  # which vLLM serves with multiples of 32 alone
    lengths = rng.integers(1, [900, 500, 90, 40, 12][: rng.integers(1, 6)])
    size = int(rng.choice([each for each in SIZES if not fp8 or each % 32 == 0]))
    return Case(
        heads_per_kv=int(rng.integers(1, 9)),
        kv_heads=int(rng.choice([1, 2, 3, 4])),
        size=size,
        page=int(rng.choice([each for each in PAGES if not fp8 or each % 32 == 0])),
        requests=[(int(n), int(rng.choice([1, n, rng.integers(1, n + 1)]))) for n in lengths],
        dtype=dtype,
        cache_dtype=cache_dtype,
        softcap=float(rng.choice([0, 0, 5, 30])),
        scale=float(size**-0.5 * rng.uniform(0.3, 3)),
        scales=(0.5, 0.25) if fp8 else (1.0, 1.0),
        dense_below=int(rng.choice([0, 0, 200])),
        dynamic=bool(rng.random() < 0.5),
    )
