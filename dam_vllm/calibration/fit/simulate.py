"""A model under masks, in transformers: the pages that serving would read, at dense speed."""

import math

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.select import Asking, choose_dynamic
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.query_blocks import QueryBlocks, cut_query_blocks
from dam_vllm.calibration.fit.rows import capped, span_means
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.page_tables import PageSelector, PageTables, page_tables
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.tails import span_pages, unread_spans

ROWS = 128  # queries that are looked at together: few enough to share most of their pages


class Simulation:
    """Hook that computes attention over the pages that masks select.

    The prompt is one prefill; tokens after it are decoded one by one, each with pages of its own.
    One pass of one text, or of its end from the start of a page on: what anchors chose is kept for
    the heads that reuse it.

    Args:
        masks: the mask set.
        page: tokens a page.
        prompt: tokens of the prompt.
        rows: range of the queries that masks hold for, or None for all.
        compared: rows whose logits are wanted, ascending, or None for all: the last layer computes
            no others.
    """

    def __init__(
        self,
        masks: MaskSet,
        page: int,
        prompt: int,
        rows: tuple[int, int] | None = None,
        compared: list[int] | None = None,
    ) -> None:
        self.masks, self.page, self.prompt, self.rows = masks, page, prompt, rows
        self.compared = compared
        self._tables: dict[tuple[int, int | None], PageTables] = {}
        # Pages that anchors chose in this pass, bool [query_blocks, pages], until it ends.
        self._chosen: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, states: LayerStates) -> torch.Tensor | None:
        if self.masks.header.layer_types[states.layer] != "full":
            return None
        modes = self.masks.modes[states.layer]
        sparse = np.flatnonzero(modes != HeadMode.DENSE)
        # Anchors of the same layer choose before the heads that reuse their pages.
        sparse = sparse[np.argsort(modes[sparse] == HeadMode.REUSE, kind="stable")]
        if not len(sparse):
            return None
        first, tokens, kv_heads = states.first, states.key.shape[1], len(states.key)
        result = states.query.new_zeros(*states.query.shape[:2], states.value.shape[-1])
        # Sparse heads need full attention for rows alone that masks do not hold for.
        dense = range(kv_heads) if self.rows else np.flatnonzero(modes == HeadMode.DENSE).tolist()
        for head in dense:
            result[states.query_heads(head)] = _dense(states, head)
        masked = torch.arange(*(self.rows or (first, tokens)))
        if self.compared is not None and states.layer == self.masks.layers - 1:
            masked = torch.tensor(self.compared)
        for head in sparse.tolist():
            found = self.output(states, head, masked, self.pages(states, head))
            result[states.query_heads(head), masked - first] = found
        return result

    def output(
        self, states: LayerStates, head: int, rows: torch.Tensor, pages: torch.Tensor
    ) -> torch.Tensor:
        """A sparse KV head's output for some queries.

        Args:
            states: of the layer.
            head: KV head.
            rows: int64 [queries], ascending.
            pages: bool [queries, pages], of `pages`.

        Returns:
            [heads_per_kv, queries, head_size].
        """
        parts = [
            self.attend(states, head, some, pages[some - states.first]) for some in rows.split(ROWS)
        ]
        return torch.cat(parts, dim=1)

    def attend(
        self, states: LayerStates, head: int, rows: torch.Tensor, pages: torch.Tensor
    ) -> torch.Tensor:
        """Attention of some queries over their pages bool [queries, pages], and its tail.

        No other page is looked at but for means of spans.

        Returns:
            [heads_per_kv, queries, head_size].
        """
        read = pages.any(dim=0).nonzero().squeeze(1)
        keys = (read[:, None] * self.page + torch.arange(self.page)).flatten()
        keys = keys[keys <= rows[-1]]
        mask = pages[:, keys // self.page] & (keys <= rows[:, None])
        if not self.has_tail(states.layer, head):
            return attention(states, head, rows, keys, mask)
        own = rows // self.page
        key, value = span_means(states, head, int(own[-1]) * self.page, self.page)
        unread = unread_spans(pages, own, self.page)[:, : len(key)]
        tail = masked_scores(states, head, rows, key, unread)
        tail += math.log(span_pages(self.page) * self.page)
        scores = masked_scores(states, head, rows, states.key[head, keys], mask)
        weights = torch.cat([scores, tail], dim=-1).softmax(dim=-1)
        return weights @ torch.cat([states.value[head, keys], value])

    def has_tail(self, layer: int, head: int) -> bool:
        """Whether means of spans stand for what a head does not read."""
        return self.masks.tails is not None and bool(self.masks.tails[layer, head])

    def pages(self, states: LayerStates, head: int) -> torch.Tensor:
        """Pages that each of the states' queries reads, bool [queries, pages]."""
        layer, tokens = states.layer, states.key.shape[1]
        count = ceil_div(tokens, self.page)
        static = self.masks.modes[layer, head] == HeadMode.STATIC
        query_block = None if static else self.page
        if (layer, query_block) not in self._tables:
            tables = page_tables(self.masks, layer, self.page, query_block)
            self._tables[layer, query_block] = tables
        selector = PageSelector([self._tables[layer, query_block].take([head])])
        if static:
            index = torch.arange(ceil_div(tokens, selector.query_block))
            selected = selector.select(index, count)[0, 0]
            whole = selected.repeat_interleave(selector.query_block, dim=0)
            return whole[states.first : tokens]
        query_blocks = self._query_blocks(states.first, tokens)
        if self.masks.modes[layer, head] == HeadMode.REUSE:
            own = selector.select(query_blocks.index, count)[0, 0]
            chosen = self._chosen[self.masks.anchor(layer, head)]
        else:
            own, chosen = self._choose(states, head, selector, query_blocks)
            self._chosen[layer, head] = chosen
        return (own | chosen).repeat_interleave(query_blocks.stop - query_blocks.start, dim=0)

    def _query_blocks(self, begin: int, tokens: int) -> QueryBlocks:
        """The prompt, from a page on, cut at pages; then every later token on its own."""
        prompt = torch.tensor([0, self.prompt], dtype=torch.int32)
        first = cut_query_blocks(prompt, prompt[1:], self.page)
        later = torch.arange(self.prompt, tokens)
        first = first.take(first.start >= begin)
        return QueryBlocks(
            request=torch.cat([first.request, torch.arange(len(later)) + 1]),
            index=torch.cat([first.index, later // self.page]),
            row=torch.cat([first.row, later]) - begin,
            start=torch.cat([first.start, later]),
            stop=torch.cat([first.stop, later + 1]),
            tokens=tokens,
        )

    def _choose(
        self, states: LayerStates, head: int, selector: PageSelector, query_blocks: QueryBlocks
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Static pages of a dynamic head, and chosen ones, bool [query_blocks, pages] each."""
        assert self.masks.dynamic is not None
        layer = states.layer
        rotation = torch.from_numpy(self.masks.dynamic.rotations[layer, head])
        heads = states.query[states.query_heads(head)].float()
        query = [(heads @ rotation).transpose(0, 1)]
        key = states.key[head].float() @ rotation
        cache = pad(key, (0, 0, 0, -len(key) % self.page)).view(-1, self.page, key.shape[1])
        dynamic = DynamicHeads(
            channels=[int(self.masks.dynamic.channels[layer, head])],
            budgets=[self.masks.dynamic.budget(layer, head, self.page)],
            static=selector,
            scale=states.scale,
            softcap=states.softcap,
        )
        table = torch.arange(len(cache), dtype=torch.int32).expand(1, query_blocks.tokens + 1, -1)
        keys = CachedKeys(cache.transpose(1, 2).contiguous())
        asking = Asking.of(query_blocks)
        static = selector.select(query_blocks.index, asking.pages)[0]
        return static[0], choose_dynamic(dynamic, query, keys, asking, table, static)[0]


def _dense(states: LayerStates, head: int) -> torch.Tensor:
    """Full attention of a KV head's query heads: [heads_per_kv, tokens, head_size]."""
    if not states.softcap and not states.first:
        query = states.query[states.query_heads(head)]
        return scaled_dot_product_attention(
            query[None], states.key[None, head, None], states.value[None, head, None],
            is_causal=True, scale=states.scale, enable_gqa=True,
        )[0]  # fmt: skip
    position = torch.arange(states.first, states.key.shape[1])
    parts = [full_attention(states, head, rows) for rows in position.split(ROWS)]
    return torch.cat(parts, dim=1)


def full_attention(states: LayerStates, head: int, rows: torch.Tensor) -> torch.Tensor:
    """Full attention of some queries, ascending: [heads_per_kv, queries, head_size]."""
    keys = torch.arange(int(rows[-1]) + 1)
    return attention(states, head, rows, keys, keys <= rows[:, None])


def attention(
    states: LayerStates, head: int, rows: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Attention of some queries over some keys under a mask bool [queries, keys].

    Fused: a third of the time of product, mask and softmax for 128 queries of 2 heads on 1500 keys.
    """
    if states.softcap:
        scores = masked_scores(states, head, rows, states.key[head, keys], mask)
        return scores.softmax(dim=-1) @ states.value[head, keys]
    return scaled_dot_product_attention(
        states.query[states.query_heads(head)][None, :, rows - states.first],
        states.key[None, None, head, keys], states.value[None, None, head, keys],
        attn_mask=mask, scale=states.scale, enable_gqa=True,
    )[0]  # fmt: skip


def masked_scores(
    states: LayerStates, head: int, rows: torch.Tensor, key: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Scores of some queries on [keys, head_size], -inf outside of a mask bool [queries, keys]."""
    query = states.query[states.query_heads(head)][:, rows - states.first]
    scores = capped(query @ key.t() * states.scale, states.softcap)
    return scores.masked_fill(~mask, float("-inf"))
