"""What a paged kernel is handed to compute attention on CPU: layers, and virtual sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dam_vllm.attention.dynamic_heads import DynamicHeads, ReusingHeads


@dataclass(frozen=True)
class VirtualBatch:
    """Virtual sequences of some KV heads of a layer; n = these heads x query blocks.

    Attributes:
        heads: int64, the KV heads in order, or None for all.
        block_table: int32 [n, width], virtual page ids.
        seq_lens: int32 [n].
        query_start_loc: int32 [n + 1].
        schedule: how the kernel splits the work.
    """

    heads: torch.Tensor | None
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    schedule: torch.Tensor


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
    """

    scale: float
    softcap: float
    fixed: Sequence[int]
    dynamic: DynamicHeads | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0
    reusing: ReusingHeads | None = None
    index: int = 0

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
