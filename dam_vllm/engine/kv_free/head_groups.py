"""Layers whose KV heads lie in several of vLLM's cache groups, so that some can free pages.

Each layer is cut into *units* of as many KV heads. To vLLM a unit is a layer: the attention layer
itself stands for its first unit, a `HeadUnit` for each other one. All units' caches lie in one
allocation, [blocks, heads a unit, page, 2 * head_size] each, one after the other or on top of each
other where their groups differ; seen as one pool of virtual pages, a layer's attention is still
one call of the kernel, and so is storing its keys.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from dam_vllm.attention.interface import Planned, Step


@dataclass(frozen=True)
class Pool:
    """Where the KV heads of all layers lie: virtual page = block * heads + offset.

    Attributes:
        pages: all virtual pages, [pages, 1, page, 2 * head_size].
        offset: int64 [layers, kv_heads], virtual pages of a head's part of block 0; on the host.
        group: int64 [layers, kv_heads], the cache group of each head; on the host.
        heads: KV heads a unit.
        rows: by layer name, its row.
    """

    pages: torch.Tensor
    offset: torch.Tensor
    group: torch.Tensor
    heads: int
    rows: Mapping[str, int]

    @property
    def page(self) -> int:
        """Tokens a page."""
        return self.pages.shape[2]


class GroupedAttention(Protocol):
    """Attention of layers whose KV heads lie in several cache groups, on one platform."""

    @property
    def layers(self) -> Collection[str]:
        """See `Runner`."""

    def plan(
        self, step: Step, tables: list[torch.Tensor], slots: list[torch.Tensor], pool: Pool
    ) -> Any:
        """What all layers of a step share.

        Args:
            step: the step; its block table is that of one group.
            tables: int32 [requests, n] of each group.
            slots: int64 [tokens] of each group, where new tokens go; negative ones are padding.
            pool: where the heads lie.
        """

    def run(
        self, plan: Any, layer: str, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """See `Runner.run`; the cache is the pool's pages."""

    def store(
        self,
        plan: Any,
        layer: str,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        pool: Pool,
    ) -> None:
        """Writes new keys and values into their heads' pages.

        Args:
            plan: of the step; None in a run without metadata, which stores nothing.
            layer: its name.
            key: [tokens, kv_heads, head_size].
            value: [tokens, kv_heads, head_size].
            slots: int64 [tokens] of the layer's first unit.
            pool: where the heads lie.
        """


class HeadUnit(AttentionLayerBase):
    """Further KV heads of an attention layer, with a cache and a block table of their own."""

    def __init__(self, layer: Any, backend: Any) -> None:
        """Stands for a unit of `layer`, whose `backend` customises the cache's spec."""
        self.layer, self.backend, self.impl = layer, backend, layer.impl
        self.num_heads = layer.num_heads
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> Any:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return self.layer.get_kv_cache_spec(vllm_config)


@dataclass
class GroupedPlan:
    """A step's plan, complete once every cache group has handed in its block table.

    Attributes:
        tables: int32 [requests, n] of each group.
        slots: int64 [tokens] of each group, where new tokens go.
        plan: of all layers.
    """

    tables: list[torch.Tensor] = field(default_factory=list)
    slots: list[torch.Tensor] = field(default_factory=list)
    plan: Any = None


