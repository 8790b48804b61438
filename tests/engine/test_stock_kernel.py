"""What tests of equality rest on: how vLLM's CPU kernel rounds by what else a step holds.

It goes through a sequence's keys in tiles, whose size follows from the second-level cache and from
how many of the sequence's queries one thread takes at a time (csrc/cpu/cpu_attn_impl.hpp). Where a
tile holds all keys, a query's result depends on nothing else; beyond that, softmax sums in another
order where queries are cut elsewhere: by a chunk's end, or where a thread's share of a step ends.
"""

import itertools

import pytest
import torch

from dam_vllm.attention.cpu.kernel import CPULayer, VirtualBatch
from dam_vllm.attention.layout import KVLayout
from tests.conftest import fresh_seed

pytestmark = pytest.mark.engine

# Shapes of the demo model.
PAGE, HEADS, SIZE = 32, 2, 32
QUERIES, LONG = 128, 5001
# Keys that one tile holds with 512 KiB of cache: at most 1216 in bfloat16, 672 in float32, where
# every change of order shows.
SHORT = {torch.bfloat16: 1203, torch.float32: 651}


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "0")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Kernel:
    """The kernel over random keys, in random pages."""

    def __init__(self, dtype):
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        from dam_vllm.engine.cpu import CPUKernel

        torch.manual_seed(fresh_seed())
        isa = _get_attn_isa(dtype, PAGE, SIZE, "auto")
        self.kernel = CPUKernel(HEADS, SIZE, dtype, isa, "auto")
        pages = -(-LONG // PAGE)
        self.cache = torch.randn(pages, 1, PAGE, 2 * SIZE).to(dtype)
        self.table = torch.randperm(pages).int()
        self.query = torch.randn(QUERIES, HEADS, SIZE).to(dtype)

    def attend(self, *sequences):
        """Sequences of the first or last so many queries, each up to a number of keys."""
        asked = [self.query[rows] for rows, _ in sequences]
        starts = list(itertools.accumulate(map(len, asked), initial=0))
        starts = torch.tensor(starts, dtype=torch.int32)
        lens = torch.tensor([keys for _, keys in sequences], dtype=torch.int32)
        output = torch.full((int(starts[-1]), HEADS, SIZE), torch.nan).to(self.query)
        tables = self.table.expand(len(lens), -1).contiguous()
        schedule = self.kernel.schedule(starts, lens)
        self.kernel.attend(
            torch.cat(asked), *KVLayout(True, None).keys_and_values(self.cache), output,
            VirtualBatch(None, tables, lens, starts, schedule), CPULayer(SIZE**-0.5, 0.0, [0]),
        )  # fmt: skip
        assert not output.isnan().any()
        return output.split([len(each) for each in asked])


@pytest.mark.parametrize("dtype", SHORT)
def test_keys_of_one_tile_round_alike_wherever_queries_are_cut(threads, dtype):
    kernel, keys = Kernel(dtype), SHORT[dtype]
    whole = slice(None), keys
    (alone,) = kernel.attend(whole)
    _, beside, _ = kernel.attend((slice(0, 77), 777), whole, (slice(None), 1000))
    assert torch.equal(alone, beside)
    for cut in (1, 12, 53, 120):
        first, _, second = kernel.attend(
            (slice(0, cut), keys - QUERIES + cut), (slice(None), 1000), (slice(cut, None), keys)
        )
        assert torch.equal(alone, torch.cat([first, second])), cut


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_with_one_thread_a_whole_sequence_rounds_alike_beside_others(threads):
    kernel, whole = Kernel(torch.float32), (slice(None), LONG)
    (alone,) = kernel.attend(whole)
    _, beside, _ = kernel.attend((slice(0, 77), 777), whole, (slice(None), LONG - 1000))
    assert torch.equal(alone, beside)
