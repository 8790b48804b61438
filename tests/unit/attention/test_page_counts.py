"""What is counted, against plain loops over queries and pages."""

import numpy as np
import pytest
import torch

from dam_vllm.attention.page_counts import DENSITIES, PageCounts, QueryWeights, pages_up_to
from dam_vllm.attention.query_blocks import cut_query_blocks


def requests(rng, count):
    """Tokens up to the last query, and queries; every fourth decodes."""
    stop = rng.integers(1, 900, count)
    new = np.maximum(1, (stop * rng.random(count)).astype(int))
    new[::4] = 1
    return stop, new


def plain(stop, new, query_block, page):
    """Pages up to the end of each query's query block, query by query."""
    ends = [min((at // query_block + 1) * query_block, stop) for at in range(stop - new, stop)]
    return sum(-(-end // page) for end in ends)


@pytest.mark.parametrize(("query_block", "page"), [(128, 16), (144, 48), (128, 128), (32, 32)])
def test_pages_of_whole_steps(rng, query_block, page):
    stop, new = requests(rng, 40)
    stop, new = np.append(stop, 0), np.append(new, 0)  # padding
    wanted = [plain(*each, query_block, page) for each in zip(stop, new, strict=True)]
    assert pages_up_to(stop, new, query_block, page).tolist() == wanted


def test_query_blocks_and_whole_steps_add_up_by_phase(rng):
    stop, new = requests(rng, 9)
    starts = torch.tensor([0, *np.cumsum(new)]).int()
    lens = torch.from_numpy(stop).int()
    counts = PageCounts([3, 5, 8], 4, 12, torch.device("cpu"))
    blocks = cut_query_blocks(starts, lens, 128)
    where = (torch.tensor([0, 2, 2]), torch.tensor([3, 0, 1]))
    pages = torch.from_numpy(rng.integers(1, 5, (3, len(blocks.stop))))
    counts.add(where, pages, QueryWeights.of(blocks, starts.diff(), 16))
    read, dense = np.zeros((2, 2, 3, 4), int)
    for block, request in enumerate(blocks.request.tolist()):
        queries = int(blocks.stop[block] - blocks.start[block])
        for row, (layer, head) in enumerate(zip(*(each.tolist() for each in where), strict=True)):
            phase = int(new[request] == 1)
            read[phase, layer, head] += queries * int(pages[row, block])
            dense[phase, layer, head] += queries * -(-int(blocks.stop[block]) // 16)
    told = counts.report()
    counts.add_whole([5, 8], starts, lens, 128, 16)  # not the first layer: no step of its own
    assert counts.report()["steps"] == told["steps"]
    counts.add_whole([3], starts, lens, 128, 16)
    later = counts.report()
    for phase, name in enumerate(("prefill", "decode")):
        assert told["read"][name] == read[phase].tolist()
        assert told["dense"][name] == dense[phase].tolist()
        which = [row for row, count in enumerate(new) if (count == 1) == bool(phase)]
        whole = sum(plain(stop[row], new[row], 128, 16) for row in which)
        assert later["read"][name] == (read[phase] + whole).tolist()
        assert later["dense"][name] == (dense[phase] + whole).tolist()
        density = read[phase].sum() / dense[phase].sum()
        assert told["densities"][name] == pytest.approx(density)
        assert later["densities"][name] == pytest.approx(density + 1)
        wanted = [int(each >= density) for each in DENSITIES]
        assert np.minimum(np.cumsum(told["steps"][name]), 1).tolist() == wanted
        assert later["steps"][name][-1] == told["steps"][name][-1] + 1
    assert told["layers"] == [3, 5, 8]
    assert told["first_head"] == 12


def test_every_step_is_sorted_once():
    counts = PageCounts([0], 1, 0, torch.device("cpu"))
    for read, dense in ((1, 10), (10, 10), (11, 100), (0, 0)):
        counts.pages[0, :, 0, 0] += torch.tensor([read, dense])
        counts.begin_step()
    steps = dict(zip(DENSITIES, counts.report()["steps"]["prefill"], strict=True))
    assert {bound: number for bound, number in steps.items() if number} == {0.1: 1, 0.15: 1, 1.0: 1}
    assert sum(counts.report()["steps"]["decode"]) == 0
    counts.rehearsed = True
    assert sum(counts.report()["steps"]["prefill"]) == 0
