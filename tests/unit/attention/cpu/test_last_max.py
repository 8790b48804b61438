"""Largest scores of pages for single queries against plain products."""

import pytest
import torch

from dam_vllm.attention.cpu.last_max import LastScores

# Query heads a KV head, tokens a page, head size, channels of each query.
CASES = [(1, 16, 8, (1, 8)), (2, 48, 24, (5, 16, 24)), (7, 32, 16, (9, 2)), (21, 128, 40, (33, 40))]


class Case:
    """Queries at different positions of a shuffled cache; what none may see is poisoned."""

    def __init__(self, rng, heads_per_kv, page, size, channels, dtype, pages=13):
        torch.manual_seed(int(rng.integers(2**31)))
        self.dtype, self.page, self.channels = dtype, page, torch.tensor(channels)
        count = len(channels)
        self.query = torch.randn(count, heads_per_kv, size).to(dtype).float()
        self.position = torch.randint(0, pages * page, (count,))
        self.position[0] = 0
        # Keys and then values, as a cache holds them.
        self.cache = torch.full((count * pages + 1, 2, size, page), torch.nan, dtype=dtype)
        self.table = torch.randperm(count * pages).int().view(count, pages)
        for row, last in enumerate(self.position.tolist()):
            for at in range(last // page + 1):
                seen = min(page, last + 1 - at * page)
                keys = torch.randn(channels[row], seen).to(dtype)
                self.cache[self.table[row, at], 0, : channels[row], :seen] = keys
            self.table[row, last // page + 1 :] = count * pages

    def found(self, some=slice(None)):
        scores = LastScores.of(self.query.shape[1], self.page, self.dtype)
        given = (self.query, self.channels, self.position)
        cache = self.cache[:, 0]
        return scores.max_scores(*(each[some] for each in given), cache, self.table[some])

    def expected(self, row):
        """Float64 [pages up to the own one, heads_per_kv]."""
        last, depth = int(self.position[row]), int(self.channels[row])
        own = last // self.page
        keys = self.cache[self.table[row, : own + 1].long(), 0, :depth].double()
        scores = self.query[row, :, :depth].double() @ keys
        scores[own, :, last % self.page + 1 :] = -torch.inf
        return scores.amax(-1)


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_largest_score_of_each_page(rng, lanes, shape, dtype):
    case = Case(rng, *shape, dtype)
    found, own = case.found()
    vectors = -(-shape[0] // lanes)
    assert found.shape == (len(case.query) * vectors, 13, lanes)
    found = found.unflatten(0, (-1, vectors)).transpose(1, 2).flatten(2)[..., : shape[0]]
    own = own.unflatten(0, (-1, vectors)).flatten(1)
    assert not own[:, shape[0] :].any()
    for row in range(len(case.query)):
        expected = case.expected(row)
        last = len(expected) - 1
        kept = torch.cat([found[row, :last], own[row, None, : shape[0]]]).double()
        torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-5)


def test_a_query_does_not_depend_on_the_others(rng, lanes):
    """Bit for bit, nor on the number of threads."""
    case = Case(rng, 4, 32, 16, (16, 7, 12, 3), torch.bfloat16)
    whole, own = case.found()
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found, alone = case.found(slice(1, 3))
            assert torch.equal(alone, own[1:3])
            for row in range(2):
                last = case.position[1 + row] // 32
                assert torch.equal(found[row, :last], whole[1 + row, :last])
    finally:
        torch.set_num_threads(threads)
