"""What the splits of a sequence's keys found, merged by their log-sum-exp (Flash-Decoding)."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dam_vllm.attention.cuda.plan import MOVING
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_at

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Partial:
    """What each split of the keys found.

    Attributes:
        values: float32 [splits, tokens, heads, head_size], softmax over the split's keys.
        sums: float32 [splits, tokens, heads], log2 of the sum of weights, -inf for no key.
    """

    values: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, output: torch.Tensor, splits: int) -> "Partial":
        """Room for what `splits` parts find for [tokens, heads, head_size]."""
        values = output.new_empty((splits, *output.shape), dtype=torch.float32)
        return cls(values, values.new_empty(values.shape[:-1]))

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and sums."""
        return self.values, self.sums

    def merge(
        self,
        output: torch.Tensor,
        query_blocks: DeviceQueryBlocks,
        heads: torch.Tensor,
        heads_per_kv: int,
        lse: torch.Tensor | None = None,
    ) -> None:
        """Weighs what the splits found.

        Args:
            output: [tokens, heads, head_size], written where the queries lie.
            query_blocks: the queries.
            heads: int32 [n], KV heads.
            heads_per_kv: query heads a KV head.
            lse: float32 [tokens, heads], contiguous, written likewise: natural log-sum-exp of the
                scores; or None.
        """
        splits, tokens, all_heads, size = self.values.shape
        _merge_kernel[(len(query_blocks), query_blocks.most_queries, len(heads))](
            self.values, self.sums, output, lse, heads, *query_blocks.arguments,
            output.stride(0), output.stride(1),
            tokens, all_heads, splits, QUERY_BLOCK=query_blocks.query_block,
            HEADS_PER_KV=heads_per_kv, SIZE=size, HEADS_PADDED=triton.next_power_of_2(heads_per_kv),
            SIZE_PADDED=triton.next_power_of_2(size),
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "splits"], do_not_specialize_on_alignment=MOVING)
def _merge_kernel(
    part_ptr, sum_ptr, output_ptr, lse_ptr, head_ptr,
    request_ptr, offset_ptr, query_start_ptr, request_len_ptr,
    o_row, o_head, tokens, heads, splits,
    QUERY_BLOCK: tl.constexpr, HEADS_PER_KV: tl.constexpr, SIZE: tl.constexpr,
    HEADS_PADDED: tl.constexpr, SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """One query and one KV head: weighs what the splits found by their sums."""
    _, _, row, start, stop = query_block_at(
        tl.program_id(0), request_ptr, offset_ptr, query_start_ptr, request_len_ptr, QUERY_BLOCK
    )
    if tl.program_id(1) >= stop - start:
        return
    token = (row + tl.program_id(1)).to(tl.int64)
    member = tl.arange(0, HEADS_PADDED)
    channel = tl.arange(0, SIZE_PADDED)
    held = (member < HEADS_PER_KV)[:, None] & (channel < SIZE)[None, :]
    head = tl.load(head_ptr + tl.program_id(2)) * HEADS_PER_KV + member
    top = tl.full([HEADS_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_PADDED], tl.float32)
    found = tl.zeros([HEADS_PADDED, SIZE_PADDED], tl.float32)
    for split in range(splits):
        cell = (split * tokens + token) * heads + head
        size = tl.load(sum_ptr + cell, mask=member < HEADS_PER_KV, other=float("-inf"))
        part = tl.load(
            part_ptr + cell[:, None] * SIZE + channel[None, :],
            mask=held & (size > float("-inf"))[:, None],
            other=0.0,
        )
        higher = tl.maximum(top, size)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        fade, weight = tl.exp2(top - shift), tl.exp2(size - shift)
        total = total * fade + weight
        found = found * fade[:, None] + part * weight[:, None]
        top = higher
    total = tl.where(total > 0, total, 1.0)
    found = found / total[:, None]
    ptrs = output_ptr + (token * o_row + head * o_head)[:, None] + channel[None, :]
    tl.store(ptrs, found.to(output_ptr.dtype.element_ty), mask=held)
    if lse_ptr is not None:
        lse = (top + tl.log2(total)) * LN2
        tl.store(lse_ptr + token * heads + head, lse, mask=member < HEADS_PER_KV)
