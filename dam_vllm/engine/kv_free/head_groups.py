"""Layers whose KV heads lie in several of vLLM's cache groups, so that some can free pages.

Each layer is cut into *units* of as many KV heads. To vLLM a unit is a layer: the attention layer
itself stands for its first unit, a `HeadUnit` for each other one. All units' caches lie in one
allocation, [blocks, heads a unit, page, 2 * head_size] each, one after the other or on top of each
other where their groups differ; seen as one pool of virtual pages, a layer's attention is still
one call of the kernel, and so is storing its keys.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from dam_vllm.attention.cpu.plan import VirtualPages
from dam_vllm.engine.planner import Planner

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
class SplitLayers:
    """All attention layers of a worker, cut into units.

    Attributes:
        heads: KV heads a unit.
        units: by layer name, its units' names; the first is the layer's own.
        order: by layer name, its local KV heads, unit by unit.
        attention: vLLM's layers by name, units included.
        planner: plans a step for all layers; set once the metadata builders exist.
    """

    heads: int
    units: dict[str, list[str]]
    order: dict[str, list[int]]
    attention: Mapping[str, Any]
    planner: Planner | None = None

    @property
    def home(self) -> str:
        """The unit whose metadata holds the step's plan."""
        return next(iter(self.units))

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

    def plan(self) -> Any:
        """This step's metadata with the plan of all layers, made by the first layer that asks."""
        step = get_forward_context().attn_metadata
        metadata = step[self.home]
        if metadata.virtual is None:
            assert self.planner is not None
            where = self._where(step, int(metadata.seq_lens.max()))
            if self.planner.is_dense(metadata):
                self.planner.count_dense(metadata)
                metadata.virtual = self.planner.dense(metadata, where)
            else:
                metadata.virtual = self.planner.virtual(metadata, where)
                metadata.dynamic = self.planner.dynamic(metadata, where)
        return metadata

    def store(self, impl: Any, layer: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        """Writes new keys and values into their heads' pages.

        Args:
            impl: the attention implementation, for the cache's dtype.
            layer: the attention layer.
            key: [tokens, kv_heads, head_size].
            value: [tokens, kv_heads, head_size].
        """
        slots = self._slots(layer.layer_name)
        page, width = self.pool.shape[2:]
        keys, values = self.pool.view(-1, 1, 2 * page, width // 2).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key[: len(slots)].reshape(-1, 1, width // 2),
            value[: len(slots)].reshape(-1, 1, width // 2),
            keys,
            values,
            slots.flatten(),
            layer.isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=impl.kv_cache_dtype,
        )

    def _slots(self, name: str) -> torch.Tensor:
        """Slots of new tokens in the pool, int64 [tokens, kv_heads]; negative ones are padding."""
        context = get_forward_context()
        metadata, page = context.attn_metadata[self.home], self.pool.shape[2]
        group, members = self._groups
        if metadata.slots is None:
            slots = torch.stack([context.slot_mapping[unit] for unit in members])
            placed = slots // page * (self.heads * page) + slots % page
            metadata.slots = torch.where(slots < 0, PADDING, placed)
        row = self._rows[name]
        return (metadata.slots[group[row]] + self.offset[row, :, None] * page).t()

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.units)}

    def _where(self, step: Mapping[str, Any], tokens: int) -> VirtualPages:
        """This step's virtual pages of all layers and heads, for requests of at most `tokens`."""
        pages = -(-tokens // self.pool.shape[2])
        blocks = [step[name].block_table[:, :pages] for name in self._groups[1]]
        return VirtualPages(torch.stack(blocks), self._groups[0], self.offset, self.heads)

    @functools.cached_property
    def _groups(self) -> tuple[torch.Tensor, list[str]]:
        """Each head's cache group, int64 [layers, heads], and a unit of each group.

        Units of a group share one metadata object.
        """
        step = get_forward_context().attn_metadata
        found: dict[int, int] = {}
        members: list[str] = []
        group = torch.empty_like(self.offset)
        for row, name in enumerate(self.units):
            for at, head in enumerate(self.order[name]):
                unit = self.units[name][at // self.heads]
                if id(step[unit]) not in found:
                    found[id(step[unit])] = len(found)
                    members.append(unit)
                group[row, head] = found[id(step[unit])]
        return group, members
