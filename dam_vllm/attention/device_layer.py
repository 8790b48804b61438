"""A layer's sparse attention on a GPU: plans on the device, then runs one of two kernels.

All a launch depends on is known without the values on the device, so that a CUDA graph of a
step's decoding can be replayed for other lengths.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dam_vllm.attention.device_dynamic import DeviceDynamic, choose_on_device
from dam_vllm.attention.flash import Varlen, attend_flash
from dam_vllm.attention.select import PageSelector
from dam_vllm.attention.token_bits import TokenBits
from dam_vllm.attention.triton_geometry import DeviceTiles, tile_slots
from dam_vllm.attention.triton_paged import Softmax, attend_paged
from dam_vllm.attention.triton_plan import DevicePlan, plan_heads


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
        tiles: by tile size, its queries.
        block_table: int32 [requests, at least width], vLLM's.
        rows: query rows of the batch.
        width: most pages of a request.
    """

    tiles: Mapping[int, DeviceTiles]
    block_table: torch.Tensor
    rows: slice
    width: int

    @property
    def decodes(self) -> bool:
        """Whether every request has one query."""
        return all(tiles.most_queries == 1 for tiles in self.tiles.values())


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
        counted: called with each plan of a prefill, its tiles, its heads and the page size.
    """

    sets: Sequence[HeadSet]
    kv_heads: int
    softmax: Softmax
    varlen: Varlen | None
    counted: Callable[[DevicePlan, DeviceTiles, torch.Tensor, int], None] | None = None

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor, part: Part
    ) -> None:
        """Computes a part's attention.

        Args:
            query: [tokens, heads, head_size], of the whole step, rotated where heads are dynamic.
            cache: [blocks, kv_heads, page, 2 * head_size], contiguous.
            output: [tokens, heads, head_size], the part's rows are written.
            part: what to serve.
        """
        page, width = cache.shape[2:]
        key, value = cache.view(-1, page, width).split(width // 2, dim=-1)
        paged = _Paged(query[part.rows], key, value, output[part.rows])
        shared = self._empty_plan(part, self.sets[0]) if part.decodes else None
        for each in self.sets:
            plan = shared or self._empty_plan(part, each)
            self._plan(plan, each, paged, part)
            if shared is None or self.varlen is None:
                self._run(plan, each, paged, part)
        if shared is not None and self.varlen is not None:
            tiles = part.tiles[self.sets[0].selector.tile]
            heads = range(self.kv_heads)
            attend_flash(self.varlen, *paged, shared, tiles, heads, self.softmax)

    def warm_up(self, heads: int, size: int, page: int, dtypes: Sequence[torch.dtype]) -> None:
        """Runs a short prompt and a step of decoding, so that their kernels are compiled.

        Args:
            heads: query heads.
            size: channels a head.
            page: tokens a page.
            dtypes: of queries and of the cache.
        """
        device = self.sets[0].heads.device
        tiles = {each.selector.tile for each in self.sets}
        cache = torch.zeros(1, self.kv_heads, page, 2 * size, device=device).to(dtypes[1])
        for queries in (max(tiles), 1):
            lens = torch.tensor([0, queries], dtype=torch.int32, device=device)
            cut = {}
            for tile in tiles:
                slots = torch.from_numpy(tile_slots(np.array([queries]), tile))
                request, offset = slots.to(device)
                most = min(queries, tile)
                cut[tile] = DeviceTiles(request, offset, lens, lens[1:], tile, most)
            width = max(tiles) // page
            blocks = torch.zeros(1, width, dtype=torch.int32, device=device)
            query = torch.zeros(queries, heads, size, dtype=dtypes[0], device=device)
            part = Part(cut, blocks, slice(0, queries), width)
            self.attend(query, cache, torch.empty_like(query), part)

    def _empty_plan(self, part: Part, each: HeadSet) -> DevicePlan:
        numbered = any(other.exact is not None for other in self.sets)
        tiles = part.tiles[each.selector.tile]
        return DevicePlan.empty(tiles, self.kv_heads, part.width, numbered)

    def _plan(self, plan: DevicePlan, each: HeadSet, paged: _Paged, part: Part) -> None:
        tiles = part.tiles[each.selector.tile]
        chosen = None
        if each.dynamic is not None:
            query = paged.query.unflatten(1, (self.kv_heads, -1))
            chosen = choose_on_device(
                each.dynamic, query, paged.key, part.block_table, tiles, part.width
            )
        plan_heads(plan, each.heads, each.selector, tiles, part.block_table, chosen)
        if self.counted is not None and not part.decodes:
            self.counted(plan, tiles, each.heads, each.selector.page)

    def _run(self, plan: DevicePlan, each: HeadSet, paged: _Paged, part: Part) -> None:
        tiles = part.tiles[each.selector.tile]
        if self.varlen is not None:
            attend_flash(self.varlen, *paged, plan, tiles, each.ids, self.softmax)
        else:
            attend_paged(*paged, plan, tiles, each.heads, self.softmax, each.exact)
