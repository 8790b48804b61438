"""Requests whose queries are planned one by one."""

import torch

from dam_vllm.attention.interface import Step


def step(requests, table):
    """A step of requests (queries, tokens up to the last one)."""
    starts = torch.tensor([0, *(queries for queries, _ in requests)]).cumsum(0).int()
    lens = torch.tensor([stop for _, stop in requests]).int()
    queries, longest = max(queries for queries, _ in requests), int(lens.max())
    return Step(starts, starts, lens, table, int(starts[-1]), queries, longest, lens)


def test_each_query_is_a_request():
    table = torch.arange(8).view(4, 2).int()
    whole = step([(3, 40), (1, 17), (9, 9), (2, 33)], table)
    apart = whole.one_by_one(torch.tensor([True, True, False, True]))
    expected = step(
        [(1, 38), (1, 39), (1, 40), (1, 17), (9, 9), (1, 32), (1, 33)],
        table[[0, 0, 0, 1, 2, 3, 3]],
    )
    for name, value in vars(expected).items():
        found = getattr(apart, name)
        if isinstance(value, torch.Tensor):
            assert found.dtype == value.dtype
            assert torch.equal(found, value), name
        else:
            assert found == value, name
    assert whole.one_by_one(torch.zeros(4, dtype=torch.bool)) is whole
