"""Where KV heads lie in the cache, and their sequences in a plan."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Homes:
    """Where the cache holds KV heads: virtual page = block * scale + offset.

    Attributes:
        offsets: int32 [n], virtual pages of the heads' parts of block 0.
        groups: int32 [n], which block table tells a head's blocks; None where there is one for all.
        scale: virtual pages a block.
    """

    offsets: torch.Tensor
    groups: torch.Tensor | None
    scale: int

    @classmethod
    def of_heads(cls, heads: torch.Tensor, kv_heads: int) -> "Homes":
        """KV heads, int32 [n], of layers whose blocks hold all of their heads."""
        return cls(heads, None, kv_heads)

    @classmethod
    def unknown(cls, count: int, scale: int, device: torch.device) -> "Homes":
        """So many heads in several groups, to be told with `tell` before anything is planned."""
        offsets, groups = torch.zeros(2, count, dtype=torch.int32, device=device)
        return cls(offsets, groups, scale)

    def tell(self, offsets: torch.Tensor, groups: torch.Tensor) -> None:
        """Fills in int64 [n] each; a CUDA graph finds them where they were."""
        assert self.groups is not None
        self.offsets.copy_(offsets)
        self.groups.copy_(groups)


@dataclass(frozen=True)
class Places:
    """Where a plan holds the sequences of some KV heads.

    The sequence of a slot and a head is number first * slots + slot * step + add.

    Attributes:
        numbers: int32 [4, n]: of each head `first`, `add`, its number in its set of heads, and the
            number of that set in the plan.
        step: between the slots of a head.
    """

    numbers: torch.Tensor
    step: int

    @classmethod
    def by_head(cls, sets: Sequence[int], device: torch.device) -> "Places":
        """Each head's slots follow each other.

        Args:
            sets: heads of each set.
            device: where to.
        """
        within = [number for count in sets for number in range(count)]
        which = [row for row, count in enumerate(sets) for _ in range(count)]
        numbers = [list(range(len(within))), [0] * len(within), within, which]
        return cls(torch.tensor(numbers, dtype=torch.int32, device=device), 1)

    @classmethod
    def by_slot(
        cls, layers: Sequence[Sequence[int]], kv_heads: int, device: torch.device
    ) -> "Places":
        """Each slot's heads follow each other, layer after layer.

        Args:
            layers: KV heads of each layer that are planned.
            kv_heads: of a layer.
            device: where to.
        """
        flat = [(row * kv_heads, head, 0, 0) for row, heads in enumerate(layers) for head in heads]
        numbers = torch.tensor(flat, dtype=torch.int32).view(-1, 4).t().contiguous()
        return cls(numbers.to(device), kv_heads)
