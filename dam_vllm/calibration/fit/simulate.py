"""A model under masks, in transformers: the pages that serving would read, at dense speed."""

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from dam_vllm.attention.cpu.select import CachedKeys, select_dynamic
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.query_blocks import QueryBlocks, cut_query_blocks
from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.page_tables import PageSelector, page_tables
from dam_vllm.masks.rounding import ceil_div

ROWS = 512


class Simulation:
    """Hook that computes attention over the pages that masks select.

    The prompt is one prefill; tokens after it are decoded one by one, each with pages of its own.

    Args:
        masks: the mask set.
        page: tokens a page.
        prompt: tokens of the prompt.
        rows: range of the queries that masks hold for, or None for all.
    """

    def __init__(
        self, masks: MaskSet, page: int, prompt: int, rows: tuple[int, int] | None = None
    ) -> None:
        self.masks, self.page, self.prompt, self.rows = masks, page, prompt, rows

    def __call__(self, states: LayerStates) -> torch.Tensor | None:
        if self.masks.header.layer_types[states.layer] != "full":
            return None
        sparse = np.flatnonzero(self.masks.modes[states.layer] != HeadMode.DENSE)
        if not len(sparse):
            return None
        first, last = self.rows or (0, states.query.shape[1])
        result = _dense(states)
        for head in sparse.tolist():
            pages = self._pages(states, head)
            heads = slice(head * states.group, (head + 1) * states.group)
            for start in range(first, last, ROWS):
                stop = min(start + ROWS, last)
                mask = pages[start:stop].repeat_interleave(self.page, dim=1)[:, :stop]
                mask = mask & torch.ones(stop - start, stop, dtype=torch.bool).tril(start)
                result[heads, start:stop] = _attend(states, head, heads, start, stop, mask)
        return result

    def _pages(self, states: LayerStates, head: int) -> torch.Tensor:
        """Pages that each query reads, bool [tokens, pages]."""
        tokens = states.query.shape[1]
        count = ceil_div(tokens, self.page)
        dynamic = self.masks.modes[states.layer, head] == HeadMode.DYNAMIC
        tables = page_tables(
            self.masks, states.layer, self.page, self.page if dynamic else None
        ).take([head])
        selector = PageSelector([tables])
        if not dynamic:
            query_block = torch.arange(ceil_div(tokens, selector.query_block))
            selected = selector.select(query_block, count)[0, 0]
            return selected.repeat_interleave(selector.query_block, dim=0)[:tokens]
        query_blocks = self._query_blocks(tokens)
        selected = self._select(states, head, selector, query_blocks)
        return selected.repeat_interleave(query_blocks.stop - query_blocks.start, dim=0)

    def _query_blocks(self, tokens: int) -> QueryBlocks:
        """The prompt cut at pages, then every later token on its own."""
        prompt = torch.tensor([0, self.prompt], dtype=torch.int32)
        first = cut_query_blocks(prompt, prompt[1:], self.page)
        later = torch.arange(self.prompt, tokens)
        return QueryBlocks(
            request=torch.cat([first.request, torch.arange(len(later)) + 1]),
            index=torch.cat([first.index, later // self.page]),
            row=torch.cat([first.row, later]),
            start=torch.cat([first.start, later]),
            stop=torch.cat([first.stop, later + 1]),
            tokens=tokens,
        )

    def _select(
        self, states: LayerStates, head: int, selector: PageSelector, query_blocks: QueryBlocks
    ) -> torch.Tensor:
        """Selected pages of a dynamic head's query blocks, bool [query_blocks, pages]."""
        assert self.masks.dynamic is not None
        layer = states.layer
        rotation = torch.from_numpy(self.masks.dynamic.rotations[layer, head])
        group = states.query[head * states.group : (head + 1) * states.group].float()
        query = (group @ rotation).transpose(0, 1)[None]
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
        return select_dynamic(dynamic, query, keys, query_blocks, table)[0]


def _dense(states: LayerStates) -> torch.Tensor:
    """Full attention of all heads: [heads, tokens, head_size]."""
    if states.softcap:
        mask = torch.ones(states.query.shape[1], states.key.shape[1], dtype=torch.bool).tril()
        blocks = [
            _attend(states, head, slice(head * states.group, (head + 1) * states.group),
                    start, min(start + ROWS, len(mask)),
                    mask[start : start + ROWS, : start + ROWS])
            for head in range(len(states.key))
            for start in range(0, len(mask), ROWS)
        ]  # fmt: skip
        rows = ceil_div(len(mask), ROWS)
        heads = [torch.cat(blocks[at : at + rows], 1) for at in range(0, len(blocks), rows)]
        return torch.cat(heads)
    return scaled_dot_product_attention(
        states.query[None], states.key[None], states.value[None],
        is_causal=True, scale=states.scale, enable_gqa=True,
    )[0].clone()  # fmt: skip


def _attend(
    states: LayerStates, head: int, heads: slice, start: int, stop: int, mask: torch.Tensor
) -> torch.Tensor:
    """Attention of a block of queries under a mask bool [queries, keys]."""
    query, key = states.query[heads, start:stop], states.key[head, :stop]
    value = states.value[head, :stop]
    if states.softcap:
        scores = query @ key.t() * states.scale
        scores = states.softcap * torch.tanh(scores / states.softcap)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return weights @ value
    return scaled_dot_product_attention(
        query, key.expand(len(query), -1, -1), value.expand(len(query), -1, -1),
        attn_mask=mask, scale=states.scale,
    )  # fmt: skip