@dataclass
class HeadGroups:
    """All attention layers of a worker, cut into units; attention of them all.

    Attributes:
        heads: KV heads a unit.
        units: by layer name, its units' names; the first is the layer's own.
        order: by layer name, its local KV heads, unit by unit.
        attention: vLLM's layers by name, units included.
        groups: cache groups that vLLM makes of the units.
    """

    heads: int
    units: dict[str, list[str]]
    order: dict[str, list[int]]
    attention: Mapping[str, Any]
    groups: int
    _members: list[frozenset[str]] = field(default_factory=list)
    _served: GroupedAttention | None = None
    _step: GroupedPlan = field(default_factory=GroupedPlan)
    _pool: Pool | None = None

    @property
    def home(self) -> str:
        """The first layer's first unit."""
        return next(iter(self.units))

    @property
    def layers(self) -> dict[str, list[str]]:
        return self.units

    def join(self, layer_names: list[str], attention: GroupedAttention | None) -> None:
        """A metadata builder joins; vLLM makes them in the order of its cache groups.

        It makes them twice where it measures CUDA graphs before it allocates the cache.

        Args:
            layer_names: units of the builder's group.
            attention: of all layers, from the builder of the home unit; else None.
        """
        members = frozenset(layer_names)
        if members not in self._members:
            self._members.append(members)
        self._served = attention or self._served
        self._pool = None

    def hand_in(self, layer_names: list[str], step: Step, slots: torch.Tensor) -> Planned:
        """A cache group's part of a step; with the last one the plan is made.

        vLLM builds the metadata of all groups one after the other, always in the same order
        (v1/worker/gpu_model_runner.py, `_build_attention_metadata`), before any layer runs.

        Args:
            layer_names: units of the group, as it joined.
            step: the step, with the group's block table.
            slots: int64 [tokens], where the group stores new tokens; negative ones are padding.

        Returns:
            The plan that all groups of the step share.
        """
        group = self._members.index(frozenset(layer_names))
        if group == 0:
            self._step = GroupedPlan()
        assert len(self._step.tables) == group, "vLLM left a cache group out"
        self._step.tables.append(step.block_table)
        self._step.slots.append(slots)
        if group == len(self._members) - 1:
            assert self._served is not None
            parts = self._step
            parts.plan = self._served.plan(step, parts.tables, parts.slots, self.pool)
        return Planned(self, self._step)

    def run(
        self,
        plan: GroupedPlan,
        layer: str,
        query: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See `SparseAttention.run`; the cache is the pool, of which `cache` is a part."""
        assert self._served is not None
        self._served.run(plan.plan, layer, query, self.pool.pages, output)

    def store(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Writes new keys and values into their heads' pages.

        Args:
            layer: the attention layer.
            key: [tokens, kv_heads, head_size].
            value: [tokens, kv_heads, head_size].
            slots: int64 [tokens], where the layer's first unit stores them.
        """
        assert self._served is not None
        metadata = get_forward_context().attn_metadata
        plan = None if metadata is None else metadata[self.home].planned.plan.plan
        self._served.store(plan, layer.layer_name, key, value, slots, self.pool)

    @property
    def pool(self) -> Pool:
        """Where the heads lie, once the cache is allocated."""
        if self._pool is None:
            self._pool = self._find()
        return self._pool

    def _find(self) -> Pool:
        cache = self.attention[self.home].kv_cache
        page, width = cache.shape[2:]
        size = page * width
        count = cache.untyped_storage().nbytes() // cache.element_size() // size
        of_unit = {unit: at for at, members in enumerate(self._members) for unit in members}
        offset = torch.empty(len(self.units), len(self.order[self.home]), dtype=torch.int64)
        group = torch.empty_like(offset)
        for row, name in enumerate(self.units):
            for at, head in enumerate(self.order[name]):
                unit = self.units[name][at // self.heads]
                start = self.attention[unit].kv_cache.storage_offset()
                offset[row, head] = start // size + at % self.heads
                group[row, head] = of_unit[unit]
        return Pool(
            pages=cache.as_strided((count, 1, page, width), (size, size, width, 1), 0),
            offset=offset,
            group=group,
            heads=self.heads,
            rows={name: row for row, name in enumerate(self.units)},
        )


def split_layers(
    attention: dict[str, Any],
    heads: int,
    order: dict[str, list[int]],
    backends: Mapping[str, list[Any]],
    groups: int,
) -> None:
    """Cuts layers into units and hands them to their implementations.

    Args:
        attention: vLLM's attention layers by name; units are added.
        heads: KV heads a unit.
        order: by layer name, its local KV heads, unit by unit.
        backends: by layer name, each unit's backend.
        groups: cache groups that vLLM makes of the units.
    """
    units = {
        name: [name, *(f"{name}.kv{unit}" for unit in range(1, len(each)))]
        for name, each in backends.items()
    }
    made = HeadGroups(heads, units, order, attention, groups)
    for name, each in backends.items():
        layer = attention[name]
        layer.impl.groups = made
        for unit, backend in zip(units[name][1:], each[1:], strict=True):
            attention[unit] = HeadUnit(layer, backend)
