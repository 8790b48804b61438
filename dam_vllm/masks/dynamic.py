"""What dynamic heads need: a basis to score tokens in, and how many pages to choose."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


class BudgetKind(IntEnum):
    """What a budget counts, beyond the pages that a head reads anyway."""

    COUNT = 0
    """A number of tokens, rounded up to pages."""
    SHARE = 1
    """A share of the tokens up to the query."""
    MASS = 2
    """Pages until every query's estimated attention mass reaches the budget, pages that the
    head reads anyway included."""


@dataclass(frozen=True)
class Dynamic:
    """Bases and budgets of dynamic heads; rows of heads of another mode say nothing.

    Attributes:
        rotations: float32 [layers, kv_heads, head_size, head_size], orthogonal; column c is the
            direction of the keys' c-th largest variance on calibration texts (Loki, arXiv
            2406.02542). Queries and keys are multiplied by it from the right.
        ranks: int32 [layers, kv_heads], leading channels that score a token.
        kinds: uint8 [layers, kv_heads], a `BudgetKind` each.
        budgets: float32 [layers, kv_heads], in the unit that the kind tells.
        floors: int32 [layers, kv_heads], fewest tokens chosen, rounded up to pages.
        caps: int32 [layers, kv_heads], most tokens chosen, rounded up to pages.
        expected: float32 [layers, kv_heads], share of the context that MASS chose beyond static
            pages when it was measured; 0 for the other kinds, whose share follows.
    """

    rotations: npt.NDArray[np.float32]
    ranks: IntArray
    kinds: npt.NDArray[np.uint8]
    budgets: npt.NDArray[np.float32]
    floors: IntArray
    caps: IntArray
    expected: npt.NDArray[np.float32]

    def check(self, layers: int, kv_heads: int) -> None:
        """Checks shapes and ranges.

        Raises:
            ValueError: for an array of another shape, or a value that means nothing.
        """
        size = self.rotations.shape[-1]
        for name in vars(self):
            shape: tuple[int, ...] = (layers, kv_heads)
            if name == "rotations":
                shape += (size, size)
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"dynamic {name} has shape {found}, expected {shape}")
        bounds = {
            "ranks": (1, size),
            "kinds": (0, max(BudgetKind)),
            "budgets": (0, np.inf),
            "floors": (0, np.inf),
            "caps": (0, np.inf),
            "expected": (0, 1),
        }
        for name, (low, high) in bounds.items():
            values = getattr(self, name)
            if not ((values >= low) & (values <= high)).all():
                raise ValueError(f"dynamic {name} must lie between {low} and {high}")

    def chosen(self, layer: int, head: int, page: int, causal: np.ndarray) -> np.ndarray:
        """Pages that a head is expected to choose.

        Args:
            layer: global layer index.
            head: KV head.
            page: tokens a page.
            causal: int [n], pages up to and including each query's own.

        Returns:
            int [n], not yet bounded by how many pages there are.
        """
        at = (layer, head)
        budget = float(self.budgets[at])
        if self.kinds[at] == BudgetKind.COUNT:
            count = np.full(causal.shape, -(-budget // page))
        else:
            share = budget if self.kinds[at] == BudgetKind.SHARE else float(self.expected[at])
            count = np.ceil(share * causal - 1e-6)
        return np.clip(count, -(-self.floors[at] // page), -(-self.caps[at] // page)).astype(int)
