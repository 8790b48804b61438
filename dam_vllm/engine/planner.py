"""A step's plan for some layers: query blocks, selected pages, virtual sequences and their schedules."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from dam_vllm.attention.cpu.plan import VirtualPages, build_plan
from dam_vllm.attention.query_blocks import cut_query_blocks
from dam_vllm.engine.checks import Serving
from dam_vllm.engine.counters import COUNTS
from dam_vllm.engine.dynamic import DynamicStep, layer_dynamic
from dam_vllm.engine.naive import FP8_DTYPES
from dam_vllm.engine.shards import Shard
from dam_vllm.engine.virtual import Scheduler, VirtualBatch
from dam_vllm.masks.page_tables import PageSelector


class Step(Protocol):
    """Geometry of a step, as vLLM's metadata has it.

    Attributes:
        query_start_loc: int32 [requests + 1], first query row of each request.
        seq_lens: int32 [requests], tokens of each request up to its last query.
        max_query_len: most queries of a request.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_query_len: int


class Planner:
    """Plans steps for layers that the masks cover, all at once.

    Attributes:
        layers: global indices by layer name.
        selector: page tables of these layers.
        dense_until: positions before it read every page, in tokens.
    """

    def __init__(
        self, serving: Serving, layers: Mapping[str, int], local: Shard, scheduler: Scheduler,
        page: int,
    ) -> None:  # fmt: skip
        """Rounds the masks up to pages.

        Args:
            serving: options and masks.
            layers: global indices by layer name.
            local: KV heads of this rank.
            scheduler: schedules virtual sequences.
            page: tokens a page.
        """
        self.layers, self._serving, self._local = layers, serving, local
        self._scheduler = scheduler
        tables = [local.tables(serving.masks, layer, page) for layer in layers.values()]
        self.selector = PageSelector(tables, serving.options.dense_below)
        self.dense_until = self.selector.dense_blocks * self.selector.query_block
        self._all = list(range(self.selector.heads))
        self._static = {
            name: [head for head in self._all if head not in local.dynamic_heads(serving.masks, i)]
            for name, i in layers.items()
        }

    def set_up_dynamic(self, attention: Mapping[str, Any]) -> None:
        """Hands dynamic heads to their layers' implementations.

        Args:
            attention: vLLM's attention layers by name.
        """
        for row, (name, index) in enumerate(self.layers.items()):
            layer = attention[name]
            impl = layer.impl
            impl.dynamic = layer_dynamic(
                self._serving.masks,
                index,
                row,
                self._local,
                page=self.selector.page,
                dense_below=self.dense_until,
                scale=impl.scale * (layer._k_scale_float if impl.is_fp8_kv_cache else 1.0),
                softcap=impl.logits_soft_cap,
                stored=FP8_DTYPES.get(impl.kv_cache_dtype),
                scheduler=self._scheduler,
            )

    def whole_layers(self, block_table: torch.Tensor) -> VirtualPages:
        """Virtual pages of layers that share one block table, int32 [requests, n]."""
        return VirtualPages.of_layers(block_table, len(self.layers), len(self._all))

    def is_dense(self, step: Step) -> bool:
        """Whether every query of a step reads every page."""
        return int(step.seq_lens.max()) <= self.dense_until

    def virtual(self, step: Step, where: VirtualPages) -> dict[str, VirtualBatch | None]:
        """Virtual sequences of the heads that need no queries to choose their pages.

        Args:
            step: the step.
            where: virtual pages of all layers and heads.

        Returns:
            By layer name; None for a layer without such heads.
        """
        query_blocks = cut_query_blocks(
            step.query_start_loc, step.seq_lens, self.selector.query_block
        )
        plan = build_plan(self.selector, query_blocks, where)
        result: dict[str, VirtualBatch | None] = {}
        for row, name in enumerate(self.layers):
            heads = self._static[name]
            result[name] = self._scheduler.static(plan, row, len(self._all), heads)
            if step.max_query_len > 1:
                pages = (plan.seq_lens[row] + self.selector.page - 1) // self.selector.page
                new = step.query_start_loc.diff()
                COUNTS.add_prefill(
                    pages.view(len(self._all), -1)[heads], query_blocks, new, self.selector.page
                )
        return result

    def dynamic(self, step: Step, where: VirtualPages) -> DynamicStep:
        """What dynamic heads need; arguments as for `virtual`."""
        query_blocks = cut_query_blocks(step.query_start_loc, step.seq_lens, self.selector.page)
        return DynamicStep(query_blocks, step.query_start_loc.diff(), where)

    def dense(self, step: Step, where: VirtualPages) -> dict[str, VirtualBatch | None]:
        """Virtual sequences of all heads where a whole step is dense; one for each request.

        Arguments and result as for `virtual`.
        """
        heads, tokens = len(self._all), int(step.query_start_loc[-1])
        tables = where.tables().flatten(1, 2)
        rows = torch.arange(heads)[:, None] * tokens + step.query_start_loc[:-1]
        starts = torch.cat([rows.flatten(), torch.tensor([heads * tokens])]).int()
        lens = step.seq_lens.repeat(heads)
        schedule = self._scheduler.schedule(starts, lens)
        return {
            name: VirtualBatch(None, tables[row], lens, starts, schedule)
            for row, name in enumerate(self.layers)
        }

    def count_dense(self, step: Step) -> None:
        """Counts what a dense step reads."""
        if step.max_query_len > 1:
            COUNTS.add_dense(
                step.query_start_loc,
                step.seq_lens,
                self.selector.query_block,
                self.selector.page,
                self.selector.layers * self.selector.heads,
            )
