"""A case's inputs and cache, our attention over them, the stock kernel's, and that in float64."""

from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.attention.cpu.attention import CPUAttention
from dam_vllm.attention.cpu.kernel import CPULayer, VirtualBatch
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import FP8_DTYPES, KVLayout
from dam_vllm.attention.oracle import page_mask
from dam_vllm.attention.rotation import HeadRotation
from dam_vllm.masks.page_tables import PageSelector, page_tables, query_block_size
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.sharding import Shard
from tests.conftest import random_mask_set


@dataclass(frozen=True)
class Read:
    """What a KV head's query block reads: rows of the step's queries, tokens of its request."""

    request: int
    head: int
    rows: slice
    keys: torch.Tensor


class Batch:
    """A case's random inputs, its cache, and our attention over it."""

    def __init__(self, case, rng):
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        from dam_vllm.engine.cpu import CPUKernel

        self.case = case
        torch.manual_seed(int(rng.integers(2**31)))
        isa = _get_attn_isa(case.dtype, case.page, case.size, case.cache_dtype)
        if case.dynamic and isa == "amx":
            isa = "vec"
        self.kernel = CPUKernel(case.heads_per_kv, case.size, case.dtype, isa, case.cache_dtype)
        self.layout = KVLayout(True, FP8_DTYPES.get(case.cache_dtype))
        self.masks = random_mask_set(
            rng, layers=1, heads=case.heads, kv_heads=case.kv_heads,
            pcl=int(rng.integers(16, 300)), share=float(rng.uniform(0, 0.05)),
            dense=bool(rng.random() < 0.5), dynamic=case.dynamic, head_size=case.size,
        )  # fmt: skip
        self.query = torch.randn(case.starts[-1], case.heads, case.size).to(case.dtype)
        self.keys, self.values = (
            [torch.randn(n, case.kv_heads, case.size).to(case.dtype) for n, _ in case.requests]
            for _ in range(2)
        )
        shard, masks = Shard(0, case.kv_heads), self.masks
        scoring = case.scale * case.scales[0]
        heads = DynamicHeads.of_layer(
            masks, 0, shard, case.page, case.dense_below, scoring, case.softcap
        )
        self.rotation = HeadRotation.of_layer(masks, 0, shard)
        self.dynamic = heads.ids if heads else []
        fixed = [head for head in range(case.kv_heads) if head not in self.dynamic]
        self.layer = CPULayer(case.scale, case.softcap, fixed, heads, *case.scales)
        tables = PageSelector([page_tables(masks, 0, case.page)], case.dense_below)
        self.attention = CPUAttention({"0": self.layer}, tables, self.kernel, self.layout)
        self.turned = self.query, self.keys
        if self.rotation:
            turned = self.rotation.queries(self.query, case.kv_heads)
            self.turned = turned, [self.rotation.keys(key) for key in self.keys]
        self.cache, table = self.filled(rng)
        lens = torch.tensor([n for n, _ in case.requests], dtype=torch.int32)
        starts = torch.from_numpy(case.starts).int()
        new = max(count for _, count in case.requests)
        self.step = Step(starts, starts, lens, table, int(starts[-1]), new, int(lens.max()))

    def empty_cache(self, pages, kv_heads, value):
        """A cache that holds one value everywhere."""
        case = self.case
        dtype = torch.uint8 if case.cache_dtype in FP8_DTYPES else case.dtype
        shape = (pages, kv_heads, case.page, 2 * case.size)
        return torch.full(shape, 0x7F if value and dtype == torch.uint8 else value, dtype=dtype)

    def filled(self, rng):
        """A cache with permuted pages, poisoned where nothing is stored, and its block table."""
        case, page = self.case, self.case.page
        counts = [ceil_div(n, page) for n, _ in case.requests]
        cache = self.empty_cache(sum(counts) + 3, case.kv_heads, torch.nan)
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        order = torch.from_numpy(rng.permutation(sum(counts) + 3))
        for row, (count, key, value) in enumerate(
            zip(counts, self.turned[1], self.values, strict=True)
        ):
            pages, order = order[:count], order[count:]
            table[row, :count] = pages
            cache[pages] = 0  # the kernel multiplies what lies after a sequence's end by zero
            token = torch.arange(len(key))
            for head in range(case.kv_heads):
                slots = (pages[token // page] * case.kv_heads + head) * page + token % page
                self.store(cache, key[:, head], value[:, head], slots)
        return cache, table

    def store(self, cache, key, value, slots):
        """Writes [n, size] keys and values by vLLM's kernel."""
        parts = self.layout.keys_and_values(cache)
        self.kernel.store(key.contiguous(), value.contiguous(), *parts, slots, self.layer)

    def ours(self):
        """[tokens, heads, size] by the backend, and what every query block reads."""
        case, plan = self.case, self.attention.plan(self.step)
        query, output = self.turned[0], torch.full_like(self.query, torch.nan)
        self.attention.run(plan, "0", query, self.cache, output)
        reads = [read for row in range(len(case.requests)) for read in self.static_reads(row)]
        if self.dynamic:
            asked = query.view(len(query), case.kv_heads, -1, case.size)
            selected = self.attention.select(plan, "0", asked, self.cache)
            reads += self.dynamic_reads(plan.choosing.asking.blocks, selected)
        return output, reads

    def static_reads(self, row):
        """Query blocks of heads whose pages are known, by the oracle's mask."""
        case, (stop, count) = self.case, self.case.requests[row]
        first, at = stop - count, int(self.case.starts[row])
        mask = page_mask(self.masks, 0, first, stop, case.page, case.dense_below)
        seen = torch.from_numpy(mask[:: case.heads_per_kv])
        size = query_block_size(case.page)
        for start in range(first // size * size, stop, size):
            rows = range(max(start, first), min(start + size, stop))
            for head in self.layer.fixed:
                keys = seen[head, rows[-1] - first].nonzero().squeeze(1)
                yield Read(row, head, slice(rows[0] - first + at, rows[-1] + 1 - first + at), keys)

    def dynamic_reads(self, blocks, selected):
        """Query blocks of dynamic heads; they are not asked again what they ought to choose."""
        for at, head in enumerate(self.dynamic):
            for each, request in enumerate(blocks.request.tolist()):
                stop, row = int(blocks.stop[each]), int(blocks.row[each])
                count = stop - int(blocks.start[each])
                keys = selected[at, each].repeat_interleave(self.case.page)[:stop].nonzero()
                yield Read(request, head, slice(row, row + count), keys.squeeze(1))

    def own(self, read, turned=False):
        """Queries [n, heads_per_kv, size], keys and values [m, size] of a query block."""
        case, each = self.case, read.head
        query, keys = self.turned if turned else (self.query, self.keys)
        query = query.view(-1, case.kv_heads, case.heads_per_kv, case.size)[read.rows, each]
        key, value = keys[read.request][:, each], self.values[read.request][:, each]
        return query, key[read.keys], value[read.keys]

    def stock(self, reads, turned=False):
        """vLLM's kernel, densely over contiguous copies, a query block after another."""
        queries, keys, values = zip(*(self.own(read, turned) for read in reads), strict=True)
        lens = torch.tensor([len(key) for key in keys], dtype=torch.int32)
        pages = ceil_div(lens, self.case.page)
        table = torch.zeros(len(lens), int(pages.max()), dtype=torch.int32)
        slots, used = [], 0
        for row, count in enumerate(pages.tolist()):
            table[row, :count] = torch.arange(used, used + count)
            slots.append(torch.arange(len(keys[row])) + used * self.case.page)
            used += count
        cache = self.empty_cache(used, 1, 0)
        self.store(cache, torch.cat(keys), torch.cat(values), torch.cat(slots))
        starts = torch.tensor(np.cumsum([0, *map(len, queries)]), dtype=torch.int32)
        batch = VirtualBatch(None, table, lens, starts, self.kernel.schedule(starts, lens))
        query, parts = torch.cat(queries), self.layout.keys_and_values(cache)
        output = torch.empty_like(query)
        self.kernel.attend(query, *parts, output, batch, self.layer)
        return output

    def exact(self, read):
        """A query block's attention in float64."""
        query, key, value = (part.double() for part in self.own(read))
        scores = torch.einsum("qgd,kd->gqk", query, key) * self.case.scale
        if self.case.softcap:
            scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
        causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril(len(key) - len(query))
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        return torch.einsum("gqk,kd->qgd", weights, value)
