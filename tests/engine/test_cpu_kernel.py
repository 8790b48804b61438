"""vLLM's kernel on virtual pages against the float32 oracle, for every cache dtype."""

import numpy as np
import pytest
import torch

from dam_vllm.attention.cpu.attention import CPUAttention
from dam_vllm.attention.cpu.kernel import CPULayer
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import FP8_DTYPES, KVLayout
from dam_vllm.attention.oracle import masked_attention, page_mask
from dam_vllm.attention.rotation import HeadRotation
from dam_vllm.masks.page_tables import PageSelector, page_tables
from dam_vllm.masks.sharding import Shard
from tests.conftest import needs_fp8_on_cpu
from tests.oracle import dynamic_mask

pytestmark = pytest.mark.engine

SIZE, SCALE, RANK = 64, 0.17, Shard(0, 3)
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
        (torch.bfloat16, "auto", 32, 0.0, 3e-2),
        (torch.bfloat16, "auto", 128, 5.0, 3e-2),
        pytest.param(torch.bfloat16, "fp8", 32, 0.0, 3e-2, marks=needs_fp8_on_cpu),
        pytest.param(torch.bfloat16, "fp8_e5m2", 32, 0.0, 3e-2, marks=needs_fp8_on_cpu),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_kernel_equals_oracle(
    rng, random_masks, dtype, cache_dtype, page, softcap, tolerance, dynamic
):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from dam_vllm.engine.cpu import CPUKernel

    torch.manual_seed(int(rng.integers(2**31)))
    masks = random_masks(
        layers=1, heads=6, kv_heads=3, pcl=150, share=0.01, dense=True, dynamic=dynamic,
        head_size=SIZE,
    )  # fmt: skip
    new = [torch.randn(count, 6, SIZE).to(dtype) for _, count in REQUESTS]
    keys = [torch.randn(stop, 3, SIZE).to(dtype) for stop, _ in REQUESTS]
    values = [torch.randn(stop, 3, SIZE).to(dtype) for stop, _ in REQUESTS]
    isa = _get_attn_isa(dtype, page, SIZE, cache_dtype)
    kernel = CPUKernel(2, SIZE, dtype, isa, cache_dtype)
    scales = (1.0, 1.0) if cache_dtype == "auto" else (0.5, 0.25)
    heads = DynamicHeads.of_layer(masks, 0, RANK, page, 0, SCALE * scales[0], softcap)
    rotation = HeadRotation.of_layer(masks, 0, RANK)
    turned = [rotation.keys(key) for key in keys] if rotation else keys
    cache, table = fill_cache(turned, values, page, 3, dtype, cache_dtype, isa, rng)
    lens = torch.tensor([stop for stop, _ in REQUESTS], dtype=torch.int32)
    starts = torch.tensor([0, *np.cumsum([count for _, count in REQUESTS])], dtype=torch.int32)
    step = Step(starts, starts, lens, table, int(starts[-1]), 411, 777)
    fixed = [0, 2] if dynamic else [0, 1, 2]
    attention = CPUAttention(
        served={"layer": CPULayer(SCALE, softcap, fixed, heads, *scales)},
        selector=PageSelector([page_tables(masks, 0, page)]),
        kernel=kernel,
        layout=KVLayout(True, FP8_DTYPES.get(cache_dtype)),
    )
    output = torch.full((int(starts[-1]), 6, SIZE), torch.nan, dtype=dtype)
    query = torch.cat(new)
    asked = rotation.queries(query, 3) if rotation else query
    plan = attention.plan(step)
    attention.run(plan, "layer", asked, cache, output)

    found = output.float()
    agreed = []
    for row, (stop, count) in enumerate(REQUESTS):
        stored = read_pages(cache[table[row, : -(-stop // page)].long()], cache_dtype)
        key, value = (part[:stop] * scale for part, scale in zip(stored, scales, strict=True))
        for read, original in ((key, turned[row]), (value, values[row])):
            error = CACHE_ERROR[cache_dtype]
            torch.testing.assert_close(read, original.float(), rtol=error, atol=error / 50)
        mask = torch.from_numpy(page_mask(masks, 0, stop - count, stop, page))
        rows = slice(starts[row], starts[row + 1])
        if heads:
            mine = dynamic_pages(attention, plan, asked, cache, row, page)
            static = page_mask(masks, 0, stop - count, stop, page, query_block=page)[2]
            oracle = dynamic_mask(
                masks, 0, 1, asked[rows].view(count, 3, 2, SIZE)[:, 1], key[:, 1], static, page,
                SCALE, softcap,
            )  # fmt: skip
            own = mine[:, :stop] & torch.ones(count, stop, dtype=bool).tril(stop - count)
            agreed.append(float((own.numpy() == oracle).mean()))
            # Random pages are nearly equal, and rounding may order them otherwise.
            mask[2:4] = own
            key[:, 1] = key[:, 1] @ rotation.rotations[0].T
        expected = masked_attention(new[row], key, value, mask, SCALE, softcap)
        torch.testing.assert_close(found[rows], expected, rtol=tolerance, atol=tolerance)
    assert not heads or min(agreed) > 0.99


def read_pages(pages, cache_dtype):
    """Keys and values of pages in order, float32 [tokens, kv_heads, SIZE] each; ours, plainly."""
    stored = pages.view(FP8_DTYPES.get(cache_dtype, pages.dtype))
    count, kv_heads, page, _ = pages.shape
    flat = stored.reshape(count, kv_heads, 2, page * SIZE)
    keys = flat[:, :, 0].view(count, kv_heads, SIZE, page).float().permute(0, 3, 1, 2)
    values = flat[:, :, 1].view(count, kv_heads, page, SIZE).float().permute(0, 2, 1, 3)
    return keys.reshape(-1, kv_heads, SIZE), values.reshape(-1, kv_heads, SIZE)


def dynamic_pages(attention, plan, query, cache, row, page):
    """What dynamic head 1 selects for a request's queries, bool [queries, pages * page]."""
    selected = attention.select(plan, "layer", query.view(len(query), 3, -1, SIZE), cache)[0]
    mine = plan.choosing.asking.blocks.request == row
    count = (plan.choosing.asking.blocks.stop - plan.choosing.asking.blocks.start)[mine]
    return selected[mine].repeat_interleave(count, dim=0).repeat_interleave(page, dim=1)
