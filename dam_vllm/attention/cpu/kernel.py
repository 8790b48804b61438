"""What a paged kernel is handed to compute attention on CPU: layers, and virtual sequences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from dam_vllm.attention.dynamic_heads import DynamicHeads, ReusingHeads


@dataclass(frozen=True)
class UnreadSpans:
    """Spans that stand for what virtual sequences do not read (`dam_vllm.masks.tails`).

    Attributes:
        sequences: int64 [n], those with such spans.
        table: int32 [n, width], virtual ids of the spans' last pages; after a sequence's, 0.
        counts: int64 [n], such spans of each.
    """

    sequences: torch.Tensor
    table: torch.Tensor
    counts: torch.Tensor

    def split(self, most: int) -> Iterator["UnreadSpans"]:
        """The same, so many sequences at a time."""
        arrays = (self.sequences, self.table, self.counts)
        for parts in zip(*(each.split(most) for each in arrays), strict=True):
            yield UnreadSpans(*parts)

    def among(self, heads: Sequence[int], each: int) -> "UnreadSpans":
        """The same, numbered among sequences of some heads.

        Args:
            heads: ascending, those of these sequences and others.
            each: sequences of a head.
        """
        head, block = np.divmod(self.sequences.numpy(), each)
        return replace(
            self, sequences=torch.from_numpy(np.searchsorted(heads, head) * each + block)
        )


@dataclass(frozen=True)
class VirtualBatch:
    """Virtual sequences of some KV heads of a layer; n = these heads x query blocks.

    Attributes:
        heads: int64, the KV heads in order, or None for all.
        block_table: int32 [n, width], virtual page ids.
        seq_lens: int32 [n].
        query_start_loc: int32 [n + 1].
        schedule: how the kernel splits the work.
        unread: what the kernel does not compute, the tails of some of these heads; None without.
    """

    heads: torch.Tensor | None
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    schedule: torch.Tensor
    unread: UnreadSpans | None = None


@dataclass(frozen=True)
class CPULayer:
    """One layer on this worker.

    Attributes:
        scale: factor of the scores.
        softcap: soft-capping of the scores, 0 for none.
        fixed: KV heads whose pages are known without queries, ascending.
        dynamic: how dynamic heads choose, or None without any.
        key_scale: factor of the stored keys.
        value_scale: factor of the stored values.
        reusing: what reusing heads follow, or None without any.
        index: global layer index, by which followers name it.
        tails: KV heads that have one.
    """

    scale: float
    softcap: float
    fixed: Sequence[int]
    dynamic: DynamicHeads | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0
    reusing: ReusingHeads | None = None
    index: int = 0
    tails: Sequence[int] = ()

    @property
    def choosing(self) -> list[int]:
        """KV heads whose pages depend on queries: dynamic ones, then reusing ones."""
        kinds = (self.dynamic, self.reusing)
        return [head for heads in kinds if heads is not None for head in heads.ids]


class PagedKernel(Protocol):
    """Causal attention over paged keys of a single KV head."""

    def schedule(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor:
        """How the kernel splits the work of int32 [n + 1] query starts and int32 [n] lengths."""

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        batch: VirtualBatch,
        layer: CPULayer,
    ) -> None:
        """Computes attention.

        Args:
            query: [rows, heads_per_kv, head_size].
            keys: [virtual pages, page, head_size], as `KVLayout.keys_and_values` gives them.
            values: likewise.
            output: like the query, written.
            batch: the sequences.
            layer: scales and soft-capping.
        """

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        layer: CPULayer,
    ) -> None:
        """Writes [n, head_size] keys and values to slots of virtual pages, int64 [n]."""
