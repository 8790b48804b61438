"""Sparse attention on CPU: virtual sequences over virtual pages, run by a dense paged kernel.

The kernel is handed in, since vLLM's own one does: it computes exact attention over the pages that
its block tables list.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dam_vllm.attention.chosen_pages import ChosenPages
from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.choosing import Choosing, ChoosingHeads
from dam_vllm.attention.cpu.kernel import CPULayer, PagedKernel, VirtualBatch
from dam_vllm.attention.cpu.layer_tails import LayerTails
from dam_vllm.attention.cpu.plan import Plan, VirtualPages, build_plan, plan_pages
from dam_vllm.attention.cpu.select import choose_dynamic
from dam_vllm.attention.cpu.span_means import EndedSpans
from dam_vllm.attention.cpu.workspace import WORKSPACE
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.page_counts import PageCounts, QueryWeights
from dam_vllm.attention.query_blocks import QueryBlocks, cut_query_blocks
from dam_vllm.masks.page_tables import PageSelector
from dam_vllm.masks.rounding import ceil_div


@dataclass(frozen=True)
class CPUPlan:
    """A step's plan for all layers.

    Attributes:
        fixed: by layer name, virtual sequences of the heads whose pages are known, or None without
            such heads.
        choosing: for dynamic and reusing heads; None without any, and where they read everything.
        where: virtual pages of all layers and heads.
        tokens: query rows of the step, without padding.
        ended: spans whose means the step writes; None without any, and without tails.
    """

    fixed: Mapping[str, VirtualBatch | None]
    choosing: Choosing | None
    where: VirtualPages
    tokens: int
    ended: EndedSpans | None


@dataclass(frozen=True)
class CPUAttention:
    """Sparse attention of layers that share page size and number of KV heads.

    Attributes:
        served: layers by name.
        selector: page tables of these layers, in this order.
        kernel: computes attention over selected pages.
        layout: of the cache.
        chosen: bool [query blocks, pages] of what anchors chose in this step.
        counts: counts what is read, or None.
    """

    served: Mapping[str, CPULayer]
    selector: PageSelector
    kernel: PagedKernel
    layout: KVLayout
    chosen: ChosenPages[torch.Tensor] = field(default_factory=ChosenPages)
    counts: PageCounts | None = None
    _rows: Mapping[str, int] = field(init=False)
    _fixed_heads: tuple[torch.Tensor, torch.Tensor] = field(init=False)
    _choosing: ChoosingHeads | None = field(init=False)
    _tails: LayerTails = field(init=False)

    def __post_init__(self) -> None:
        rows = {name: row for row, name in enumerate(self.served)}
        object.__setattr__(self, "_rows", rows)
        fixed = [(row, head) for row, name in enumerate(rows) for head in self.served[name].fixed]
        row, head = torch.tensor(fixed, dtype=torch.int64).view(-1, 2).unbind(1)
        object.__setattr__(self, "_fixed_heads", (row, head))
        object.__setattr__(self, "_choosing", ChoosingHeads.of(self.served))
        tails = LayerTails.of(self.served, self.selector, self.layout)
        object.__setattr__(self, "_tails", tails)

    @property
    def layers(self) -> Mapping[str, CPULayer]:
        return self.served

    @property
    def dense_until(self) -> int:
        """Positions before it read every page, in tokens."""
        return self.selector.dense_blocks * self.selector.query_block

    def plan(self, step: Step) -> CPUPlan:
        """The step's plan, over block tables that the layers share."""
        return self.plan_over(step, self._where(step))

    def _where(self, step: Step) -> VirtualPages:
        pages = ceil_div(int(step.seq_lens.max()), self.selector.page)
        table = step.block_table[:, :pages]
        return VirtualPages.of_layers(table, self.selector.layers, self.selector.heads)

    def plan_over(self, step: Step, where: VirtualPages) -> CPUPlan:
        """The step's plan over virtual pages of all layers and heads, wherever they lie."""
        blocks = cut_query_blocks(step.query_start_loc, step.seq_lens, self.selector.query_block)
        plan = build_plan(self.selector, blocks, where, self._tails.fixed)
        self._count_fixed(plan, self._weights(blocks, step))
        fixed = {
            name: self._fixed(plan, row, layer.fixed)
            for row, (name, layer) in enumerate(self.served.items())
        }
        choosing = None
        if self._choosing is not None:
            asked = cut_query_blocks(step.query_start_loc, step.seq_lens, self.selector.page)
            choosing = self._choosing.plan(asked, self._weights(asked, step))
        return CPUPlan(fixed, choosing, where, step.tokens, self._tails.ended(step))

    def _weights(self, blocks: QueryBlocks, step: Step) -> QueryWeights | None:
        if self.counts is None:
            return None
        return QueryWeights.of(blocks, step.query_start_loc.diff(), self.selector.page)

    def plan_dense(self, step: Step) -> CPUPlan:
        """The plan of a step all of whose queries read everything."""
        return self.plan_dense_over(step, self._where(step))

    def plan_dense_over(self, step: Step, where: VirtualPages) -> CPUPlan:
        """The same over virtual pages wherever they lie; one sequence a request."""
        heads = self.selector.heads
        tables = where.tables().flatten(1, 2)
        rows = torch.arange(heads)[:, None] * step.tokens + step.query_start_loc[:-1]
        starts = torch.cat([rows.flatten(), torch.tensor([heads * step.tokens])]).int()
        lens = step.seq_lens.repeat(heads)
        schedule = self.kernel.schedule(starts, lens)
        fixed = {
            name: VirtualBatch(None, tables[row], lens, starts, schedule)
            for row, name in enumerate(self.served)
        }
        return CPUPlan(fixed, None, where, step.tokens, self._tails.ended(step))

    def ends_spans(self, step: Step) -> bool:
        """Whether means of spans are to be written in a step."""
        return self._tails.ended(step) is not None

    def _write_means(
        self, plan: CPUPlan, layer: str, cache: torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Writes the means of a layer's spans that end in a step."""
        heads = self._tails.heads.get(layer)
        if heads is not None and plan.ended is not None:
            where = plan.where.take(self._rows[layer], heads)
            self._tails.write(plan.ended, where, cache, dtype)

    def count_dense(self, step: Step) -> None:
        """Counts what a step reads all of whose queries read everything."""
        if self.counts is not None:
            layers = [layer.index for layer in self.served.values()]
            self.counts.add_whole(
                layers, step.query_start_loc, step.seq_lens, self.selector.query_block,
                self.selector.page,
            )  # fmt: skip

    def run(
        self,
        plan: CPUPlan,
        layer: str,
        query: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See `SparseAttention.run`."""
        tokens, (heads, size) = plan.tokens, query.shape[1:]
        shape = (tokens, self.selector.heads, heads // self.selector.heads, size)
        asked, result = query[:tokens].view(shape), output[:tokens].view(shape)
        batches, served = [plan.fixed[layer]], self.served[layer]
        self._write_means(plan, layer, cache, query.dtype)
        if served.choosing and plan.choosing is not None:
            selected = self.select(plan, layer, asked, cache)
            batches.append(self._chosen(plan, layer, selected))
        for batch in batches:
            if batch is not None:
                self._attend(served, asked, cache, batch, result)

    def select(
        self, plan: CPUPlan, layer: str, query: torch.Tensor, cache: torch.Tensor
    ) -> torch.Tensor:
        """Selects the pages of a layer's dynamic and reusing heads for the queries at hand.

        Args:
            plan: the step's.
            layer: its name.
            query: [tokens, kv_heads, heads_per_kv, head_size], rotated.
            cache: [blocks, kv_heads, page, 2 * head_size], which holds these queries' keys.

        Returns:
            bool [heads, query blocks, pages] of the layer's `choosing` heads, static ones included.
        """
        assert plan.choosing is not None
        assert self._choosing is not None
        served, heads = self.served[layer], self._choosing.heads[layer]
        static, chosen = plan.choosing.static[self._choosing.rows[layer]], []
        if served.dynamic is not None:
            dynamic, heads = served.dynamic, heads[: len(served.dynamic.ids)]
            scoring = query[..., : max(dynamic.channels)].unbind(1)
            asked = [scoring[head] for head in heads.tolist()]
            tables = plan.where.take(self._rows[layer], heads).tables()[0]
            keys = CachedKeys(self.layout.channels(cache), self.layout.stored)
            found = choose_dynamic(
                dynamic, asked, keys, plan.choosing.asking, tables, static[: len(heads)]
            )
            self.chosen.keep(served.index, dict(zip(dynamic.ids, found, strict=True)))
            chosen += list(found)
        if served.reusing is not None:
            chosen += self.chosen.of(served.reusing.anchors)
        self.chosen.drop(served.index)
        return static | torch.stack(chosen)

    def _chosen(self, plan: CPUPlan, layer: str, selected: torch.Tensor) -> VirtualBatch:
        """Virtual sequences of a layer's dynamic and reusing heads."""
        assert plan.choosing is not None
        assert self._choosing is not None
        heads, weights = self._choosing.heads[layer], plan.choosing.weights
        where = plan.where.take(self._rows[layer], heads)
        blocks = plan.choosing.asking.blocks
        tails = self._tails.choosing[layer]
        made = plan_pages(selected[None], where, blocks, self.selector.page, tails)
        table, lens, starts = made.block_table[0], made.seq_lens[0], made.query_start_loc
        if self.counts is not None and weights is not None:
            pages = ceil_div(lens, self.selector.page).view(len(heads), -1)
            row = torch.full_like(heads, self.counts.row(self.served[layer].index))
            self.counts.add((row, heads), pages, weights)
        schedule = self.kernel.schedule(starts, lens)
        return VirtualBatch(heads, table, lens, starts, schedule, made.unread[0])

    def _count_fixed(self, plan: Plan, weights: QueryWeights | None) -> None:
        """Counts a new step's heads whose pages are known; the worker's first layer begins it."""
        if self.counts is None or weights is None:
            return
        indices = [layer.index for layer in self.served.values()]
        if self.counts.layers[0] in indices:
            self.counts.begin_step()
        rows, heads = self._fixed_heads
        pages = ceil_div(plan.seq_lens, self.selector.page)
        pages = pages.view(self.selector.layers, self.selector.heads, -1)[rows, heads]
        counted = torch.tensor([self.counts.row(index) for index in indices])[rows]
        self.counts.add((counted, heads), pages, weights)

    def _fixed(self, plan: Plan, row: int, heads: Sequence[int]) -> VirtualBatch | None:
        """A layer's part of a plan that covers all KV heads, cut to some of them."""
        table, lens, starts = plan.block_table[row], plan.seq_lens[row], plan.query_start_loc
        kv_heads, unread = self.selector.heads, plan.unread[row]
        if len(heads) == kv_heads:
            schedule = self.kernel.schedule(starts, lens)
            return VirtualBatch(None, table, lens, starts, schedule, unread)
        if not heads:
            return None
        each, which = len(lens) // kv_heads, torch.tensor(heads)
        lens = lens.view(kv_heads, each)[which].flatten()
        table = table.view(kv_heads, each, -1)[which].flatten(0, 1)
        # Queries lie head by head and as long for every head: the first heads' starts hold.
        starts = starts[: len(lens) + 1].contiguous()
        unread = None if unread is None else unread.among(heads, each)
        return VirtualBatch(which, table, lens, starts, self.kernel.schedule(starts, lens), unread)

    def _attend(
        self,
        layer: CPULayer,
        query: torch.Tensor,
        cache: torch.Tensor,
        batch: VirtualBatch,
        output: torch.Tensor,
    ) -> None:
        """Runs the kernel on [tokens, kv_heads, heads_per_kv, head_size]; the batch's heads."""
        tokens, kv_heads, *rest = query.shape
        kv_heads = kv_heads if batch.heads is None else len(batch.heads)
        by_head, result = WORKSPACE.take(2, (kv_heads, tokens, *rest), query.dtype)
        if batch.heads is None:
            by_head.copy_(query.transpose(0, 1))
        else:
            torch.index_select(query.transpose(0, 1), 0, batch.heads, out=by_head)
        keys, values = self.layout.keys_and_values(cache)
        asked, found = by_head.flatten(0, 1), result.flatten(0, 1)
        self.kernel.attend(asked, keys, values, found, batch, layer)
        self._tails.add(layer, batch, asked, cache, found)
        if batch.heads is None:
            output.copy_(result.transpose(0, 1))
        else:
            # `index_copy_` takes four times as long for many tokens.
            for head, rows in zip(batch.heads.tolist(), result, strict=True):
                output[:, head].copy_(rows)
