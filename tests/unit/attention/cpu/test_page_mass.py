"""Compiled shares of attention mass against torch's, and what is chosen by them."""

import pytest
import torch

from dam_vllm.attention.cpu import llvm, page_mass
from dam_vllm.attention.cpu.page_max import CompiledScores
from dam_vllm.attention.cpu.score import TorchScores
from dam_vllm.attention.cpu.span import Span
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.masks.budget import TopP, choose

CHANNELS, SCALE = 16, 0.4
# Pages, query blocks, rows of a query block, tokens a page.
CASES = [(9, 3, 32, 16), (61, 4, 144, 48), (130, 2, 64, 32), (1, 1, 16, 16)]


class Case:
    """Scores of a span, some of whose rows are absent, with what they hold poisoned."""

    def __init__(self, rng, pages, blocks, rows, page, size=3.0):
        torch.manual_seed(int(rng.integers(2**31)))
        query = torch.randn(blocks * rows, CHANNELS) * size
        # As bfloat16 holds them, which products of it take without loss.
        self.query = query.bfloat16().float()
        self.keys = torch.randn(pages, CHANNELS, page).bfloat16().float()
        present = torch.rand(blocks, rows) < 0.8
        present[0] = blocks == 1
        self.query[~present.flatten()] = torch.nan
        index = torch.arange(pages - blocks, pages)
        static = torch.rand(blocks, pages) < 0.1
        static[torch.arange(blocks), index] = True
        static &= torch.arange(pages) <= index[:, None]
        self.span = Span(index, present, static)

    def masses(self, scores, softcap):
        dynamic = DynamicHeads([CHANNELS], [], None, SCALE, softcap)
        query = self.query.view(len(self.span.index), self.keys.shape[2], -1, CHANNELS)
        return scores.masses(query, scores.keys(self.keys), self.span, dynamic)

    def both(self, softcap=0.0, dtype=torch.float32):
        """Compiled for a dtype, and by torch."""
        page = self.keys.shape[2]
        compiled = CompiledScores.of(CHANNELS, page, dtype)
        return self.masses(compiled, softcap), self.masses(TorchScores(), softcap)


def by_page(masses, shape):
    """Masses [pages, query blocks, rows] of compiled ones."""
    return masses.mass.transpose(0, 1).reshape(shape)


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_every_row(rng, lanes, shape, softcap, dtype):
    compiled, plain = Case(rng, *shape).both(softcap, dtype)
    assert compiled.mass.shape[2] == lanes
    found = by_page(compiled, plain.mass.shape)
    torch.testing.assert_close(found, plain.mass, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(compiled.largest, plain.largest, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", CASES)
def test_pages_until_rows_have_enough(rng, lanes, shape):
    """Counts by definition, from the same masses; each query block with its own bound."""
    pages, blocks, *_ = shape
    compiled, plain = Case(rng, *shape).both()
    mass = by_page(compiled, plain.mass.shape).double()
    order = torch.stack([torch.randperm(pages) for _ in range(blocks)])
    enough = torch.rand(blocks) * 0.9 + 0.05
    for limit in (1, pages // 2 + 1, pages):
        found = compiled.until(order[:, :limit], enough)
        for block in range(blocks):
            there = mass[:, block].sum(dim=0) > 0
            added = mass[order[block, :limit], block].cumsum(dim=0)[:, there]
            needed = (added < enough[block]).any(dim=1).sum() + 1 if there.any() else 0
            assert found[block] == min(int(needed), limit)


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("size", [0.3, 3.0, 100.0])
def test_what_is_chosen_by_mass(rng, lanes, shape, size):
    """As by torch, also where nearly all mass lies in a page, but for pages at the very bound."""
    compiled, plain = Case(rng, *shape, size=size).both()
    for value in (0.5, 0.9):
        budget = TopP(value, 0, 40)
        assert (choose(compiled, [budget]) != choose(plain, [budget])).sum() <= 1


def test_a_row_depends_on_nothing_else(rng, lanes):
    """Bit for bit: neither on other query blocks, nor on other rows of its own, nor on threads."""
    case, part = Case(rng, 40, 4, 64, 32), Case(rng, 40, 2, 64, 32)
    part.keys = case.keys
    part.query = case.query[128:].clone()
    # The second half of each query block, other queries that this step holds.
    part.query.view(2, 64, -1)[:, 32:] = 1.0
    present = case.span.present[2:].clone()
    present[:, 32:] = True
    part.span = Span(case.span.index[2:], present, case.span.static[2:])
    whole, threads = by_page(case.both()[0], (40, 4, 64)), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found = by_page(part.both()[0], (40, 2, 64))
            assert torch.equal(found[:, :, :32], whole[:, 2:, :32])
    finally:
        torch.set_num_threads(threads)


def test_exponentials(lanes):
    """Within two units in the last place, and no lower than what is normal."""
    text = page_mass.exponential("power", "%value", lanes)
    vector = f"<{lanes} x float>"
    declarations = "\n".join(
        f"declare {vector} @llvm.{name}.v{lanes}f32({', '.join([vector] * count)})"
        for name, count in (("fma", 3), ("rint", 1), ("maxnum", 2))
    )
    body = f"""
  %value = load {vector}, ptr %values, align 4
{text}
  store {vector} %power, ptr %values, align 4
  br label %done
"""
    function = llvm.compiled("powers", {"values": "ptr"}, declarations, body)
    values = torch.cat([torch.linspace(-90, 88, 4001), torch.tensor([0.0, -1e-7, 1e-7])])
    for some in values.split(lanes):
        given = torch.zeros(lanes)
        given[: len(some)] = some
        expected = given.double().clamp_min(-87).exp()
        torch.set_num_threads(1)
        function.call(given.data_ptr())
        torch.testing.assert_close(given.double(), expected, rtol=2.4e-7, atol=0)
