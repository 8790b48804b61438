"""Pages that heads choose in a step, kept until no later layer's head reuses them any more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from dam_vllm.attention.chosen_pages import Anchor


def rows_of(choosing: Mapping[int, Sequence[int]], last: Mapping[Anchor, int]) -> dict[Anchor, int]:
    """Rows for choices; one is written over once nobody reads it any more.

    Args:
        choosing: by global layer index, local KV heads that choose.
        last: by layer and head, the last layer that reads its choice, beside its own.

    Returns:
        The row of each layer and head.
    """
    rows: dict[Anchor, int] = {}
    for layer, heads in sorted(choosing.items()):
        held = {row for anchor, row in rows.items() if last.get(anchor, -1) >= layer}
        free = (row for row in range(len(held) + len(heads)) if row not in held)
        rows |= {(layer, head): row for head, row in zip(heads, free, strict=False)}
    return rows


@dataclass(frozen=True)
class Choices:
    """One worker's memory for choices; a CUDA graph reads it where it lies.

    Attributes:
        rows: of each layer and head that chooses.
        memory: uint8 [rows, query blocks times pages].
    """

    rows: Mapping[Anchor, int]
    memory: torch.Tensor

    @classmethod
    def of(cls, rows: Mapping[Anchor, int], slots: int, width: int, device: torch.device) -> Self:
        """Memory for steps of up to so many query blocks, of requests of up to so many pages."""
        count = max(rows.values(), default=-1) + 1
        return cls(rows, torch.zeros(count, slots * width, dtype=torch.uint8, device=device))

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def part(self, before: int, slots: int, width: int) -> torch.Tensor:
        """Choices of a part of a step.

        Args:
            before: query blocks of the parts before it.
            slots: its query blocks.
            width: pages of its longest request.

        Returns:
            uint8 [rows, slots, width].
        """
        first = before * width
        return self.memory[:, first : first + slots * width].unflatten(1, (slots, width))
