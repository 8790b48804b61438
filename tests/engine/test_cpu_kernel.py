"""vLLM's kernel on virtual pages against the float32 oracle, for every cache dtype."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dam_vllm.attention.naive import masked_attention, page_mask
from dam_vllm.attention.plan import build_plan, cut_tiles
from dam_vllm.attention.select import PageSelector
from dam_vllm.masks.pages import page_tables

pytestmark = pytest.mark.engine

SIZE, SCALE = 64, 0.17
REQUESTS = ((777, 411), (300, 1), (129, 129), (5, 5), (640, 2), (1, 1))
POISON = {torch.uint8: 0x7F}
# vLLM's CPU kernels cut towards zero when they store fp8: 3 and 2 bits of mantissa.
CACHE_ERROR = {"auto": 0.0, "fp8": 2**-3, "fp8_e5m2": 2**-2}


def fill_cache(keys, values, page, kv_heads, dtype, cache_dtype, isa, rng):
    """A cache with permuted pages, poisoned where nothing is stored, and its block table."""
    from vllm import _custom_ops as ops

    counts = [-(-stop // page) for stop, _ in REQUESTS]
    blocks = sum(counts) + 3
    store = dtype if cache_dtype == "auto" else torch.uint8
    cache = torch.full(
        (blocks, kv_heads, page, 2 * SIZE), POISON.get(store, torch.nan), dtype=store
    )
    table = torch.zeros(len(REQUESTS), max(counts), dtype=torch.int32)
    order = torch.from_numpy(rng.permutation(blocks))
    key_cache, value_cache = cache.view(blocks, kv_heads, 2 * page, SIZE).chunk(2, dim=2)
    for row, (stop, _) in enumerate(REQUESTS):
        pages, order = order[: counts[row]], order[counts[row] :]
        table[row, : counts[row]] = pages
        cache[pages] = 0  # the kernel multiplies what lies after a sequence's end by zero
        token = torch.arange(stop)
        ops.cpu_attn_reshape_and_cache(
            keys[row], values[row], key_cache, value_cache,
            pages[token // page] * page + token % page, isa,
            k_scale=0.5, v_scale=0.25, kv_cache_dtype=cache_dtype,
        )  # fmt: skip
    return cache, table


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "page", "softcap", "tolerance"),
    [
        (torch.float32, "auto", 32, 0.0, 1e-4),
        (torch.float32, "auto", 16, 0.0, 1e-4),
        (torch.float32, "auto", 128, 5.0, 1e-4),
        (torch.float16, "auto", 64, 0.0, 4e-3),
        (torch.bfloat16, "auto", 32, 0.0, 2e-2),
        (torch.bfloat16, "auto", 128, 5.0, 2e-2),
        (torch.bfloat16, "fp8", 32, 0.0, 2e-2),
        (torch.bfloat16, "fp8_e5m2", 32, 0.0, 2e-2),
    ],
)
def test_kernel_equals_oracle(rng, random_masks, dtype, cache_dtype, page, softcap, tolerance):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from dam_vllm.engine.cpu import DamCPUImpl, DamCPUMetadataBuilder, VirtualBatch
    from dam_vllm.engine.naive import read_pages

    torch.manual_seed(int(rng.integers(2**31)))
    masks = random_masks(layers=1, heads=6, kv_heads=3, pcl=150, share=0.01, dense=True)
    new = [torch.randn(count, 6, SIZE).to(dtype) for _, count in REQUESTS]
    keys = [torch.randn(stop, 3, SIZE).to(dtype) for stop, _ in REQUESTS]
    values = [torch.randn(stop, 3, SIZE).to(dtype) for stop, _ in REQUESTS]
    isa = _get_attn_isa(dtype, page, SIZE, cache_dtype)
    cache, table = fill_cache(keys, values, page, 3, dtype, cache_dtype, isa, rng)
    lens = torch.tensor([stop for stop, _ in REQUESTS], dtype=torch.int32)
    starts = torch.tensor([0, *np.cumsum([count for _, count in REQUESTS])], dtype=torch.int32)
    selector = PageSelector([page_tables(masks, 0, page)])
    plan = build_plan(selector, cut_tiles(starts, lens, selector.tile), table)

    builder = SimpleNamespace(
        group=2, head_dim=SIZE, dtype=dtype, isa=isa, kv_cache_dtype=cache_dtype
    )
    schedule = DamCPUMetadataBuilder._schedule(builder, plan.query_start_loc, plan.seq_lens[0])
    batch = VirtualBatch(plan.block_table[0], plan.seq_lens[0], plan.query_start_loc, schedule)
    impl = SimpleNamespace(
        num_kv_heads=3, scale=SCALE, logits_soft_cap=softcap, kv_cache_dtype=cache_dtype
    )
    layer = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=0.25)
    output = torch.full((int(starts[-1]), 6 * SIZE), torch.nan, dtype=dtype)
    DamCPUImpl._read_pages(impl, layer, torch.cat(new), cache, batch, output)

    found = output.view(-1, 6, SIZE).float()
    for row, (stop, count) in enumerate(REQUESTS):
        stored = read_pages(cache[table[row, : -(-stop // page)].long()], cache_dtype)
        scales = (1.0, 1.0) if cache_dtype == "auto" else (0.5, 0.25)
        key, value = (part[:stop] * scale for part, scale in zip(stored, scales, strict=True))
        for read, original in ((key, keys[row]), (value, values[row])):
            error = CACHE_ERROR[cache_dtype]
            torch.testing.assert_close(read, original.float(), rtol=error, atol=error / 50)
        mask = torch.from_numpy(page_mask(masks, 0, stop - count, stop, page))
        expected = masked_attention(new[row], key, value, mask, SCALE, softcap)
        result = found[starts[row] : starts[row + 1]]
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
