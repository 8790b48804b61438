"""Layers whose KV heads lie in several of vLLM's cache groups, so that some can free pages.

Each layer is cut into *units* of as many KV heads. To vLLM a unit is a layer: the attention layer
itself stands for its first unit, a `HeadUnit` for each other one. All units' caches lie in one
allocation, [blocks, heads a unit, page, 2 * head_size] each, one after the other or on top of each
other where their groups differ; seen as one pool of virtual pages, a layer's attention is still
one call of the kernel, and so is storing its keys.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from dam_vllm.attention.cpu.attention import CPUAttention, CPUPlan
from dam_vllm.attention.cpu.plan import VirtualPages
from dam_vllm.attention.interface import Planned, Step
from dam_vllm.masks.rounding import ceil_div

PADDING = -(2**62)  # negative, whatever is added


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
        placed: int64 [groups, tokens], slots in the pool but for each head's offset.
    """

    tables: list[torch.Tensor] = field(default_factory=list)
    slots: list[torch.Tensor] = field(default_factory=list)
    plan: CPUPlan | None = None
    placed: torch.Tensor | None = None


@dataclass
class HeadGroups:
    """All attention layers of a worker, cut into units; attention of them all.

    Attributes:
        heads: KV heads a unit.
        units: by layer name, its units' names; the first is the layer's own.
        order: by layer name, its local KV heads, unit by unit.
        attention: vLLM's layers by name, units included.
    """

    heads: int
    units: dict[str, list[str]]
    order: dict[str, list[int]]
    attention: Mapping[str, Any]
    _members: list[frozenset[str]] = field(default_factory=list)
    _served: CPUAttention | None = None
    _step: GroupedPlan = field(default_factory=GroupedPlan)

    @property
    def home(self) -> str:
        """The first layer's first unit."""
        return next(iter(self.units))

    @property
    def layers(self) -> dict[str, list[str]]:
        return self.units

    def join(self, layer_names: list[str], attention: CPUAttention | None) -> None:
        """A metadata builder joins; vLLM makes them in the order of its cache groups.

        Args:
            layer_names: units of the builder's group.
            attention: of all layers, from the builder of the home unit; else None.
        """
        members = frozenset(layer_names)
        if members not in self._members:
            self._members.append(members)
        self._served = attention or self._served

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
            self._complete(self._step, step)
        return Planned(self, self._step)

    def plan(self, step: Step) -> GroupedPlan:
        """A step's plan needs the block tables of all groups: see `hand_in`."""
        raise NotImplementedError

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
        assert plan.plan is not None
        self._served.run(plan.plan, layer, query, self.pool, output)

    def store(self, layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes new keys and values into their heads' pages.

        Args:
            layer: the attention layer.
            key: [tokens, kv_heads, head_size].
            value: [tokens, kv_heads, head_size].
        """
        assert self._served is not None
        plan: GroupedPlan = get_forward_context().attn_metadata[self.home].planned.plan
        assert plan.placed is not None
        row, page = self._rows[layer.layer_name], self.pool.shape[2]
        slots = (plan.placed[self._groups[row]] + self.offset[row, :, None] * page).t()
        size = key.shape[-1]
        self._served.kernel.store(
            key[: len(slots)].reshape(-1, size),
            value[: len(slots)].reshape(-1, size),
            *self._served.layout.keys_and_values(self.pool),
            slots.flatten(),
            self._served.served[layer.layer_name],
        )

    def _complete(self, plan: GroupedPlan, step: Step) -> None:
        served = self._served
        assert served is not None
        page = self.pool.shape[2]
        pages = ceil_div(int(step.seq_lens.max()), page)
        blocks = torch.stack([table[:, :pages] for table in plan.tables])
        where = VirtualPages(blocks, self._groups, self.offset, self.heads)
        if int(step.seq_lens.max()) <= served.dense_until:
            served.count_dense(step)
            plan.plan = served.plan_dense(step, where)
        else:
            plan.plan = served.plan_over(step, where)
        slots = torch.stack(plan.slots)
        placed = slots // page * (self.heads * page) + slots % page
        plan.placed = torch.where(slots < 0, PADDING, placed)

    @functools.cached_property
    def pool(self) -> torch.Tensor:
        """All virtual pages: [pages, 1, page, 2 * head_size]."""
        cache = self.attention[self.home].kv_cache
        page, width = cache.shape[2:]
        size = page * width
        count = cache.untyped_storage().nbytes() // cache.element_size() // size
        return cache.as_strided((count, 1, page, width), (size, size, width, 1), 0)

    @functools.cached_property
    def offset(self) -> torch.Tensor:
        """Virtual page of each head in block 0, int64 [layers, heads]."""
        size = self.pool[0].numel()
        result = torch.empty(len(self.units), len(self.order[self.home]), dtype=torch.int64)
        for row, name in enumerate(self.units):
            for at, head in enumerate(self.order[name]):
                cache = self.attention[self.units[name][at // self.heads]].kv_cache
                result[row, head] = cache.storage_offset() // size + at % self.heads
        return result

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.units)}

    @functools.cached_property
    def _groups(self) -> torch.Tensor:
        """Each head's cache group, int64 [layers, heads]."""
        of_unit = {unit: at for at, members in enumerate(self._members) for unit in members}
        group = torch.empty_like(self.offset)
        for row, name in enumerate(self.units):
            for at, head in enumerate(self.order[name]):
                group[row, head] = of_unit[self.units[name][at // self.heads]]
        return group


def split_layers(
    attention: dict[str, Any],
    heads: int,
    order: dict[str, list[int]],
    backends: Mapping[str, list[Any]],
) -> None:
    """Cuts layers into units and hands them to their implementations.

    Args:
        attention: vLLM's attention layers by name; units are added.
        heads: KV heads a unit.
        order: by layer name, its local KV heads, unit by unit.
        backends: by layer name, each unit's backend.
    """
    units = {
        name: [name, *(f"{name}.kv{unit}" for unit in range(1, len(each)))]
        for name, each in backends.items()
    }
    groups = HeadGroups(heads, units, order, attention)
    for name, each in backends.items():
        layer = attention[name]
        layer.impl.groups = groups
        for unit, backend in zip(units[name][1:], each[1:], strict=True):
            attention[unit] = HeadUnit(layer, backend)
