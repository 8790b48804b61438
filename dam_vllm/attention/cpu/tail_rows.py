"""Queries of the virtual sequences that have a tail, as vectors of rows."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.kernel import UnreadSpans, VirtualBatch
from dam_vllm.masks.rounding import ceil_div


@dataclass(frozen=True)
class TailRows:
    """Rows of sequences, each filled up to whole vectors by its last row.

    Attributes:
        index: int64 [rows], of the batch's queries, query heads one by one.
        position: int32 [rows], among the tokens that the sequence reads.
        first: int64 [sequences + 1], the first vector of each sequence.
        table: int32 [sequences, width], virtual pages that each reads.
        pages: int64 [sequences], how many these are.
        unread: the spans that each does not read.
    """

    index: torch.Tensor
    position: torch.Tensor
    first: torch.Tensor
    table: torch.Tensor
    pages: torch.Tensor
    unread: UnreadSpans

    @classmethod
    def of(cls, batch: VirtualBatch, unread: UnreadSpans, heads_per_kv: int, page: int) -> Self:
        """Those of a batch's sequences with unread spans."""
        lanes, which = llvm.lanes(), unread.sequences.numpy()
        starts, lens = batch.query_start_loc.numpy(), batch.seq_lens.numpy()[which]
        start, stop = starts[which].astype(np.int64), starts[which + 1].astype(np.int64)
        vectors = ceil_div((stop - start) * heads_per_kv, lanes)
        first = np.zeros(len(which) + 1, dtype=np.int64)
        vectors.cumsum(out=first[1:])
        each = np.repeat(np.arange(len(which)), vectors * lanes)
        row = (start * heads_per_kv - first[:-1] * lanes)[each] + np.arange(len(each))
        index = np.minimum(row, (stop * heads_per_kv - 1)[each])
        position = (lens - stop)[each] + index // heads_per_kv
        return cls(
            index=torch.from_numpy(index),
            position=torch.from_numpy(position.astype(np.int32)),
            first=torch.from_numpy(first),
            table=batch.block_table[unread.sequences],
            pages=torch.from_numpy(ceil_div(lens, page).astype(np.int64)),
            unread=unread,
        )
