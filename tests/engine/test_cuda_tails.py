"""Tails through the CUDA backend: scales of all caches, and steps that read everything."""

from dataclasses import replace

import pytest
import torch

from tests.engine.cuda_steps import DECODE, FP8, HEADS, KV_HEADS, OWN, SIZE, Steps

pytestmark = pytest.mark.engine

# The second request starts where means are set; the first of decoding reads none.
MIXED = ((391, 1), (500, 240), (129, 129))


@pytest.fixture
def masks(random_masks):
    """Function that makes masks of one layer whose heads read little and all have tails."""

    def make(mode):
        made = random_masks(
            layers=1, heads=HEADS, kv_heads=KV_HEADS, pcl=150, share=0.0003,
            dynamic=mode == "dynamic", head_size=SIZE,
        )  # fmt: skip
        return replace(made, tails=(made.modes >= 0).astype("u1"))

    return make


def earlier(served, steps, common):
    """Serves, from the first token on, what precedes a step; all of it reads everything."""
    for row, (stop, count) in enumerate(steps.requests):
        new = stop - count
        if new == 0:
            continue
        starts = torch.tensor([0, new], dtype=torch.int32)
        lens = torch.tensor([new], dtype=torch.int32)
        before = replace(
            common, query_start_loc=starts.to(steps.device), query_start_loc_cpu=starts,
            seq_lens=lens.to(steps.device), num_reqs=1, num_actual_tokens=new, max_query_len=new,
            max_seq_len=new, block_table_tensor=common.block_table_tensor[row : row + 1],
            slot_mapping=torch.zeros(new, dtype=torch.int64, device=steps.device),
            seq_lens_cpu_upper_bound=lens,
        )  # fmt: skip
        metadata, query = served.builder.build(0, before), steps.query
        assert metadata.planned is not None
        steps.query = torch.randn(new, HEADS, SIZE).to(query)
        steps.run(served, metadata)
        steps.query = query


@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("options", "dtype", "stored", "mode", "version"),
    [
        ({"kernel": "triton"}, torch.float32, None, "dynamic", None),
        ({"kernel": "triton"}, torch.bfloat16, FP8, "static", None),
        ({"kernel": "flash"}, OWN, None, "dynamic", None),
        ({"kernel": "flash"}, torch.bfloat16, FP8, "static", 3),
        ({"kernel": "flash"}, torch.bfloat16, FP8, "dynamic", 3),
    ],
)
def test_step_equals_oracle(
    backend, rng, device, masks, requests, options, dtype, stored, mode, version
):
    torch.manual_seed(int(rng.integers(2**31)))
    served = backend(dtype, stored, masks=masks(mode), version=version, dense_below=200, **options)
    steps = Steps(rng, device, dtype, stored, drift=1.0)
    common = steps.step(served, requests)
    earlier(served, steps, common)
    found = steps.run(served, served.builder.build(0, common))
    wanted = steps.expected(served, dense_below=200)
    error = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, wanted, rtol=error, atol=error)
    served.masks = replace(served.masks, tails=None)
    without = steps.expected(served, dense_below=200)
    assert (without - wanted).abs().max() > 2 * error
