"""Page scores against plain products."""

import sys

import pytest
import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.page_max import CompiledScores
from dam_vllm.attention.cpu.score import TorchScores, span_scores

CASES = [
    (1, 1, 1, 16),
    (24, 3, 16, 16),
    (25, 7, 5, 48),
    (1013, 61, 16, 32),
    (331, 9, 33, 128),
]


def by_page(scores):
    """Scores [pages, rows], of whichever made them."""
    if scores.dim() == 2:
        return scores
    return scores.transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("rows", "pages", "channels", "page"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of", [CompiledScores.of, lambda *_: TorchScores()])
def test_largest_score_of_each_page(rng, rows, pages, channels, page, dtype, of):
    torch.manual_seed(int(rng.integers(2**31)))
    query = torch.randn(rows, channels).to(dtype).float()
    keys = torch.randn(pages + 2, channels, page).to(dtype).float()
    keys[pages:] = torch.nan
    scores = of(channels, page, dtype)
    found = by_page(scores.max_scores(query, scores.keys(keys)[:pages]))[:, :rows]
    expected = torch.matmul(query[None].double(), keys[:pages].double()).amax(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(rng, dtype):
    """Bit for bit, nor on the number of threads."""
    torch.manual_seed(int(rng.integers(2**31)))
    query, keys = torch.randn(1013, 16), torch.randn(37, 16, 32)
    scores = span_scores(16, 32, dtype)
    packed, threads = scores.keys(keys), torch.get_num_threads()
    whole = by_page(scores.max_scores(query, packed))
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            part = by_page(scores.max_scores(query[100:333], packed[:20]))
            assert torch.equal(part[:, :233], whole[:20, 100:333])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def fresh():
    """What was compiled for this test is forgotten."""
    CompiledScores.of.cache_clear()
    yield
    CompiledScores.of.cache_clear()


def test_processors_without_avx512(rng, monkeypatch, fresh):
    """Vectors of 8 give the same."""
    monkeypatch.setattr(llvm, "has", lambda feature: False)
    assert llvm.lanes() == 8
    test_largest_score_of_each_page(rng, *CASES[2], torch.bfloat16, CompiledScores.of)


def test_llvm_can_be_looked_at():
    """As vLLM does with what all modules hold, where an engine starts."""
    assert llvm.compiles()
    for name in [name for name in sys.modules if name.startswith("llvmlite")]:
        for value in vars(sys.modules[name]).values():
            assert not hasattr(value, "__dict__") or "get" in dir(vars(value))


def test_without_llvm_torch_scores(monkeypatch):
    monkeypatch.setattr(llvm, "compiles", lambda: False)
    assert isinstance(span_scores(16, 32, torch.float32), TorchScores)
