"""What the CUDA backend asks of a device: launches, compilations, memory, never to wait."""

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from dam_vllm.attention.layout import KVLayout
from tests.engine.cuda_steps import (
    DECODE,
    FP8,
    HEADS,
    KV_HEADS,
    LONGEST,
    MIXED,
    NAME,
    PAGE,
    QUERY_SCALE,
    SIZE,
    Steps,
)
from tests.unit.attention.cuda.launches import Launches, compiled, new, signature
from tests.unit.attention.cuda.no_sync import no_sync

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("requests", [MIXED[1:3], DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"kernel": "flash"}, "static"),
        ({"kernel": "triton"}, "dynamic"),
        ({"granularity": "token"}, "static"),
    ],
)
def test_no_layer_waits_for_the_device(backend, rng, device, monkeypatch, requests, options, mode):
    from vllm.v1.attention.backends import flash_attn

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", lambda **given: None, raising=False)
    served = backend(mode=mode, dense_below=0, **options)
    steps = Steps(rng, device, torch.float32, None)
    metadata = served.builder.build(0, steps.step(served, requests))
    output = torch.empty_like(steps.query)
    with no_sync():
        served.impl.forward(served.layer, steps.query, None, None, steps.cache, metadata, output)


@pytest.mark.parametrize(
    ("mode", "stored", "more"),
    [("static", None, 1), ("static", FP8, 0), ("dynamic", None, 6), ("dynamic", FP8, 6)],
)
def test_short_requests_in_a_graph_take_few_launches(
    backend, rng, device, monkeypatch, mode, stored, more
):
    """Queries that are a slice of the projection, as in serving; besides the plan, one a step."""
    from vllm.v1.attention.backends import flash_attn

    launches = Launches()

    def attend(*args, **given):
        launches.all.append("FlashAttention")

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", attend, raising=False)
    served = backend(torch.bfloat16, stored, mode=mode, version=3, kernel="flash", dense_below=512)
    steps = Steps(rng, device, torch.bfloat16, stored)
    common = steps.step(served, DECODE)
    stock = served.builder.build(0, replace(common, max_seq_len=300))
    assert stock.planned is None
    captured = served.builder.build_for_cudagraph_capture(replace(common, max_seq_len=LONGEST))
    fused = torch.randn(len(DECODE), HEADS + 2 * KV_HEADS, SIZE).to(torch.bfloat16).to(device)
    query = fused[:, :HEADS]
    if served.impl.quantised and served.impl.asks:
        query = (query / QUERY_SCALE).to(FP8)  # by vLLM, contiguous
    counts = []
    for metadata in (stock, captured):
        output = torch.empty(query.shape, dtype=torch.bfloat16, device=device)
        cache = steps.cache.view(torch.uint8) if stored else steps.cache
        launches.all.clear()
        with launches:
            served.impl.forward(served.layer, query, None, None, cache, metadata, output)
        # `flash` is our call of FlashAttention, which tells of itself.
        counts.append([name for name in launches.all if name != "flash"])
    assert counts[0][-1] == "FlashAttention"
    assert len(counts[0]) == (1 if mode == "static" else 2)  # queries are rotated there too
    counts[1].remove("_plan_kernel")
    assert counts[1].count("FlashAttention") == 1
    assert len(counts[1]) <= 1 + more


KERNELS = {
    "counts": {"_close_step"}, "flash": {"_copy_heads"}, "merge": {"_merge_kernel"},
    "paged": {"_attend_kernel"}, "plan": {"_plan_kernel"}, "rotation": {"_rotate"},
    "score": {"_score_pages"}, "select": {"_choose_pages"},
    "shares": {"_share_pages", "_sum_chunks"}, "store": {"_store_kernel"},
}  # fmt: skip


OF_DYNAMIC = KERNELS["score"] | KERNELS["select"] | KERNELS["shares"] | {"_rotate", "_store_kernel"}


