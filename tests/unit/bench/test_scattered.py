import numpy as np
import pytest
import torch

from dam_vllm.bench.gpu_case import DTYPE, Case, draw, geometry
from dam_vllm.bench.scattered import every_page, scattered, work

CPU = torch.device("cpu")
LONG = [
    Case("prefill", 8, 2, 64, 128, 16384, 1),
    Case("decode", 8, 2, 64, 128, 16384, 3),
    Case("prefill", 8, 2, 64, 16, 4096, 1),
    Case("decode", 8, 2, 64, 32, 8192, 1),
]


def positions(case):
    """Of all queries of a request, and the query block's number among the case's."""
    position = np.arange(case.tokens - case.queries, case.tokens)
    return position, position // case.query_block - case.query_blocks[0]


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("wanted", [0.1, 0.5])
def test_density_is_near_the_wanted_one(case, wanted):
    selection = scattered(case, wanted)
    assert selection.density == pytest.approx(wanted, abs=0.02)
    assert not torch.equal(selection.pages[0], selection.pages[1])


@pytest.mark.parametrize("case", LONG, ids=str)
def test_extremes(case):
    assert torch.equal(scattered(case, 1.0).pages, every_page(case).expand(case.kv_heads, -1, -1))
    least = scattered(case, 1e-6).pages.sum(-1)
    assert (least <= case.own + 1).all()


@pytest.mark.parametrize("case", LONG, ids=str)
def test_the_selector_reads_these_pages(case):
    selection = scattered(case, 0.3)
    found = selection.selector(CPU).select(torch.from_numpy(case.query_blocks), case.pages)[0]
    assert torch.equal(found, selection.pages)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_work_is_that_of_the_mask(phase):
    """Counted pair by pair and key by key."""
    case = Case(phase, 6, 2, 32, 64, 512, 1 if phase == "prefill" else 2)
    selection = scattered(case, 0.6)
    position, query_block = positions(case)
    seen = selection.pages.numpy()[:, query_block].repeat(case.page, axis=2)
    seen &= np.arange(case.tokens) <= position[:, None]
    found = work(case, selection.pages)
    assert found == selection.work
    assert found.flops == 4 * case.batch * 3 * 32 * seen.sum()
    keys = selection.pages.any(dim=1).sum().item() * case.page
    ends = 2 * case.rows * 6 * 32
    assert found.bytes == DTYPE.itemsize * (ends + case.batch * 2 * keys * 32)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_cache_holds_keys_and_values_in_pages(phase):
    case = Case(phase, 4, 2, 16, 32, 256, 1 if phase == "prefill" else 3)
    (inputs,), where = draw(case, CPU), geometry(case, CPU)
    assert inputs.query.shape == (case.rows, 4, 16)
    assert len(inputs.block_table.unique()) == case.batch * case.pages
    for request, head, token in [(0, 1, 37), (case.batch - 1, 0, 255)]:
        block = inputs.block_table[request, token // 32]
        stored = inputs.cache[block, head, token % 32]
        assert torch.equal(stored[:16], inputs.key[request, head, token])
        assert torch.equal(stored[16:], inputs.value[request, head, token])
    assert where.starts.tolist() == [each * case.queries for each in range(case.batch + 1)]
    assert where.lens.tolist() == [256] * case.batch
