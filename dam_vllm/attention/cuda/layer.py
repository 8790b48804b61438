"""A layer's sparse attention on a GPU: plans on the device, then runs one of two kernels.

All a launch depends on is known without the values on the device, so that a CUDA graph of a
step's decoding can be replayed for other lengths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dam_vllm.attention.cuda.flash import Varlen, attend_flash
from dam_vllm.attention.cuda.paged import Softmax, attend_paged
from dam_vllm.attention.cuda.plan import (
    DevicePlan,
    DeviceQueryBlocks,
    plan_heads,
    query_block_slots,
)
from dam_vllm.attention.cuda.select import DeviceDynamic, choose_on_device
from dam_vllm.attention.cuda.token_bits import TokenBits
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.page_counts import COUNTS
from dam_vllm.masks.page_tables import PageSelector


@dataclass(frozen=True)
class HeadSet:
    """KV heads of a layer whose pages are selected alike.

    Attributes:
        ids: local KV heads.
        heads: int32 [n], the same on the device.
        selector: their page tables, of one layer.
        dynamic: how they choose further pages, or None.
        exact: token masks inside the pages, or None.
    """

    ids: tuple[int, ...]
    heads: torch.Tensor
    selector: PageSelector
    dynamic: DeviceDynamic | None = None
    exact: TokenBits | None = None


@dataclass(frozen=True)
class Part:
    """Requests of a step that are served by the same launches; queries count from its first.

    Attributes:
        query_blocks: by query block size, its queries.
        block_table: int32 [requests, at least width], vLLM's.
        rows: query rows of the batch.
        width: most pages of a request.
    """

    query_blocks: Mapping[int, DeviceQueryBlocks]
    block_table: torch.Tensor
    rows: slice
    width: int

    @property
    def decodes(self) -> bool:
        """Whether every request has one query."""
        return all(query_blocks.most_queries == 1 for query_blocks in self.query_blocks.values())


class _Paged(NamedTuple):
    """A part's queries and outputs, and the cache seen as virtual pages."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class DeviceLayer:
    """One layer on one worker.

    Attributes:
        sets: its KV heads, each in one set.
        kv_heads: how many.
        softmax: scales and soft-capping.
        varlen: FlashAttention, or None for the Triton kernel.
        counted: whether the pages of prefills are counted.
    """

    sets: Sequence[HeadSet]
    kv_heads: int
    softmax: Softmax
    varlen: Varlen | None
    counted: bool = False

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        part: Part,
    ) -> None:
        """Computes a part's attention.

        Args:
            query: [tokens, heads, head_size], of the whole step, rotated where heads are dynamic.
            key: [virtual pages, page, head_size], as `KVLayout.keys_and_values` gives them.
            value: likewise.
            output: [tokens, heads, head_size], the part's rows are written.
            part: what to serve.
        """
        paged = _Paged(query[part.rows], key, value, output[part.rows])
        shared = self._empty_plan(part, self.sets[0]) if part.decodes else None
        for each in self.sets:
            plan = shared or self._empty_plan(part, each)
            self._plan(plan, each, paged, part)
            if shared is None or self.varlen is None:
                self._run(plan, each, paged, part)
        if shared is not None and self.varlen is not None:
            query_blocks = part.query_blocks[self.sets[0].selector.query_block]
            heads = range(self.kv_heads)
            attend_flash(self.varlen, *paged, shared, query_blocks, heads, self.softmax)

    def warm_up(
        self, heads: int, size: int, page: int, dtypes: Sequence[torch.dtype], layout: KVLayout
    ) -> None:
        """Runs a short prompt and a step of decoding, so that their kernels are compiled.

        Args:
            heads: query heads.
            size: channels a head.
            page: tokens a page.
            dtypes: of queries and of the cache.
            layout: of the cache.
        """
        device = self.sets[0].heads.device
        query_blocks = {each.selector.query_block for each in self.sets}
        cache = torch.zeros(1, self.kv_heads, page, 2 * size, device=device).to(dtypes[1])
        for queries in (max(query_blocks), 1):
            lens = torch.tensor([0, queries], dtype=torch.int32, device=device)
            cut = {}
            for query_block in query_blocks:
                slots = torch.from_numpy(query_block_slots(np.array([queries]), query_block))
                request, offset = slots.to(device)
                most = min(queries, query_block)
                cut[query_block] = DeviceQueryBlocks(
                    request, offset, lens, lens[1:], query_block, most
                )
            width = max(query_blocks) // page
            blocks = torch.zeros(1, width, dtype=torch.int32, device=device)
            query = torch.zeros(queries, heads, size, dtype=dtypes[0], device=device)
            part = Part(cut, blocks, slice(0, queries), width)
            self.attend(query, *layout.keys_and_values(cache), torch.empty_like(query), part)

    def _empty_plan(self, part: Part, each: HeadSet) -> DevicePlan:
        numbered = any(other.exact is not None for other in self.sets)
        query_blocks = part.query_blocks[each.selector.query_block]
        return DevicePlan.empty(query_blocks, self.kv_heads, part.width, numbered)

    def _plan(self, plan: DevicePlan, each: HeadSet, paged: _Paged, part: Part) -> None:
        query_blocks = part.query_blocks[each.selector.query_block]
        chosen = None
        if each.dynamic is not None:
            query = paged.query.unflatten(1, (self.kv_heads, -1))
            chosen = choose_on_device(
                each.dynamic, query, paged.key, part.block_table, query_blocks, part.width
            )
        plan_heads(plan, each.heads, each.selector, query_blocks, part.block_table, chosen)
        if self.counted and not part.decodes:
            _count(plan, query_blocks, each.heads, each.selector.page)

    def _run(self, plan: DevicePlan, each: HeadSet, paged: _Paged, part: Part) -> None:
        query_blocks = part.query_blocks[each.selector.query_block]
        if self.varlen is not None:
            attend_flash(self.varlen, *paged, plan, query_blocks, each.ids, self.softmax)
        else:
            attend_paged(*paged, plan, query_blocks, each.heads, self.softmax, each.exact)


def _count(
    plan: DevicePlan, query_blocks: DeviceQueryBlocks, heads: torch.Tensor, page: int
) -> None:
    """Counts some heads, int32 [n], of a prefill's plan, without waiting for the device."""
    pages = (plan.seq_lens.t()[heads.long()] + page - 1) // page
    request = query_blocks.request.long()
    end = query_blocks.seq_lens[request]
    first = end - query_blocks.query_start_loc.diff()[request]
    size = query_blocks.query_block
    start = torch.maximum((first // size + query_blocks.offset) * size, first)
    queries = plan.starts.diff()
    COUNTS.add(pages, queries, start + queries, page)
