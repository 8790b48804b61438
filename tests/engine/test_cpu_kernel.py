"""vLLM's kernel on virtual pages against the float32 oracle, for every cache dtype."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dam_vllm.attention.cpu.plan import VirtualPages, build_plan
from dam_vllm.attention.cpu.select import select_dynamic
from dam_vllm.attention.oracle import dynamic_mask, masked_attention, page_mask
from dam_vllm.attention.query_blocks import cut_query_blocks
from dam_vllm.masks.page_tables import PageSelector, page_tables

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
        (torch.bfloat16, "auto", 32, 0.0, 3e-2),
        (torch.bfloat16, "auto", 128, 5.0, 3e-2),
        (torch.bfloat16, "fp8", 32, 0.0, 3e-2),
        (torch.bfloat16, "fp8_e5m2", 32, 0.0, 3e-2),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_kernel_equals_oracle(
    rng, random_masks, dtype, cache_dtype, page, softcap, tolerance, dynamic
):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from dam_vllm.engine.cpu import DamCPUImpl
    from dam_vllm.engine.dynamic import DynamicStep
    from dam_vllm.engine.naive import read_pages
    from dam_vllm.engine.virtual import Scheduler

    torch.manual_seed(int(rng.integers(2**31)))
    masks = random_masks(
        layers=1, heads=6, kv_heads=3, pcl=150, share=0.01, dense=True, dynamic=dynamic,
        head_size=SIZE,
    )  # fmt: skip
    new = [torch.randn(count, 6, SIZE).to(dtype) for _, count in REQUESTS]
    keys = [torch.randn(stop, 3, SIZE).to(dtype) for stop, _ in REQUESTS]
    values = [torch.randn(stop, 3, SIZE).to(dtype) for stop, _ in REQUESTS]
    isa = _get_attn_isa(dtype, page, SIZE, cache_dtype)
    scheduler = Scheduler(2, SIZE, dtype, isa, cache_dtype)
    heads = own_heads(masks, page, softcap, cache_dtype, scheduler)
    turned = [heads.rotation.keys(key) for key in keys] if heads else keys
    cache, table = fill_cache(turned, values, page, 3, dtype, cache_dtype, isa, rng)
    lens = torch.tensor([stop for stop, _ in REQUESTS], dtype=torch.int32)
    starts = torch.tensor([0, *np.cumsum([count for _, count in REQUESTS])], dtype=torch.int32)
    selector = PageSelector([page_tables(masks, 0, page)])
    where = VirtualPages.of_layers(table, 1, 3)
    plan = build_plan(selector, cut_query_blocks(starts, lens, selector.query_block), where)
    fixed = [0, 2] if dynamic else [0, 1, 2]
    step = DynamicStep(cut_query_blocks(starts, lens, page), starts.diff(), where)
    metadata = SimpleNamespace(
        num_actual_tokens=int(starts[-1]),
        virtual={"layer": scheduler.static(plan, 0, 3, fixed)},
        dynamic=step,
    )
    impl = SimpleNamespace(
        num_kv_heads=3, scale=SCALE, logits_soft_cap=softcap, kv_cache_dtype=cache_dtype,
        dynamic=heads,
    )  # fmt: skip
    layer = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=0.25, layer_name="layer")
    output = torch.full((int(starts[-1]), 6 * SIZE), torch.nan, dtype=dtype)
    query = torch.cat(new)
    asked = heads.rotation.queries(query, 3) if heads else query
    DamCPUImpl._serve(impl, layer, asked, cache, metadata, output)

    found = output.view(-1, 6, SIZE).float()
    agreed = []
    for row, (stop, count) in enumerate(REQUESTS):
        stored = read_pages(cache[table[row, : -(-stop // page)].long()], cache_dtype)
        scales = (1.0, 1.0) if cache_dtype == "auto" else (0.5, 0.25)
        key, value = (part[:stop] * scale for part, scale in zip(stored, scales, strict=True))
        for read, original in ((key, turned[row]), (value, values[row])):
            error = CACHE_ERROR[cache_dtype]
            torch.testing.assert_close(read, original.float(), rtol=error, atol=error / 50)
        mask = torch.from_numpy(page_mask(masks, 0, stop - count, stop, page))
        rows = slice(starts[row], starts[row + 1])
        if heads:
            mine = dynamic_pages(heads, asked, cache, step, row, page)
            static = page_mask(masks, 0, stop - count, stop, page, query_block=page)[2]
            oracle = dynamic_mask(
                masks, 0, 1, asked[rows].view(count, 3, 2, SIZE)[:, 1], key[:, 1], static, page,
                SCALE, softcap,
            )  # fmt: skip
            mask[2:4] = mine[:, :stop] & torch.ones(count, stop, dtype=bool).tril(stop - count)
            agreed.append(float((mask[2].numpy() == oracle).mean()))
            key[:, 1] = key[:, 1] @ heads.rotation.rotations[0].T
        expected = masked_attention(new[row], key, value, mask, SCALE, softcap)
        torch.testing.assert_close(found[rows], expected, rtol=tolerance, atol=tolerance)
    # Random pages are nearly equal, and scores in bfloat16 may order them otherwise.
    assert not heads or min(agreed) > (0.7 if dtype == torch.bfloat16 else 0.9999)


def own_heads(masks, page, softcap, cache_dtype, scheduler):
    """The layer's dynamic heads as the builder makes them, or None."""
    from dam_vllm.engine.dynamic import layer_dynamic
    from dam_vllm.engine.shards import Shard

    scale = SCALE if cache_dtype == "auto" else SCALE * 0.5
    stored = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}.get(cache_dtype)
    return layer_dynamic(masks, 0, 0, Shard(0, 3), page, 0, scale, softcap, stored, scheduler)


def dynamic_pages(heads, query, cache, step, row, page):
    """What dynamic head 1 selects for a request's queries, bool [queries, pages * page]."""
    kv_heads, _, width = cache.shape[1:]
    keys = cache.view(-1, 2, width // 2, page)[:, 0]
    asked = query.view(len(query), kv_heads, -1, SIZE)[:, 1].unsqueeze(0)
    tables = step.where.take(0, heads.rotation.heads).tables()[0]
    selected = select_dynamic(heads.dynamic, asked, keys, step.query_blocks, tables)[0]
    mine = step.query_blocks.request == row
    count = (step.query_blocks.stop - step.query_blocks.start)[mine]
    return selected[mine].repeat_interleave(count, dim=0).repeat_interleave(page, dim=1)
