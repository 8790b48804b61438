"""Compiled functions on processors of both kinds."""

import pytest

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.compiled_tail import CompiledTail
from dam_vllm.attention.cpu.last_max import LastScores
from dam_vllm.attention.cpu.page_max import CompiledScores


def forget():
    for compiled in (CompiledScores, CompiledTail, LastScores):
        compiled.of.cache_clear()


@pytest.fixture(params=[16, 8])
def lanes(request, monkeypatch):
    """Vectors of 16, and of 8 as on processors without AVX-512."""
    if request.param > llvm.lanes():
        pytest.skip(f"this processor has vectors of {llvm.lanes()}")
    if request.param < llvm.lanes():
        monkeypatch.setattr(llvm, "has", lambda feature: False)
    forget()
    yield request.param
    forget()
