"""Pieces of compiled functions by themselves."""

import pytest
import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.llvm_text import LOADED, widened

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", LOADED)
def test_numbers_become_float32(rng, lanes, dtype):
    """Every one of a byte, but for e4m3's NaN, which no cache holds."""
    vector = f"<{lanes} x float>"
    body = f"""
{widened("value", "%given", dtype, lanes)}
  store {vector} %value, ptr %result, align 4
  br label %done
"""
    function = llvm.compiled("widened", {"given": "ptr", "result": "ptr"}, "", body)
    if dtype in FP8:
        given = torch.arange(256, dtype=torch.uint8).view(dtype)
        given = given[given.float().isfinite()]
        given = torch.cat([given, given[: -len(given) % lanes]])
    else:
        given = torch.from_numpy(rng.normal(size=64)).to(dtype) * 1e-4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for some in given.split(lanes):
            result = torch.empty(lanes)
            function.call(some.data_ptr(), result.data_ptr())
            assert torch.equal(result, some.float())
    finally:
        torch.set_num_threads(threads)