@pytest.mark.parametrize(
    ("kernel", "mode", "stored"),
    [
        ("triton", "static", None),
        ("triton", "dynamic", None),
        ("flash", "dynamic", None),
        ("flash", "dynamic", FP8),
    ],
)
def test_serving_compiles_nothing(backend, rng, device, monkeypatch, kernel, mode, stored):
    """Queries, keys and values are slices of one projection, and slots begin anywhere."""
    seen, watched = set(), []
    for name, expected in KERNELS.items():
        module = import_module(f"dam_vllm.attention.cuda.{name}")
        launched = set(re.findall(r"(?<!\w)(\w+)\[\(", Path(module.__file__).read_text()))
        assert launched == expected
        for each in launched:
            watched.append(getattr(module, each))
            if device.type == "cpu":
                monkeypatch.setattr(module, each, signature(watched[-1], seen))
    dtype = torch.float32 if stored is None else torch.bfloat16
    version = None if stored is None else 3
    served = backend(dtype, stored, mode=mode, version=version, kernel=kernel, dense_below=0)
    warmed, before = seen.copy(), compiled(watched) if device.type == "cuda" else None
    steps = Steps(rng, device, dtype, stored)
    cache = steps.cache.view(torch.uint8) if stored else steps.cache
    for requests in (MIXED, DECODE):
        common = steps.step(served, requests)
        count = len(steps.query)
        fused = torch.randn(count, HEADS + 2 * KV_HEADS, SIZE).to(dtype).to(device)
        query, key, value = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        slots = torch.zeros(count + 1, dtype=torch.int64, device=device)[1:]
        if served.impl.storing(served.layer) is not None:  # else vLLM's kernel does
            served.impl.do_kv_cache_update(served.layer, key, value, cache, slots)
        output, metadata = torch.empty_like(steps.query), served.builder.build(0, common)
        served.impl.forward(served.layer, query, None, None, cache, metadata, output)
    if device.type == "cuda":
        assert compiled(watched) == before > 0
        return
    assert new(seen, warmed) == []
    assert ({name for name, *_ in warmed} >= OF_DYNAMIC) == (mode == "dynamic")


def test_a_page_holds_a_block_of_keys_unless_told():
    from dam_vllm.engine.cuda import DamCUDABackend

    assert DamCUDABackend.get_preferred_block_size(16) == 128
    assert DamCUDABackend.get_preferred_block_size(256) == 256
    assert DamCUDABackend.supports_block_size(16)


@pytest.mark.parametrize(("kernel", "rows"), [("flash", 2048), ("triton", 0)])
def test_memory_is_taken_before_the_cache_is(backend, monkeypatch, kernel, rows):
    """While weights are loaded; the builder, which comes after vLLM has measured, takes none."""
    from dam_vllm.attention.cuda import scratch as module
    from dam_vllm.engine import cuda_layers

    served = backend(kernel=kernel, dense_below=0)
    impl, config = served.impl, served.impl.config
    impl.scratch = None
    impl.process_weights_after_loading(torch.float32)
    scratch = impl.scratch
    tokens = config.scheduler_config.max_num_batched_tokens
    assert tokens == 2048
    assert len(scratch.query) == len(scratch.output) == rows * HEADS * SIZE
    monkeypatch.setattr(cuda_layers, "Scratch", None)
    free = scratch.left()
    builder = served.builder._sparse({NAME: served.layer}, KVLayout(False))
    assert builder.scratch is scratch
    taken = free - scratch.left()
    assert 0 < taken * 4 < module.PLAN_BYTES
    width, slots = LONGEST // PAGE, tokens // 128 + 2 * config.scheduler_config.max_num_seqs
    assert taken == pytest.approx(KV_HEADS * slots * (width + 2), rel=0.01)


def test_decoding_bounds_the_splits_of_flash_attention_3(backend, rng, device, monkeypatch):
    """As stock does under CUDA graphs; version 2 takes none, and prefill is never split."""
    from vllm.v1.attention.backends import flash_attn

    given = []
    monkeypatch.setattr(
        flash_attn, "flash_attn_varlen_func", lambda **each: given.append(each), raising=False
    )
    for aot, most, expected in ((True, 32, 32), (True, 0, 0), (False, 32, 0)):
        served = backend(kernel="flash", dense_below=0)
        builder = served.builder
        builder.aot_schedule, builder.max_num_splits = aot, most
        builder.sparse = builder._sparse({NAME: served.layer}, KVLayout(False))
        steps, given[:] = Steps(rng, device, torch.float32, None), []
        steps.run(served, builder.build(0, steps.step(served, MIXED)))
        assert [(each["max_seqlen_q"], each["num_splits"]) for each in given] == [
            (1, expected), (128, 1)
        ]  # fmt: skip
