"""KV heads in several cache groups on CUDA: each head reads its own group's block table.

Kernels find block tables and slots of all groups in memory that is kept, into which those of a
step are copied before it runs, so that a CUDA graph finds them there too.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dam_vllm.attention.cuda.attention import CUDAAttention
from dam_vllm.attention.cuda.places import Homes
from dam_vllm.attention.cuda.rotation import DeviceRotation
from dam_vllm.attention.cuda.store import HeadStore
from dam_vllm.attention.interface import Step
from dam_vllm.engine.kv_free.head_groups import Pool
from dam_vllm.masks.rounding import ceil_div


class CUDAGroups:
    """`GroupedAttention` on CUDA."""

    def __init__(
        self,
        attention: CUDAAttention,
        groups: int,
        scales: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        rotations: Mapping[str, DeviceRotation | None],
    ) -> None:
        """Serves layers.

        Args:
            attention: of all layers.
            groups: cache groups.
            scales: by layer name, see `HeadStore`.
            rotations: likewise.
        """
        self.attention = attention
        limits, take = attention.limits, attention.scratch.take
        pages = ceil_div(limits.length, attention.page)
        tables = take(groups * limits.requests * pages)
        self._tables = tables.view(groups, limits.requests, pages)
        self._slots = take(2 * groups * limits.tokens).view(torch.int64).view(groups, limits.tokens)
        self._told: Pool | None = None
        kv_heads = next(iter(attention.served.values())).kv_heads
        assert attention.unit is not None
        self._stores = {
            name: HeadStore(
                Homes.unknown(kv_heads, attention.unit, attention.device),
                scales[name],
                rotations[name],
            )
            for name in attention.served
        }

    @property
    def layers(self) -> Mapping[str, object]:
        return self.attention.layers

    def plan(
        self, step: Step, tables: list[torch.Tensor], slots: list[torch.Tensor], pool: Pool
    ) -> Any:
        """See `GroupedAttention.plan`; nothing waits for the host after the first plan."""
        self._tell(pool)
        requests = len(tables[0])
        for group, (table, slot) in enumerate(zip(tables, slots, strict=True)):
            width = min(table.shape[1], self._tables.shape[2])
            self._tables[group, :requests, :width].copy_(table[:, :width])
            self._slots[group, : len(slot)].copy_(slot)
        return self.attention.plan(replace(step, block_table=self._tables[:, :requests]))

    def run(
        self, plan: Any, layer: str, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """See `GroupedAttention.run`."""
        self.attention.run(plan, layer, query, cache, output)

    def store(
        self,
        plan: Any,
        layer: str,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        pool: Pool,
    ) -> None:
        """See `GroupedAttention.store`; vLLM's own slots tell what is padding, in any run."""
        keys, values = self.attention.layout.keys_and_values(pool.pages)
        self._stores[layer].write(key, value, keys, values, slots, self._slots)

    def warm_up(self, size: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        """Compiles the kernels that store.

        Args:
            size: channels a head.
            dtypes: of keys and of the cache.
        """
        for store in self._stores.values():
            store.warm_up(size, self.attention.page, dtypes, self._slots)

    def _tell(self, pool: Pool) -> None:
        """Tells the kernels where heads lie, once the cache is allocated."""
        if self._told is pool:
            return
        rows = [pool.rows[name] for name in self.attention.served]
        self.attention.tell(pool.offset[rows], pool.group[rows])
        for name, store in self._stores.items():
            row = pool.rows[name]
            store.homes.tell(pool.offset[row], pool.group[row])
        self._told = pool
