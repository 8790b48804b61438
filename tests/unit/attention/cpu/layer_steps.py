"""Steps of random requests through all layers, by our attention and by the plain definition."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch

from dam_vllm.attention.chosen_pages import ChosenPages
from dam_vllm.attention.cpu.attention import CPUAttention
from dam_vllm.attention.cpu.kernel import CPULayer
from dam_vllm.attention.dynamic_heads import DynamicHeads, ReusingHeads
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle import chosen_mask, masked_attention, page_mask
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.page_tables import PageSelector
from dam_vllm.masks.sharding import Shard

SCALE, SIZE = 0.4, 24
# As bytes, NaN in every fp8.
POISON = {torch.uint8: 0x7F, torch.float16: 6e4}


@dataclasses.dataclass(frozen=True)
class Form:
    """What layers are like.

    Attributes:
        size: channels a head.
        dtype: of queries, and of the cache unless that is `stored`, fp8 as bytes.
        stored: dtype of an fp8 cache, or None.
        scales: of stored keys and values.
        softcap: of scores.
        factor: size of queries.
    """

    size: int = SIZE
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None
    scales: tuple[float, float] = (1.0, 1.0)
    softcap: float = 0.0
    factor: float = 3.0


class PlainKernel:
    """Runs virtual sequences one by one, as a paged kernel would."""

    def schedule(self, query_start_loc, seq_lens):
        return torch.empty(0)

    def attend(self, query, keys, values, output, batch, layer):
        page, size = keys.shape[1:]
        by_channel = keys.view(-1, size, page)
        for row, length in enumerate(batch.seq_lens.tolist()):
            first, last = batch.query_start_loc[row : row + 2].tolist()
            table = batch.block_table[row, : -(-length // page)].long()
            key = by_channel[table].transpose(1, 2).reshape(-1, size)[:length].float()
            value = values[table].reshape(-1, size)[:length].float() * layer.value_scale
            mask = torch.ones(last - first, length, dtype=torch.bool).tril(length - last + first)
            # Products of single precision would round by how many rows they have.
            asked, key, value = (each.double() for each in (query[first:last], key, value))
            scores = torch.einsum("qhd,kd->hqk", asked, key) * layer.scale * layer.key_scale
            if layer.softcap:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
            output[first:last] = torch.einsum("hqk,kd->qhd", weights, value).to(output.dtype)


class Model:
    """Layers' random queries, keys and values of some requests; as stored, rotated or not.

    Tokens that lie near each other are alike, so that means of them say something.
    """

    def __init__(self, rng, masks, page, lengths, form=Form()):
        torch.manual_seed(int(rng.integers(2**31)))
        self.rng, self.masks, self.page, self.form = rng, masks, page, form
        dtype = form.stored or form.dtype

        def draw(length, heads, factor, dtype, scale=1.0):
            near = torch.randn(length // 100 + 1, heads, form.size).repeat_interleave(100, dim=0)
            drawn = factor * (torch.randn(length, heads, form.size) + near[:length])
            return (drawn / scale).to(dtype).float() * scale

        def draw_all(*args):
            return [[draw(each, *args) for each in lengths] for _ in range(masks.layers)]

        self.queries = draw_all(masks.heads, form.factor, form.dtype)
        self.keys, self.values = (draw_all(masks.kv_heads, 1, dtype, each) for each in form.scales)
        counts = [-(-length // page) for length in lengths]
        order = torch.from_numpy(rng.permutation(sum(counts) + 3)).int()
        *self.blocks, self.nobodys = order.split([*counts, 3])

    def empty_cache(self, shard):
        """A poisoned cache of a layer."""
        dtype = torch.uint8 if self.form.stored else self.form.dtype
        count = sum(map(len, self.blocks)) + len(self.nobodys)
        shape = (count, shard.heads, self.page, 2 * self.form.size)
        return torch.full(shape, POISON.get(dtype, 9e9), dtype=dtype)

    def fill(self, cache, layer, requests, shard):
        """Stores the tokens so far of requests (row, new, stop); what comes later is poisoned."""
        local, size = slice(shard.start, shard.stop), self.form.size
        stored = cache.view(self.form.stored or cache.dtype).view(*cache.shape[:2], 2, -1)
        keys = stored[:, :, 0].view(*cache.shape[:2], size, self.page)
        values = stored[:, :, 1].view(*cache.shape[:2], self.page, size)
        for row, _, stop in requests:
            cache[self.blocks[row].long()] = POISON.get(cache.dtype, 9e9)
            token = torch.arange(stop)
            block, place = self.blocks[row][token // self.page].long(), token % self.page
            key, value = (
                (each[layer][row][:stop, local] / scale).to(keys.dtype)
                for each, scale in zip((self.keys, self.values), self.form.scales, strict=True)
            )
            keys[block, :, :, place], values[block, :, place] = key, value

    def step(self, requests):
        """A step of requests (row, new queries, tokens so far)."""
        counts = [-(-stop // self.page) for _, _, stop in requests]
        table = torch.full((len(requests), max(counts) + 1), int(self.nobodys[0])).int()
        for at, (count, (row, _, _)) in enumerate(zip(counts, requests, strict=True)):
            table[at, :count] = self.blocks[row][:count]
        starts = torch.tensor([0, *np.cumsum([new for _, new, _ in requests])]).int()
        lens = torch.tensor([stop for _, _, stop in requests]).int()
        new = max(new for _, new, _ in requests)
        return Step(starts, starts, lens, table, int(starts[-1]), new, int(lens.max()))

    def run(self, attention, requests, shard=None):
        """Outputs of all layers: [layers, tokens, the rank's heads, size], by request."""
        shard = shard or Shard(0, self.masks.kv_heads)
        step, found = self.step(requests), []
        plan, local = attention.plan(step), shard.query_heads(self.masks)
        for layer in range(self.masks.layers):
            asked = [self.queries[layer][row][stop - new : stop] for row, new, stop in requests]
            query = torch.cat(asked)[:, local].contiguous().to(self.form.dtype)
            output = torch.full_like(query, torch.nan)
            cache = self.cache(attention, layer, shard)
            self.fill(cache, layer, requests, shard)
            attention.run(plan, str(layer), query, cache, output)
            found.append(output)
        return torch.stack(found).split([new for _, new, _ in requests], dim=1)

    def cache(self, attention, layer, shard):
        """A layer's, the same in all steps of our attention; beside it no mean is written yet."""
        if not hasattr(attention, "caches"):
            return self.empty_cache(shard)
        if layer not in attention.caches:
            cache = attention.caches[layer] = self.empty_cache(shard)
            attention.part(layer)._tails._means(cache, self.form.dtype).fill_(torch.nan)
        return attention.caches[layer]

    def expected(self, requests, dense_below=0):
        """The same by the definition, one request and layer after the other."""
        found = []
        for row, new, stop in requests:
            chosen = {}
            layers = [
                self.layer_by_definition(layer, row, new, stop, dense_below, chosen)
                for layer in range(self.masks.layers)
            ]
            found.append(torch.stack(layers))
        return found

    def layer_by_definition(self, layer, row, new, stop, dense_below, chosen):
        """A request's output of a layer; what its dynamic heads choose is added to `chosen`."""
        masks, page, form = self.masks, self.page, self.form
        heads_per_kv = masks.heads // masks.kv_heads
        query = self.queries[layer][row][stop - new : stop]
        key, value = self.keys[layer][row][:stop], self.values[layer][row][:stop]
        whole = page_mask(masks, layer, stop - new, stop, page, dense_below)
        static = page_mask(masks, layer, stop - new, stop, page, dense_below, page)
        for head in np.flatnonzero(masks.modes[layer] == HeadMode.DYNAMIC):
            own = slice(head * heads_per_kv, (head + 1) * heads_per_kv)
            chosen[layer, head] = chosen_mask(
                masks, layer, head, query[:, own], key[:, head], static[own][0], page, SCALE,
                form.softcap,
            )  # fmt: skip
            whole[own] = static[own] | chosen[layer, head]
        for head in np.flatnonzero(masks.modes[layer] == HeadMode.REUSE):
            own = slice(head * heads_per_kv, (head + 1) * heads_per_kv)
            whole[own] = static[own] | chosen[tuple(masks.anchors[layer, head])]
        tails = () if masks.tails is None else np.flatnonzero(masks.tails[layer])
        return masked_attention(
            query, key, value, torch.from_numpy(whole), SCALE, form.softcap, tails, page
        )


def attention_of(masks, page, dense_below=0, groups=1, shard=None, counts=None, form=Form()):
    """Attention of all layers, by several objects with plans of their own if `groups` says so."""
    shard = shard or Shard(0, masks.kv_heads)
    chosen, parts = ChosenPages.of_masks(masks, shard), []
    for group in range(groups):
        served, tables = {}, []
        for layer in range(group, masks.layers, groups):
            scale = SCALE * form.scales[0]
            dynamic = DynamicHeads.of_layer(
                masks, layer, shard, page, dense_below, scale, form.softcap
            )
            reusing = ReusingHeads.of_layer(masks, layer, shard, page, dense_below)
            tails = shard.tails(masks, layer)
            made = CPULayer(SCALE, form.softcap, [], dynamic, *form.scales, reusing, layer, tails)
            fixed = [head for head in range(shard.heads) if head not in made.choosing]
            served[str(layer)] = dataclasses.replace(made, fixed=fixed)
            tables.append(shard.tables(masks, layer, page))
        selector = PageSelector(tables, dense_below)
        layout = KVLayout(True, form.stored)
        parts.append(CPUAttention(served, selector, PlainKernel(), layout, chosen, counts))
    return SimpleNamespace(
        plan=lambda step: [part.plan(step) for part in parts],
        run=lambda plans, layer, *rest: parts[int(layer) % groups].run(
            plans[int(layer) % groups], layer, *rest
        ),
        part=lambda layer: parts[layer % groups],
        chosen=chosen,
        caches={},
    )


def share_close(found, expected):
    """Share of rows and heads that are equal: rounding may decide for one page or another."""
    close = torch.isclose(found, expected, rtol=1e-3, atol=1e-4).all(dim=-1)
    return float(close.float().mean())
