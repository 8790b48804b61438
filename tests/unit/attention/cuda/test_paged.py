"""The Triton kernels against the float32 oracle: on a GPU, or under Triton's interpreter."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dam_vllm.attention.cuda.paged import Softmax, attend_paged
from dam_vllm.attention.cuda.places import Places
from dam_vllm.attention.cuda.plan import DevicePlan, plan_heads
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_slots
from dam_vllm.attention.cuda.token_bits import TokenBits
from dam_vllm.attention.oracle import exact_mask, masked_attention, page_mask
from dam_vllm.masks.page_tables import PageSelector, dense_until, page_tables, query_block_size
from tests.unit.attention.cuda.varlen_oracle import log_sum_exp

pytestmark = pytest.mark.slow

SCALE, KEY_SCALE, VALUE_SCALE = 0.17, 0.5, 0.25
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Tokens up to the last query, and queries: whole prompts, chunks that start anywhere, decoding.
REQUESTS = ((391, 203), (300, 1), (129, 129), (0, 0), (5, 5), (271, 2), (1, 1))
DECODE = ((391, 1), (1, 1), (640, 1), (0, 0), (129, 1))
ERROR = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass
class Batch:
    """Requests in a paged cache with permuted pages, poisoned where nothing is stored."""

    requests: tuple
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    block_table: torch.Tensor
    query_blocks: DeviceQueryBlocks
    keys: list
    values: list


def make_batch(rng, device, requests, heads, kv_heads, size, page, dtype, stored, query_block):
    torch.manual_seed(int(rng.integers(2**31)))
    counts = [-(-stop // page) for stop, _ in requests]
    blocks, width = sum(counts) + 2, max(counts) + 1
    cache = torch.full((blocks, kv_heads, page, 2 * size), torch.nan).to(stored)
    table = torch.from_numpy(rng.integers(2**20, 2**30, (len(requests), width))).int()
    order = rng.permutation(blocks)
    keys, values = [], []
    for row, (stop, _) in enumerate(requests):
        pages, order = torch.from_numpy(order[: counts[row]]), order[counts[row] :]
        table[row, : counts[row]] = pages
        both = torch.randn(stop, kv_heads, 2 * size).to(dtype).to(stored)
        token = torch.arange(stop)
        cache.view(torch.uint8)
        cache[pages[token // page], :, token % page] = both
        keys.append(both[..., :size].float())
        values.append(both[..., size:].float())
    key, value = cache.to(device).view(-1, page, 2 * size).split(size, dim=-1)
    new = np.array([count for _, count in requests])
    query = torch.randn(int(new.sum()) + 3, heads, size).to(dtype)
    starts = torch.from_numpy(np.concatenate([[0], new.cumsum()])).int()
    lens = torch.tensor([stop for stop, _ in requests], dtype=torch.int32)
    request, offset = torch.from_numpy(query_block_slots(new, query_block)).to(device)
    query_blocks = DeviceQueryBlocks(
        request,
        offset,
        starts.to(device),
        lens.to(device),
        query_block,
        int(min(new.max(), query_block)),
    )
    return Batch(
        requests, query.to(device), key, value, table.to(device), query_blocks, keys, values
    )


def check(batch, output, lse, mask_of, dtype, softcap, scales):
    """Holds each request's rows against the oracle; other rows must be untouched."""
    heads, heads_per_kv = batch.query.shape[1], batch.query.shape[1] // batch.keys[0].shape[1]
    row = 0
    for (stop, count), key, value in zip(batch.requests, batch.keys, batch.values, strict=True):
        if count == 0:
            continue
        query = batch.query[row : row + count].cpu()
        mask = torch.from_numpy(mask_of(stop - count, stop))
        assert mask.shape[0] == heads
        assert heads_per_kv * key.shape[1] == heads
        wanted = masked_attention(query, key * scales[0], value * scales[1], mask, SCALE, softcap)
        found = output[row : row + count].float().cpu()
        torch.testing.assert_close(found, wanted, rtol=ERROR[dtype], atol=ERROR[dtype])
        sums = log_sum_exp(query, key * scales[0], mask, SCALE, softcap)
        torch.testing.assert_close(lse[row : row + count].cpu(), sums.T, rtol=1e-4, atol=1e-4)
        row += count
    assert output[row:].isnan().all()
    assert lse[row:].isnan().all()


@pytest.mark.parametrize("requests", [REQUESTS, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "page", "dtype", "stored", "softcap", "granularity"),
    [
        (4, 2, 64, 32, torch.float32, None, 0.0, "page"),
        (6, 2, 96, 16, torch.float16, None, 3.0, "token"),
        (2, 2, 128, 128, torch.bfloat16, None, 0.0, "page"),
        (8, 1, 64, 64, torch.bfloat16, torch.float8_e4m3fn, 0.0, "token"),
        (4, 1, 256, 256, torch.float16, torch.float8_e5m2, 0.0, "page"),
        (5, 1, 80, 16, torch.bfloat16, None, 5.0, "page"),
    ],
)  # fmt: skip
def test_attention_equals_oracle(
    rng, random_masks, device, requests, heads, kv_heads, size, page, dtype, stored, softcap,
    granularity,
):  # fmt: skip
    if device.type == "cuda" and stored and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton converts float8 from compute capability 8.9 on")
    masks = random_masks(
        layers=1, heads=heads, kv_heads=kv_heads, pcl=150, share=0.01, dense=kv_heads > 1
    )
    query_block, dense_below = query_block_size(page), int(rng.integers(0, 60))
    batch = make_batch(
        rng, device, requests, heads, kv_heads, size, page, dtype, stored or dtype, query_block
    )
    selector = PageSelector([page_tables(masks, 0, page)], dense_below, device)
    width = batch.block_table.shape[1]
    places = Places.by_head([kv_heads], device)
    plan = DevicePlan.empty(batch.query_blocks, places, width, numbered=granularity == "token")
    every = torch.arange(kv_heads, dtype=torch.int32, device=device)
    rows = sum(count for _, count in requests)
    plan_heads(plan, every, selector, batch.query_blocks, batch.block_table, rows, kv_heads)
    scales = (KEY_SCALE, VALUE_SCALE) if stored else (1.0, 1.0)
    softmax = Softmax(SCALE * scales[0], softcap, scales[1])
    output = torch.full_like(batch.query, torch.nan)
    lse = torch.full(output.shape[:2], torch.nan, device=device)

    def attend(heads, *exact):
        attend_paged(
            batch.query, batch.key, batch.value, output, plan.take(heads), batch.query_blocks,
            every[heads], kv_heads, softmax, *exact, lse=lse,
        )  # fmt: skip

    heads_per_kv = heads // kv_heads
    if granularity == "page":
        attend(slice(None))
    else:
        until = dense_until(dense_below, page)
        exact = TokenBits.of_layer(masks, 0, slice(None), until, device)
        attend(slice(int(kv_heads > 1), None), exact)
        if kv_heads > 1:  # the first head is dense
            attend(slice(1))

    def mask_of(start, stop):
        if granularity == "token":
            return exact_mask(masks, 0, start, stop, page, dense_below)
        return page_mask(masks, 0, start, stop, page, dense_below)

    assert heads_per_kv * kv_heads == heads
    check(batch, output, lse, mask_of, dtype, softcap, scales)
