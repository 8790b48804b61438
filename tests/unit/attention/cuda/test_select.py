"""Dynamic heads on a GPU against the plain definition, and what they must not depend on."""

import dataclasses
from unittest.mock import patch

import numpy as np
import pytest
import torch

from dam_vllm.attention.cuda import choosing, score, select, shares
from dam_vllm.attention.cuda.choosing import choose_on_device
from dam_vllm.attention.cuda.dynamic import DeviceDynamic
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_slots
from dam_vllm.attention.cuda.shares import share_pages
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.oracle import page_mask
from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.page_tables import PageSelector, page_tables
from tests.oracle import dynamic_mask
from tests.unit.attention.cuda.no_sync import HostWaitsError, no_sync

pytestmark = pytest.mark.slow

SCALE = 0.3
# What no kernel may read: no block has this id.
GARBAGE = 1 << 30


@dataclasses.dataclass(eq=False)
class Request:
    """New queries [new, kv_heads, heads_per_kv, size], all keys [stop, kv_heads, size]; rotated."""

    query: torch.Tensor
    keys: torch.Tensor

    @property
    def new(self):
        return len(self.query)

    @property
    def stop(self):
        return len(self.keys)


class Case:
    """A layer's dynamic heads, and requests to them."""

    def __init__(
        self, rng, random_masks, kinds, heads_per_kv=2, size=24, dtype=torch.float32, stored=None
    ):
        kv_heads = 2 * len(kinds)
        masks = random_masks(
            layers=1, heads=kv_heads * heads_per_kv, kv_heads=kv_heads, share=0.002, dynamic=True,
            head_size=size,
        )  # fmt: skip
        values = {BudgetKind.TOP_K: 70, BudgetKind.SHARE: 0.2, BudgetKind.TOP_P: 0.8}
        heads = np.flatnonzero(masks.modes[0] == HeadMode.DYNAMIC)
        for head, kind in zip(heads, kinds, strict=True):
            masks.dynamic.kinds[0, head] = kind
            masks.dynamic.budgets[0, head] = values[kind] * rng.uniform(0.5, 1.2)
            if kind == BudgetKind.TOP_P:
                masks.dynamic.caps[0, head] = 10**6
        self.rng, self.masks, self.heads = rng, masks, heads
        self.heads_per_kv, self.dtype, self.stored = heads_per_kv, dtype, stored or dtype
        torch.manual_seed(int(rng.integers(2**31)))

    def request(self, new, stop):
        size = self.masks.dynamic.rotations.shape[-1]
        query = torch.randn(new, self.masks.kv_heads, self.heads_per_kv, size) * 3
        keys = torch.randn(stop, self.masks.kv_heads, size)
        return Request(query.to(self.dtype), keys.to(self.stored))

    def device(self, page, device, softcap=0.0, dense_below=0):
        tables = page_tables(self.masks, 0, page, page).take(self.heads.tolist())
        dynamic = DynamicHeads(
            channels=self.masks.dynamic.channels[0, self.heads].tolist(),
            budgets=[self.masks.dynamic.budget(0, head, page) for head in self.heads],
            static=PageSelector([tables], dense_below, device),
            scale=SCALE,
            softcap=softcap,
            ids=self.heads.tolist(),
        )
        return DeviceDynamic.of(dynamic)

    def expected(self, request, page, masks, **options):
        """Chosen pages by the oracle: bool [heads, the request's query_blocks, its pages]."""
        start = request.stop - request.new
        softcap = options.pop("softcap", 0.0)
        static = page_mask(masks, 0, start, request.stop, page, query_block=page, **options)
        query_blocks = range(start // page, -(-request.stop // page))
        last = [
            min(request.stop, (query_block + 1) * page) - 1 - start for query_block in query_blocks
        ]
        result = []
        for head in self.heads:
            read = static[head * self.heads_per_kv]
            mask = dynamic_mask(
                masks, 0, head, request.query[:, head], request.keys[:, head].float(), read, page,
                SCALE, softcap,
            )  # fmt: skip
            result.append((mask & ~read)[last, ::page])
        return np.stack(result)

    def best(self, request, page, head, query_block, softcap):
        """Largest share of mass that any row of a query block has in each page, float64."""
        start = request.stop - request.new
        rows = slice(max(0, query_block * page - start), (query_block + 1) * page - start)
        position = torch.arange(start, request.stop)[rows]
        channels = int(self.masks.dynamic.channels[0, head])
        query = request.query[rows, head, :, :channels].double()
        keys = request.keys[: (query_block + 1) * page, head, :channels].double()
        logits = torch.einsum("qgr,kr->qgk", query, keys) * SCALE
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        later = torch.arange(len(keys)) > position[:, None, None]
        logits = torch.nn.functional.pad(
            logits.masked_fill(later, -torch.inf), (0, -len(keys) % page), value=-torch.inf
        )
        max_scores = logits.unflatten(-1, (-1, page)).amax(-1)
        return max_scores.softmax(-1).amax((0, 1)).numpy()

    def check(self, requests, page, device, softcap=0.0, dense_below=0):
        """Compares every query block's pages; returns how many pages were chosen."""
        options = {"softcap": softcap, "dense_below": dense_below}
        found = Batch(self, requests, page, device).choose(self.device(page, device, **options))
        count = 0
        for request, pages in zip(requests, found, strict=True):
            own = request.stop // page + 1
            assert not pages[..., own:].any()
            expected = self.expected(request, page, self.masks, **options)
            pages = pages[..., : expected.shape[2]]
            first = (request.stop - request.new) // page
            for at, query_block in zip(*np.nonzero((pages != expected).any(axis=2)), strict=True):
                choices = pages[at, query_block], expected[at, query_block]
                decides = self._rounding_decides(*choices, request, page, at, query_block, options)
                assert decides, (
                    f"head {at}, query block {first + query_block} of {request.new, request.stop}"
                )
            count += int(expected.sum())
        return count

    def _rounding_decides(self, pages, expected, request, page, at, query_block, options):
        """Whether a choice is as good as the oracle's.

        It is where both end at the same share, and pages that differ have it too, but for a
        hundred-thousandth; or where a budget changed as little makes it the oracle's.
        """
        head, first = self.heads[at], (request.stop - request.new) // page
        best = self.best(request, page, head, first + query_block, options["softcap"])
        last = [best[np.flatnonzero(each)].min(initial=1) for each in (pages, expected)]
        doubtful = best[np.flatnonzero(pages != expected)]
        if np.allclose([*doubtful, last[0]], last[1], rtol=1e-5, atol=0):
            return True
        for factor in (1 - 1e-5, 1 + 1e-5):
            budgets = (self.masks.dynamic.budgets * factor).astype(np.float32)
            dynamic = dataclasses.replace(self.masks.dynamic, budgets=budgets)
            masks = dataclasses.replace(self.masks, dynamic=dynamic)
            if (self.expected(request, page, masks, **options)[at, query_block] == pages).all():
                return True
        return False


class Batch:
    """Requests in a paged cache on a device; what belongs to nobody is NaN."""

    def __init__(self, case, requests, page, device, empty=2):
        self.page, self.device = page, device
        kv_heads, size = requests[0].keys.shape[1:]
        counts = np.array([-(-request.stop // page) for request in requests])
        order = torch.from_numpy(case.rng.permutation(counts.sum() + 2))
        # Values lie beside keys, as in caches of FlashAttention.
        cache = torch.full((len(order), kv_heads, page, 2 * size), torch.nan).to(case.stored)
        self.width = int(counts.max()) + 2
        table = torch.full((len(requests) + empty, self.width + 3), GARBAGE, dtype=torch.int32)
        for row, (request, count) in enumerate(zip(requests, counts, strict=True)):
            table[row, :count], order = order[:count], order[count:]
            for each in range(count):
                keys = request.keys[each * page : (each + 1) * page].transpose(0, 1)
                cache[table[row, each], :, : keys.shape[1], :size] = keys
        self.keys = cache.to(device)[..., :size].flatten(0, 1)
        self.table = table.to(device)
        # Queries lie in one product with what else is projected.
        query = torch.cat([request.query for request in requests]).to(device)
        self.query = torch.cat([query, torch.full_like(query, torch.nan)], dim=1)[:, :kv_heads]
        self.query_blocks = self._query_blocks(requests, empty)

    def _query_blocks(self, requests, empty):
        queries = np.array([request.new for request in requests] + [0] * empty)
        self.slots = query_block_slots(queries, self.page)
        padding = np.array([[len(queries) - 1] * empty, range(empty)], dtype=np.int32)
        slots = torch.from_numpy(np.concatenate([self.slots, padding], axis=1)).to(self.device)
        starts = np.concatenate([[0], queries.cumsum()]).astype(np.int32)
        lens = np.array([request.stop for request in requests] + [0] * empty, dtype=np.int32)
        starts, lens = (torch.from_numpy(each).to(self.device) for each in (starts, lens))
        return DeviceQueryBlocks(
            *slots, starts, lens, self.page, min(self.page, int(queries.max()))
        )

    def choose(self, dynamic):
        """Chosen pages of each request: bool [heads, blocks, width]; empty slots have none."""
        heads, slots = len(dynamic.heads), len(self.query_blocks)
        # Poison in a row that is nobody's; pages after a query block's own are not written.
        kept = torch.zeros(heads + 1, slots, self.width, dtype=torch.uint8, device=self.device)
        kept[0] = 7
        rows = torch.arange(heads, 0, -1, dtype=torch.int32, device=self.device)
        choose_on_device(
            dynamic, kept, rows, self.query, self.keys, self.table, self.query_blocks, self.width
        )
        assert (kept[0] == 7).all()
        chosen = kept[rows.long()].view(torch.bool)
        starts, lens = (
            self.query_blocks.query_start_loc.tolist(),
            self.query_blocks.seq_lens.tolist(),
        )
        result, used = [], 0
        for row in range(len(lens)):
            new = starts[row + 1] - starts[row]
            slots = np.flatnonzero(self.slots[0] == row)
            query_blocks = -(-lens[row] // self.page) - (lens[row] - new) // self.page if new else 0
            assert not chosen[:, slots[query_blocks:]].any()
            result.append(chosen[:, slots[:query_blocks]].cpu().numpy())
            used += len(slots)
        assert not chosen[:, used:].any()
        return result[: sum(new > 0 for new in np.diff(starts))]


ALL = tuple(BudgetKind)


@pytest.mark.parametrize(
    ("page", "dtype", "stored", "softcap"),
    [
        (16, torch.float32, None, 0.0),
        (48, torch.float16, None, 10.0),
        (32, torch.bfloat16, torch.float8_e4m3fn, 0.0),
    ],
)
def test_choice_is_the_definition(rng, device, random_masks, page, dtype, stored, softcap):
    """Decoding, whole prompts, chunks that start inside a page, requests of a token."""
    case = Case(rng, random_masks, ALL, heads_per_kv=2, dtype=dtype, stored=stored)
    requests = [case.request(*each) for each in [(75, 75), (1, 517), (60, 200), (1, 1), (2, 65)]]
    assert case.check(requests, page, device, softcap) > 0


@pytest.mark.parametrize(
    ("page", "dtype", "stored"),
    [
        (128, torch.bfloat16, None),
        (256, torch.float16, torch.float8_e5m2),
    ],
)
def test_large_pages(rng, device, random_masks, page, dtype, stored):
    """With heads that fill no power of two, and more chunks than one."""
    kinds = (BudgetKind.TOP_P, BudgetKind.TOP_K)
    case = Case(rng, random_masks, kinds, heads_per_kv=3, size=96, dtype=dtype, stored=stored)
    requests = [case.request(*each) for each in [(1, 2001), (40, 1300), (1, 3)]]
    assert case.check(requests, page, device) > 0


def test_decoding_alone(rng, device, random_masks, monkeypatch):
    """No query block has more queries than one; positions below `dense_below` choose nothing."""
    case = Case(rng, random_masks, ALL[::2], heads_per_kv=8, size=40)
    requests = [case.request(1, stop) for stop in (1100, 130, 16, 1)]
    assert case.check(requests, 16, device) > 0
    # Requests that are too long for one round of any loop, and the last round holds most.
    requests[0].keys[1024:] *= 3
    monkeypatch.setattr(shares, "ELEMENTS", 16)
    monkeypatch.setattr(select, "ELEMENTS", 64)
    monkeypatch.setattr(select, "SCAN", 32)
    assert case.check(requests[:2], 16, device, dense_below=128) > 0


def test_floors_caps_and_masses_out_of_reach(rng, device, random_masks):
    """A floor above what mass asks, a cap below it, and a mass that all pages do not hold."""
    case = Case(rng, random_masks, [BudgetKind.TOP_P] * 3, heads_per_kv=1)
    dynamic = case.masks.dynamic
    dynamic.budgets[0, case.heads] = 0.01, 1.1, 1.1
    dynamic.floors[0, case.heads] = 60, 0, 0
    dynamic.caps[0, case.heads] = 1000, 30, 10**6
    requests = [case.request(1, 400), case.request(20, 333)]
    assert case.check(requests, 16, device) > 0


def test_of_equal_pages_all_without_mass_none(rng, device, random_masks):
    case = Case(rng, random_masks, ALL, heads_per_kv=1)
    equal, unseen = case.request(1, 600), case.request(1, 300)
    equal.keys[100:500] = equal.keys[100]
    assert case.check([equal], 16, device) > 0
    unseen.keys[100:200] = -1000 * unseen.query[0, :, 0]
    case.masks.dynamic.channels[:] = 24
    case.masks.dynamic.floors[:] = 300
    case.masks.dynamic.caps[:] = 300
    assert case.check([unseen], 16, device) > 0
    (pages,) = Batch(case, [unseen], 16, device).choose(case.device(16, device))
    assert not pages[..., 7:12].any()


def test_a_row_sees_nothing_later_in_its_own_page(rng, device, random_masks):
    """It takes its needle's page, though the next token would be all that it looks at."""
    case = Case(rng, random_masks, [BudgetKind.TOP_K], heads_per_kv=1)
    dynamic, (head,) = case.masks.dynamic, case.heads
    dynamic.budgets[0, head], dynamic.floors[0, head], dynamic.caps[0, head] = 1, 0, 16
    dynamic.channels[0, head] = 24
    request = case.request(16, 320)
    request.keys = 5 * torch.nn.functional.normalize(request.keys, dim=-1)
    request.query[:, head, 0] = request.keys[304:, head] * 20
    request.query[5, head, 0] = request.keys[85, head] * 3
    request.keys[304 + 6, head] = request.keys[85, head] * 20
    request.query[6:, head, 0] = request.keys[304 + 6, head]
    (pages,) = Batch(case, [request], 16, device).choose(case.device(16, device))
    assert np.flatnonzero(pages[0, 0]).tolist() == [85 // 16]


def shared(case, requests, page, device, dynamic):
    """Choice, and the largest shares as bits: {(request, query block): int32 [heads, pages]}."""
    shares_of = {}

    def keep(max_scores, query_blocks, static, rows, blocks, room):
        page_shares = share_pages(max_scores, query_blocks, static, rows, blocks, room)
        for slot, (row, offset) in enumerate(
            zip(query_blocks.request, query_blocks.offset, strict=True)
        ):
            if row < len(requests):
                request = requests[int(row)]
                start = request.stop - request.new
                own = int(offset) + start // page
                queries = min(request.stop, (own + 1) * page) - max(start, own * page)
                if queries > 0 and (queries > 1) == (rows.queries > 1):
                    shares_of[int(row), own] = page_shares.bits[:, slot, : own + 1].cpu().clone()
        return page_shares

    with patch.object(choosing, "share_pages", keep):
        chosen = Batch(case, requests, page, device).choose(dynamic)
    assert len(shares_of) == sum(each.shape[1] for each in chosen)
    return chosen, shares_of


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_bits_are_shares_of_mass(rng, device, random_masks, softcap):
    """The largest of any row; static pages stand above all."""
    case = Case(rng, random_masks, ALL[:2], heads_per_kv=3)
    requests = [case.request(1, 1100), case.request(30, 250)]
    dynamic = case.device(48, device, softcap=softcap)
    _, found = shared(case, requests, 48, device, dynamic)
    for (row, query_block), bits in found.items():
        for at, head in enumerate(case.heads):
            expected = case.best(requests[row], 48, head, query_block, softcap)
            static = dynamic.static.select(
                torch.tensor([query_block], device=device), query_block + 1
            )[0, at, 0]
            expected[static.cpu().numpy()] = 2.0
            found = bits[at].view(torch.float32).numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-30)


def test_batch_and_launches_change_nothing(rng, device, random_masks, monkeypatch):
    """Bit for bit the same shares alone, among others, in parts, and by fewer programs."""
    case = Case(rng, random_masks, ALL[1:], dtype=torch.bfloat16)
    mine = [case.request(1, 1100), case.request(20, 300)]
    others = [case.request(1, 1300), case.request(40, 100)]
    dynamic = case.device(16, device)
    together = [*mine, *others]
    chosen, found = shared(case, together, 16, device, dynamic)

    def check(requests):
        again, own = shared(case, requests, 16, device, dynamic)
        places = [together.index(request) for request in requests]
        for place, pages in zip(places, again, strict=True):
            width = min(pages.shape[2], chosen[place].shape[2])
            assert (chosen[place][..., :width] == pages[..., :width]).all()
        for (row, query_block), bits in own.items():
            assert torch.equal(bits, found[places[row], query_block])

    check(mine[:1])
    check([others[1], mine[1]])
    monkeypatch.setattr(choosing, "SCRATCH", 1)
    monkeypatch.setattr(choosing, "SLOT_STEP", 4)
    monkeypatch.setattr(score, "PROGRAMS", 1)
    check(together)


def test_the_host_never_waits(rng, device, random_masks):
    case = Case(rng, random_masks, ALL)
    batch = Batch(case, [case.request(1, 40), case.request(20, 50)], 16, device)
    dynamic = case.device(16, device)
    heads = len(dynamic.heads)
    chosen = torch.zeros(heads, len(batch.query_blocks), batch.width).to(device, torch.uint8)
    rows = torch.arange(heads, dtype=torch.int32, device=device)
    with no_sync():
        choose_on_device(
            dynamic, chosen, rows, batch.query, batch.keys, batch.table, batch.query_blocks,
            batch.width,
        )  # fmt: skip


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.masked_select(x > 1),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x),
        lambda x: torch.tensor([1], device=x.device),
    ],
)
def test_what_waits_is_refused(device, wait):
    numbers = torch.arange(4, device=device)
    with no_sync():
        numbers.repeat_interleave(numbers, output_size=6)
        numbers.sort().values[numbers].float().masked_fill_(numbers > 1, 0)
    with no_sync(), pytest.raises(HostWaitsError):
        wait(numbers)
