"""Memory beside cache and weights, allocated before vLLM measures what is left for the cache."""

import math
from collections.abc import Hashable

import torch

from dam_vllm.attention.cuda.choices import Choices
from dam_vllm.masks.rounding import ceil_div

# Plans of all layers of a step; a single layer's may need more.
PLAN_BYTES = 256 << 20
# What allocations start at multiples of, bytes.
ALIGNMENT = 256


class Room:
    """Memory that calls take one after the other: what one was given, the next writes over.

    Layers run one after the other, also in a CUDA graph, so that all share it.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        """Gives uint8 [n] away."""
        self._bytes = memory
        self._taken = 0

    @classmethod
    def new(cls, nbytes: int, device: torch.device) -> "Room":
        """Allocates so many bytes."""
        return cls(torch.empty(nbytes, dtype=torch.uint8, device=device))

    @property
    def nbytes(self) -> int:
        return len(self._bytes)

    @property
    def left(self) -> int:
        """Bytes that are not taken."""
        return self.nbytes - self._taken

    def clear(self) -> None:
        """Takes everything back."""
        self._taken = 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor, not set, that starts where an allocation could; new where it does not fit."""
        size = math.prod(shape) * dtype.itemsize
        if size > self.left:
            return torch.empty(shape, dtype=dtype, device=self._bytes.device)
        start = self._taken
        self._taken += ceil_div(size, ALIGNMENT) * ALIGNMENT
        return self._bytes[start : start + size].view(dtype).view(shape)


class Scratch:
    """One worker's memory for plans, for queries and outputs head by head, and for choices.

    Attributes:
        query: flat, room for a step's queries of all heads of a layer; empty without
            FlashAttention.
        output: likewise.
        choice: for scores that dynamic heads choose by, or None without any.
        choices: what they chose, or None.
        nbytes: of all.
    """

    def __init__(
        self,
        tokens: int,
        channels: int,
        dtype: torch.dtype,
        device: torch.device,
        choice: int = 0,
        choices: Choices | None = None,
    ) -> None:
        """Allocates.

        Args:
            tokens: of a step, at most.
            channels: heads times head size, at most; 0 where FlashAttention does not run.
            dtype: of queries.
            device: where to.
            choice: bytes for the choice of pages, see `choice_bytes`; 0 without dynamic heads.
            choices: what was chosen, or None without dynamic heads.
        """
        self.choices = choices
        self.choice = Room.new(choice, device) if choice else None
        self._owners: set[Hashable] = set()
        self.query, self.output = torch.empty(2, tokens * channels, dtype=dtype, device=device)
        self._plans = torch.empty(PLAN_BYTES // 4, dtype=torch.int32, device=device)
        self._taken = 0

    @property
    def nbytes(self) -> int:
        choosing = sum(each.nbytes for each in (self.choice, self.choices) if each is not None)
        return self.query.nbytes + self.output.nbytes + self._plans.nbytes + choosing

    def by_head(self, query: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
        """Room for queries and outputs head by head, valid until the next call.

        Args:
            query: [tokens, heads, head_size] of all the layer's heads.
            heads: KV heads that are wanted.
            kv_heads: KV heads of the layer.

        Returns:
            Two tensors [heads, tokens, heads_per_kv, head_size], contiguous; the first of the
            queries' dtype.
        """
        tokens, all_heads, size = query.shape
        shape = torch.Size((heads, tokens, all_heads // kv_heads, size))
        count = shape.numel()
        return self.query.view(query.dtype)[:count].view(shape), self.output[:count].view(shape)

    def begin(self, owner: Hashable) -> None:
        """Somebody is about to take memory for plans.

        Who comes a second time begins anew, and so will all others: vLLM sets layers up once to
        measure CUDA graphs, and again to serve.
        """
        if owner in self._owners:
            self._owners.clear()
            self._taken = 0
        self._owners.add(owner)

    def left(self) -> int:
        """Numbers that plans can still take."""
        return len(self._plans) - self._taken

    def take(self, count: int) -> torch.Tensor:
        """Numbers for plans, int32; newly allocated where there are not so many left."""
        if count > self.left():
            return self._plans.new_empty(count)
        start = self._taken
        # Multiples of 16 bytes, as allocations would be.
        self._taken += ceil_div(count, 4) * 4
        return self._plans[start : start + count]
