"""Dynamic heads against the plain definition, and what their selection must not depend on."""

import dataclasses

import numpy as np
import pytest
import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.plan import VirtualPages
from dam_vllm.attention.cpu.select import Asking, choose_dynamic
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.oracle import page_mask
from dam_vllm.attention.query_blocks import cut_query_blocks
from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.page_tables import PageSelector, page_tables
from tests.oracle import dynamic_mask

SCALE = 0.4


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request, monkeypatch):
    """As with LLVM and as without."""
    assert llvm.compiles()
    if request.param == "torch":
        monkeypatch.setattr(llvm, "compiles", lambda: False)


class Batch:
    """Requests (new queries, tokens) in a permuted cache; what belongs to nobody is poisoned."""

    def __init__(self, rng, masks, page, requests, equally_long=False):
        torch.manual_seed(int(rng.integers(2**31)))
        size = masks.dynamic.rotations.shape[-1]
        heads_per_kv = masks.heads // masks.kv_heads
        self.masks, self.page, self.requests = masks, page, requests
        self.queries = [
            torch.randn(masks.kv_heads, new, heads_per_kv, size) * 3 for new, _ in requests
        ]
        self.keys = [torch.randn(stop, masks.kv_heads, size) for _, stop in requests]
        if equally_long:
            self.keys = [5 * torch.nn.functional.normalize(key, dim=-1) for key in self.keys]
        counts = [-(-stop // page) for _, stop in requests]
        order = torch.from_numpy(rng.permutation(sum(counts) + 3)).int()
        self.cache = torch.full((len(order), masks.kv_heads, size, page), torch.nan)
        self.table = torch.full((len(requests), max(counts) + 2), int(order[-1]), dtype=torch.int32)
        for row, count in enumerate(counts):
            self.table[row, :count], order = order[:count], order[count:]
            for token, key in enumerate(self.keys[row]):
                block = self.table[row, token // page]
                self.cache[block, :, :, token % page] = key

    def heads(self, layer):
        return np.flatnonzero(self.masks.modes[layer] == HeadMode.DYNAMIC)

    def select(self, layer=0, softcap=0.0, dense_below=0, **changes):
        """Selected pages of every request, bool [heads, blocks, pages], and the blocks' starts."""
        heads = self.heads(layer)
        tables = page_tables(self.masks, layer, self.page, self.page)
        dynamic = DynamicHeads(
            channels=[int(self.masks.dynamic.channels[layer, head]) for head in heads],
            budgets=[self.masks.dynamic.budget(layer, head, self.page) for head in heads],
            static=PageSelector([tables.take(heads.tolist())], dense_below),
            scale=SCALE,
            softcap=softcap,
        )
        new = torch.tensor([0, *(new for new, _ in self.requests)])
        lens = torch.tensor([stop for _, stop in self.requests])
        query_blocks = cut_query_blocks(new.cumsum(0).int(), lens.int(), self.page)
        query = torch.cat([query[heads] for query in self.queries], dim=1)
        table = VirtualPages.of_layers(self.table, 1, self.masks.kv_heads)
        tables = table.take(0, torch.from_numpy(heads)).tables()[0]
        keys = CachedKeys(self.cache.flatten(0, 1), **changes)
        asking = Asking.of(query_blocks)
        static = dynamic.static.select(query_blocks.index, asking.pages)[0]
        selected = static | choose_dynamic(dynamic, query, keys, asking, tables, static)
        return [
            (
                selected[:, query_blocks.request == row],
                query_blocks.start[query_blocks.request == row],
            )
            for row in range(len(self.requests))
        ]

    def expected(self, row, layer=0, softcap=0.0, dense_below=0):
        """The oracle's masks of a request's dynamic heads, bool [heads, queries, keys]."""
        new, stop = self.requests[row]
        static = page_mask(
            self.masks, layer, stop - new, stop, self.page, dense_below, query_block=self.page
        )
        heads_per_kv = self.masks.heads // self.masks.kv_heads
        return [
            dynamic_mask(
                self.masks, layer, head, self.queries[row][head], self.keys[row][:, head],
                static[head * heads_per_kv], self.page, SCALE, softcap,
            )
            for head in self.heads(layer)
        ]  # fmt: skip

    def check(self, **options):
        """Compares all but what rounding may decide: one page for another at a budget's end."""
        differing = 0
        for row, (selected, starts) in enumerate(self.select(**options)):
            new, stop = self.requests[row]
            for head, mask in enumerate(self.expected(row, **options)):
                for query_block, start in enumerate(starts.tolist()):
                    pages = mask[start - (stop - new), :: self.page]
                    own = start // self.page
                    found = selected[head, query_block, : own + 1].numpy()
                    differing += (found != pages[: own + 1]).sum()
                    assert not selected[head, query_block, own + 1 :].any()
        assert differing <= 2


@pytest.mark.parametrize("page", [16, 32, 48, 128])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_selection_is_the_definition(rng, random_masks, page, softcap):
    masks = random_masks(layers=3, heads=8, kv_heads=4, share=0.002, dynamic=True)
    batch = Batch(rng, masks, page, [(303, 303), (1, 517), (77, 400), (1, 1), (2, 2 * page + 1)])
    for layer in range(masks.layers):
        batch.check(layer=layer, softcap=softcap)


def test_positions_below_dense_below_read_everything(rng, random_masks):
    masks = random_masks(heads=4, kv_heads=2, share=0.002, dynamic=True)
    batch = Batch(rng, masks, 16, [(500, 500), (1, 200)])
    batch.check(dense_below=256)


def test_batch_and_chunk(rng, random_masks):
    """Bit for bit the same alone, among others, and in chunks that end at pages."""
    masks = random_masks(heads=8, kv_heads=2, share=0.002, dynamic=True, head_size=32)
    page, stop = 32, 1111
    others = [(1, 700), (90, 90), (1, 1950)]
    whole = Batch(rng, masks, page, [(stop, stop)])
    ((alone, _),) = whole.select()
    for new in (stop - 7 * page, stop - 33 * page, 1):
        mixed = Batch(rng, masks, page, [others[0], (new, stop), *others[1:]])
        mixed.keys[1], mixed.queries[1] = whole.keys[0], whole.queries[0][:, -new:]
        for token, key in enumerate(whole.keys[0]):
            mixed.cache[mixed.table[1, token // page], :, :, token % page] = key
        part = mixed.select()[1][0]
        if new > 1:
            expected = alone[:, -part.shape[1] :]
            assert torch.equal(part[..., : alone.shape[2]], expected)
        else:
            single = Batch(rng, masks, page, [(1, stop)])
            single.keys, single.queries = whole.keys, [whole.queries[0][:, -1:]]
            single.cache, single.table = whole.cache, whole.table
            ((expected, _),) = single.select()
            assert torch.equal(part[..., : expected.shape[2]], expected)


def test_heads_choose_together_as_alone(rng, random_masks):
    """Bit for bit, whatever the kinds of their budgets, and in how many channels they score."""
    masks = random_masks(layers=1, heads=12, kv_heads=4, share=0.002, dynamic=True)
    masks.modes[:] = HeadMode.DYNAMIC
    dynamic, kinds = masks.dynamic, [BudgetKind.TOP_P, BudgetKind.TOP_K] * 2
    dynamic.kinds[:], dynamic.budgets[:] = kinds, [0.9, 100, 0.4, 30]
    dynamic.floors[:], dynamic.caps[:] = 0, 600
    batch = Batch(rng, masks, 16, [(1, 517), (1, 1), (1, 1203), (1, 400)])
    together = batch.select()
    for head in range(4):
        masks.modes[:] = HeadMode.STATIC
        masks.modes[0, head] = HeadMode.DYNAMIC
        for (every, _), (alone, _) in zip(together, batch.select(), strict=True):
            assert torch.equal(every[head], alone[0])


def test_one_query_that_looks_far_back_gets_its_page(rng, random_masks):
    """The needle's page comes first in a query block where all others look at themselves."""
    masks = random_masks(layers=1, heads=2, kv_heads=2, share=0, dynamic=True)
    dynamic = dataclasses.replace(
        masks.dynamic,
        kinds=np.full_like(masks.dynamic.kinds, BudgetKind.TOP_K),
        budgets=np.full_like(masks.dynamic.budgets, 16),
        floors=np.zeros_like(masks.dynamic.floors),
        caps=np.full_like(masks.dynamic.caps, 16),
        channels=np.full_like(masks.dynamic.channels, 24),
    )
    masks = dataclasses.replace(masks, dynamic=dynamic)
    # A longer key could lie nearer to a query than its own.
    batch = Batch(rng, masks, 16, [(640, 640)], equally_long=True)
    keys, queries = batch.keys[0], batch.queries[0]
    queries[1, :, 0] = keys[:, 1] * 20  # Everybody looks at himself ...
    queries[1, 500, 0] = keys[85, 1] * 3  # ... but one, and not even strongly.
    ((selected, _),) = batch.select()
    assert selected[0, 500 // 16].nonzero().squeeze(1).tolist() == [0, 85 // 16, 500 // 16]
