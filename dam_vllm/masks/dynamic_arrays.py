"""Bases and budgets of dynamic heads, as the mask file holds them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dam_vllm.masks.budget import BUDGETS, MAX_TOKENS, Budget, BudgetKind
from dam_vllm.masks.ranges import refuse_outside
from dam_vllm.masks.rounding import ceil_div

IntArray = npt.NDArray[np.int32]
MAX_HEAD_SIZE = 1024
# Of float32 bases, which eigenvectors in float64 and in float32 alike keep well within.
ORTHOGONAL_WITHIN = 1e-4


@dataclass(frozen=True)
class Dynamic:
    """Bases and budgets of dynamic heads; rows of heads of another mode say nothing.

    Attributes:
        rotations: float32 [layers, kv_heads, head_size, head_size], orthogonal; column c is the
            direction of the keys' c-th largest variance on calibration texts (Loki, arXiv
            2406.02542). Queries and keys are multiplied by it from the right.
        channels: int32 [layers, kv_heads], leading channels that score a token.
        kinds: uint8 [layers, kv_heads], a `BudgetKind` each.
        budgets: float32 [layers, kv_heads], in the unit that the kind tells.
        floors: int32 [layers, kv_heads], fewest tokens chosen, rounded up to pages.
        caps: int32 [layers, kv_heads], most tokens chosen, rounded up to pages.
        expected: float32 [layers, kv_heads], share of the context that TOP_P chose beyond static
            pages when it was measured; 0 for the other kinds, whose share follows.
    """

    rotations: npt.NDArray[np.float32]
    channels: IntArray
    kinds: npt.NDArray[np.uint8]
    budgets: npt.NDArray[np.float32]
    floors: IntArray
    caps: IntArray
    expected: npt.NDArray[np.float32]

    def check(self, layers: int, kv_heads: int) -> None:
        """Checks shapes, and every value but those of the rotations.

        Raises:
            ValueError: for an array of another shape, or a value that means nothing.
        """
        size = self.rotations.shape[-1] if self.rotations.ndim else 0
        if not 1 <= size <= MAX_HEAD_SIZE:
            raise ValueError(
                f"dynamic.rotations has shape {self.rotations.shape}, must end in a head size "
                f"from 1 to {MAX_HEAD_SIZE}"
            )
        for name in vars(self):
            shape: tuple[int, ...] = (layers, kv_heads)
            if name == "rotations":
                shape += (size, size)
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"dynamic.{name} has shape {found}, expected {shape}")
        refuse_outside("dynamic.channels", self.channels, 1, size)
        refuse_outside("dynamic.kinds", self.kinds, 0, max(BudgetKind))
        most = np.array([BUDGETS[kind].most for kind in BudgetKind])
        refuse_outside("dynamic.budgets", self.budgets, 0, most[self.kinds])
        refuse_outside("dynamic.caps", self.caps, 0, MAX_TOKENS)
        refuse_outside("dynamic.floors", self.floors, 0, self.caps)
        refuse_outside("dynamic.expected", self.expected, 0, 1)

    def check_rotations(self) -> None:
        """Checks that every head's rotation is orthogonal within rounding.

        Raises:
            ValueError: for a value that is not finite or a matrix that is not orthogonal.
        """
        most = 1 + ORTHOGONAL_WITHIN
        refuse_outside("dynamic.rotations", self.rotations, -most, most)
        identity = np.eye(self.rotations.shape[-1], dtype=np.float32)
        for layer, rotations in enumerate(self.rotations):
            product = rotations.swapaxes(1, 2) @ rotations
            off = np.abs(product - identity).max(axis=(1, 2))
            head = int(off.argmax())
            if off[head] > ORTHOGONAL_WITHIN:
                raise ValueError(
                    f"dynamic.rotations[{layer}, {head}] is not orthogonal: times its transpose it "
                    f"is off the identity by {off[head]:.3g}, must be at most {ORTHOGONAL_WITHIN}"
                )

    def budget(self, layer: int, head: int, page: int) -> Budget:
        """A KV head's budget, in pages of `page` tokens."""
        at = (layer, head)
        kind = BUDGETS[BudgetKind(int(self.kinds[at]))]
        floor, cap = (ceil_div(int(bound[at]), page) for bound in (self.floors, self.caps))
        value = kind.in_pages(float(self.budgets[at]), page)
        return kind(value, floor, max(floor, cap))

    def put(
        self, layer: int, head: int, channels: int, budget: Budget, share: float, page: int
    ) -> None:
        """Writes how a KV head chooses.

        Args:
            layer: global layer index.
            head: KV head.
            channels: leading channels that score.
            budget: in pages of `page` tokens.
            share: measured share of the context that it chooses.
            page: tokens a page.
        """
        at = (layer, head)
        self.channels[at], self.kinds[at] = channels, budget.kind
        self.budgets[at] = budget.in_tokens(page)
        self.floors[at], self.caps[at] = budget.floor * page, budget.cap * page
        self.expected[at] = share if budget.measured else 0.0

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
        share = float(self.expected[layer, head])
        return self.budget(layer, head, page).expected(causal, share).astype(int)
