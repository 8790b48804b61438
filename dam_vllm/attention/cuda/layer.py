"""A layer's sparse attention on a GPU: chooses dynamic heads' pages, then runs one of two kernels.

All a launch depends on is known without the values on the device, so that a CUDA graph of a
step's decoding can be replayed for other lengths.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dam_vllm.attention.cuda import flash
from dam_vllm.attention.cuda.bundle import Bundle, Part
from dam_vllm.attention.cuda.choosing import choose_on_device
from dam_vllm.attention.cuda.counts import DeviceCounts, Tally
from dam_vllm.attention.cuda.dynamic import DeviceChoosing, DeviceDynamic
from dam_vllm.attention.cuda.layer_tails import LayerTails
from dam_vllm.attention.cuda.paged import Softmax, attend_paged
from dam_vllm.attention.cuda.places import Homes, Places
from dam_vllm.attention.cuda.plan import DevicePlan, plan_heads
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks
from dam_vllm.attention.cuda.rotation import DeviceRotation
from dam_vllm.attention.cuda.scratch import Scratch
from dam_vllm.attention.cuda.tail import Read, Tail, TailHeads
from dam_vllm.attention.cuda.token_bits import TokenBits
from dam_vllm.attention.span_means import SpanMeans
from dam_vllm.masks.page_tables import PageTables


@dataclass(frozen=True)
class HeadSet:
    """Static KV heads of a layer whose pages are selected alike.

    Attributes:
        ids: local KV heads.
        heads: int32 [n], the same on the device.
        tables: their page tables.
        exact: token masks inside the pages, or None.
    """

    ids: Sequence[int]
    heads: torch.Tensor
    tables: PageTables
    exact: TokenBits | None = None


@dataclass(frozen=True)
class DeviceLayer:
    """One layer on one worker.

    Attributes:
        static: its static KV heads.
        choosing: its dynamic and reusing heads, or None.
        kv_heads: how many heads there are.
        softmax: scales and soft-capping.
        flash: FlashAttention, or None for the Triton kernel.
        index: global layer index.
        rotation: of its dynamic heads' queries, where they come unrotated, or None.
        tails: its heads with tails, or None.
    """

    static: Sequence[HeadSet]
    choosing: DeviceChoosing | None
    kv_heads: int
    softmax: Softmax
    flash: flash.Flash | None
    index: int = 0
    rotation: DeviceRotation | None = None
    tails: TailHeads | None = None


class Paged(NamedTuple):
    """A part's queries and outputs, and the cache seen as virtual pages."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class LayerRun:
    """A layer where its bundle plans it.

    Attributes:
        layer: the layer.
        bundle: plans its static heads.
        number: of the layer in the bundle.
        scratch: room for queries and outputs head by head.
        each: int32, 0, 1, 2, ...
        chosen: places of choosing heads in a plan of their own, and in the bundle's for decoding.
        homes: where choosing heads lie, or None without any.
        tally: where choosing heads are counted, or None.
        gathered: dynamic heads as they come first among gathered queries, or None without any.
        tails: of its heads, or None without any.
    """

    layer: DeviceLayer
    bundle: Bundle
    number: int
    scratch: Scratch
    each: torch.Tensor
    chosen: tuple[Places, Places] | None
    homes: Homes | None
    tally: Tally | None
    gathered: DeviceDynamic | None
    tails: LayerTails | None

    def attend(self, paged: Paged, part: Part) -> None:
        """Computes a part's attention.

        Args:
            paged: queries and where outputs go.
            part: what to serve.
        """
        whole, rotation = self.bundle.whole(part), self.layer.rotation
        if self.number == 0:
            self.bundle.fill(whole, part)
        if self.layer.flash is not None and not part.decodes:
            self._flash_prefill(paged, part, whole)
            return
        if rotation is not None:
            paged = paged._replace(query=rotation.queries(paged.query, self.layer.kv_heads))
        if self.layer.flash is None:
            self._triton(paged, part, whole)
        else:
            self._choose(self._all_queries(paged), paged.key, part, whole)
            query_blocks = part.query_blocks[self.bundle.query_block]
            plan = self.bundle.layer(whole, self.number, part)
            lse = flash.decode(
                self.layer.flash, self.each, *paged, plan, query_blocks, self.layer.softmax,
                self.tails is not None,
            )  # fmt: skip
            self._add_tails(paged, lse, part)

    def _all_queries(self, paged: Paged) -> torch.Tensor:
        """Queries [tokens, kv_heads, heads_per_kv, head_size]."""
        return paged.query.unflatten(1, (self.layer.kv_heads, -1))

    def _add_tails(self, paged: Paged, lse: torch.Tensor | None, part: Part) -> None:
        """Adds the tails of all heads; `lse` is [tokens, kv_heads, heads_per_kv], or None."""
        if self.tails is not None and lse is not None:
            output = paged.output.unflatten(1, (self.layer.kv_heads, -1))
            by_token = (self._all_queries(paged), output, lse)
            read = Read(*(each.transpose(0, 1) for each in by_token))
            self.tails.add(read, paged.key, part)

    def _triton(self, paged: Paged, part: Part, whole: DevicePlan) -> None:
        """Everything by the Triton kernel, a launch for each set of heads."""
        layer, lse = self.layer, None
        if self.tails is not None:
            lse = paged.query.new_empty(paged.query.shape[:2], dtype=torch.float32)
        query_blocks = part.query_blocks[self.bundle.query_block]
        for row, each in enumerate(layer.static):
            plan = whole.take(self.bundle.heads_of(self.number, row))
            attend_paged(
                *paged, plan, query_blocks, each.heads, layer.kv_heads, layer.softmax, each.exact,
                lse=lse,
            )  # fmt: skip
        chosen = self._choose(self._all_queries(paged), paged.key, part, whole)
        if chosen is not None:
            choosing = layer.choosing
            assert choosing is not None
            query_blocks = part.query_blocks[choosing.static.query_block]
            attend_paged(
                *paged, chosen, query_blocks, choosing.heads, layer.kv_heads, layer.softmax, lse=lse
            )
        if lse is not None:
            self._add_tails(paged, lse.unflatten(1, (layer.kv_heads, -1)), part)

    def _flash_prefill(self, paged: Paged, part: Part, whole: DevicePlan) -> None:
        """A launch of FlashAttention for static heads and one for choosing ones."""
        layer, query = self.layer, paged.query
        query_blocks = part.query_blocks[self.bundle.query_block]
        for row, each in enumerate(layer.static):
            asked, found = self.scratch.by_head(query, len(each.heads), layer.kv_heads)
            flash.gather_heads(query, each.heads, asked)
            plan = self.bundle.set(whole, self.number, row, part)
            tail = None if self.tails is None else self.tails.static[row]
            self._flash(paged, asked, found, plan, query_blocks, each.heads, part, tail)
        if layer.choosing is not None:
            heads = layer.choosing.heads
            asked, found = self.scratch.by_head(query, len(heads), layer.kv_heads)
            if layer.rotation is None:
                flash.gather_heads(query, heads, asked)
            else:
                layer.rotation.gather(query, heads, asked)
            chosen = self._choose(asked.transpose(0, 1), paged.key, part, whole, self.gathered)
            assert chosen is not None
            query_blocks = part.query_blocks[layer.choosing.static.query_block]
            tail = None if self.tails is None else self.tails.choosing
            self._flash(paged, asked, found, chosen, query_blocks, heads, part, tail)

    def _flash(
        self, paged: Paged, asked: torch.Tensor, found: torch.Tensor, plan: DevicePlan,
        query_blocks: DeviceQueryBlocks, heads: torch.Tensor, part: Part, tail: Tail | None,
    ) -> None:  # fmt: skip
        """Attention of gathered heads, to where outputs go."""
        layer = self.layer
        assert layer.flash is not None
        lse = flash.prefill(
            layer.flash, asked, paged.key, paged.value, found, plan, query_blocks, layer.softmax,
            tail is not None,
        )  # fmt: skip
        if tail is not None and lse is not None:
            tail.add(Read(asked, found, lse), paged.key, part, gathered=True)
        flash.scatter_heads(found, heads, paged.output)

    def _choose(
        self, query: torch.Tensor, key: torch.Tensor, part: Part, whole: DevicePlan,
        dynamic: DeviceDynamic | None = None,
    ) -> DevicePlan | None:  # fmt: skip
        """Plans choosing heads, in decoding beside the static ones; no plan without any.

        Args:
            query: [tokens, kv_heads, heads_per_kv, head_size], rotated.
            key: [virtual pages, page, head_size].
            part: what to serve.
            whole: the bundle's plan.
            dynamic: dynamic heads where the query holds others than all, or None.
        """
        choosing = self.layer.choosing
        if choosing is None:
            return None
        assert self.chosen is not None
        assert self.homes is not None
        query_blocks = part.query_blocks[choosing.static.query_block]
        if part.decodes:
            plan = replace(whole, places=self.chosen[1])
        else:
            plan = DevicePlan.empty(query_blocks, self.chosen[0], part.width)
        chosen = choosing.choices.part(part.before, len(query_blocks), part.width)
        if choosing.dynamic is not None:
            choose_on_device(
                dynamic or choosing.dynamic, chosen, choosing.rows, query, key, part.block_table,
                query_blocks, part.width, self.homes, self.scratch.choice,
            )  # fmt: skip
        plan_heads(
            plan, self.homes.offsets, choosing.static, query_blocks, part.block_table, part.tokens,
            self.homes.scale, (chosen, choosing.rows), self.homes.groups, self.tally,
        )  # fmt: skip
        return plan


def layer_runs(
    layers: Sequence[DeviceLayer], bundle: Bundle, scratch: Scratch, each: torch.Tensor,
    counts: DeviceCounts | None, means: SpanMeans, unit: int | None = None,
) -> Iterator[LayerRun]:  # fmt: skip
    """The layers of a bundle, in its order; `unit` as for `Bundle.of`."""
    device = each.device
    for number, layer in enumerate(layers):
        chosen = homes = tally = gathered = None
        if layer.choosing is not None:
            heads = layer.choosing.heads
            if layer.choosing.dynamic is not None:
                dynamic = layer.choosing.dynamic
                gathered = replace(dynamic, heads=torch.arange(len(dynamic.heads)).to(heads))
            ids: list[list[int]] = [[] for _ in layers]
            ids[number] = heads.tolist()
            by_slot = Places.by_slot(ids, layer.kv_heads, device)
            chosen = (Places.by_head([len(heads)], device), by_slot)
            homes = Homes.of_heads(heads, layer.kv_heads)
            if unit is not None:
                homes = Homes.unknown(len(heads), unit, device)
            if counts is not None:
                tally = counts.tally([(layer.index, head) for head in ids[number]])
        tails = _tails(layer, bundle, number, homes, means, unit)
        yield LayerRun(layer, bundle, number, scratch, each, chosen, homes, tally, gathered, tails)


def _tails(
    layer: DeviceLayer, bundle: Bundle, number: int, homes: Homes | None, means: SpanMeans,
    unit: int | None,
) -> LayerTails | None:  # fmt: skip
    """A layer's tails; `homes` are those of its choosing heads."""
    tails, choosing = layer.tails, layer.choosing
    if tails is None:
        return None
    static: list[Tail | None] = []
    for row, each in enumerate(layer.static):
        assert bundle.selector is not None
        first = bundle.heads_of(number, row).start
        static.append(Tail.of(tails, each.ids, first, bundle.selector, bundle.homes, means))
    of_choosing = None
    if choosing is not None and homes is not None:
        ids, chosen = choosing.heads.tolist(), (choosing.choices, choosing.rows)
        of_choosing = Tail.of(tails, ids, 0, choosing.static, homes, means, chosen)
    device = bundle.homes.offsets.device
    own = Homes.of_heads(torch.tensor(tails.ids, dtype=torch.int32, device=device), layer.kv_heads)
    if unit is not None:
        own = Homes.unknown(len(tails.ids), unit, device)
    return LayerTails(tails.ids, own, bundle.query_block, static, of_choosing, means)
