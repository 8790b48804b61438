"""What the CUDA backend gives, against the oracle; see `conftest.py`."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dam_vllm.attention.oracle import masked_attention, page_mask
from dam_vllm.options import OptionError
from tests.engine.cuda_steps import (
    DECODE,
    FP8,
    GROUP,
    HEADS,
    KEY_SCALE,
    KV_HEADS,
    LONGEST,
    MIXED,
    OWN,
    PAGE,
    QUERY_SCALE,
    SIZE,
    VALUE_SCALE,
    Steps,
)
from tests.unit.attention.cuda.launches import Launches
from tests.unit.attention.cuda.varlen_oracle import varlen

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("options", "dtype", "stored", "softcap", "mode"),
    [
        ({"kernel": "triton", "dense_below": 40}, torch.float32, None, 0.0, "static"),
        ({"kernel": "flash", "dense_below": 0}, OWN, None, 3.0, "static"),
        ({"granularity": "token", "dense_below": 7}, torch.float16, None, 0.0, "static"),
        ({"dense_below": 0}, torch.bfloat16, torch.float8_e4m3fn, 0.0, "static"),
        ({"dense_below": 40}, OWN, None, 0.0, "dynamic"),
        ({"kernel": "triton", "dense_below": 0}, torch.float32, None, 3.0, "dynamic"),
        ({"kernel": "naive", "dense_below": 0}, torch.float32, None, 0.0, "dynamic"),
    ],
)  # fmt: skip
def test_step_equals_oracle(backend, rng, device, requests, options, dtype, stored, softcap, mode):
    torch.manual_seed(int(rng.integers(2**31)))
    served = backend(dtype, stored, softcap, mode, **options)
    steps = Steps(rng, device, dtype, stored)
    metadata = served.builder.build(0, steps.step(served, requests))
    found = steps.run(served, metadata)
    wanted = steps.expected(
        served, options.get("granularity", "page"), options["dense_below"], softcap
    )
    error = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, wanted, rtol=error, atol=error)


@pytest.mark.parametrize("requests", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_flash_attention_3_serves_an_fp8_cache(backend, rng, device, monkeypatch, requests, mode):
    """With descales, over queries that vLLM quantises, or we where some are rotated first."""
    from vllm.v1.attention.backends import flash_attn

    given = []

    def record(**each):
        given.append(each)
        varlen(**each)

    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", record, raising=False)
    torch.manual_seed(int(rng.integers(2**31)))
    served = backend(torch.bfloat16, FP8, 0.0, mode, version=3, kernel="flash", dense_below=0)
    assert served.impl.asks == (mode == "static")
    assert served.impl.supports_quant_query_input  # of FlashAttention's own path
    steps = Steps(rng, device, torch.bfloat16, FP8)
    metadata = served.builder.build(0, steps.step(served, requests))
    given.clear()
    found = steps.run(served, metadata)
    assert given
    for each in given:
        assert each["q"].dtype == each["k"].dtype == each["v"].dtype == FP8
        assert each["softmax_scale"] == pytest.approx(0.17)
        sequences = len(each["seqused_k"])
        for name, scale in (("q", QUERY_SCALE), ("k", KEY_SCALE), ("v", VALUE_SCALE)):
            assert each[f"{name}_descale"].shape == (sequences, 1)
            assert (each[f"{name}_descale"] == torch.tensor(scale)).all()
    torch.testing.assert_close(found, steps.expected(served), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_dense_steps_of_an_fp8_cache_are_flash_attentions_own(
    backend, rng, device, monkeypatch, mode
):
    """Also layers without masks beside dynamic ones; their queries come quantised there too."""
    from vllm.v1.attention.backends import flash_attn

    given = []
    monkeypatch.setattr(
        flash_attn, "flash_attn_varlen_func", lambda *_, **each: given.append(each), raising=False
    )
    served = backend(torch.bfloat16, FP8, 0.0, mode, version=3, dense_below=512)
    steps = Steps(rng, device, torch.bfloat16, FP8)
    metadata = served.builder.build(0, steps.step(served, MIXED))
    assert metadata.planned is None
    for rotation in (served.impl.rotation, None):
        served.impl.rotation, given[:] = rotation, []
        steps.run(served, metadata)
        (each,) = given
        assert each["q"].dtype == each["k"].dtype == FP8
        assert (each["q_descale"] == torch.tensor(QUERY_SCALE)).all()


@pytest.mark.parametrize(
    ("version", "dtype", "granularity"),
    [(4, torch.bfloat16, "page"), (3, torch.float16, "page"), (3, torch.bfloat16, "token")],
)
def test_triton_serves_an_fp8_cache_elsewhere(backend, rng, device, version, dtype, granularity):
    served = backend(dtype, FP8, version=version, dense_below=512, granularity=granularity)
    assert not served.impl.asks
    assert not served.impl.supports_quant_query_input
    steps = Steps(rng, device, dtype, FP8)
    # Even where every page is read: FlashAttention would take quantised queries alone.
    found = steps.run(served, served.builder.build(0, steps.step(served, MIXED)))
    torch.testing.assert_close(
        found, steps.expected(served, granularity, 512), rtol=3e-2, atol=3e-2
    )


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_decode_metadata_serves_other_lengths(backend, rng, device, mode):
    """What a CUDA graph replays: the same launches over tensors whose contents changed."""
    served = backend(mode=mode, kernel="triton", dense_below=0)
    steps = Steps(rng, device, torch.float32, None)
    kept = steps.step(served, DECODE)
    kept = replace(kept, max_seq_len=LONGEST)
    metadata = served.builder.build_for_cudagraph_capture(kept)
    new = steps.step(served, ((97, 1), (512, 1), (33, 1)))
    kept.seq_lens.copy_(torch.cat([new.seq_lens, torch.zeros_like(new.seq_lens[:1])]))
    kept.query_start_loc.copy_(torch.cat([new.query_start_loc, new.query_start_loc[-1:]]))
    kept.block_table_tensor[:3] = new.block_table_tensor
    steps.query = torch.cat([steps.query, steps.query[:1]])
    found = steps.run(served, metadata)
    torch.testing.assert_close(found[:3], steps.expected(served), rtol=1e-4, atol=1e-4)


# Which KV heads a rank holds; one shares the second KV head with another rank.
LATER, SHARED = (1, KV_HEADS), (1, 2, 1, 2)


@pytest.mark.parametrize(
    ("options", "mode", "ranks"),
    [
        ({"kernel": "flash"}, "dynamic", [LATER]),
        ({"granularity": "token"}, "static", [LATER, SHARED]),
    ],
)
def test_a_rank_serves_its_own_heads(backend, rng, device, options, mode, ranks):
    """Under tensor parallelism: its query heads alone give what they give among all."""
    from dam_vllm.masks.sharding import Shard

    whole = backend(mode=mode, dense_below=0, **options)
    steps = Steps(rng, device, torch.float32, None)
    common = steps.step(whole, MIXED)
    found = steps.run(whole, whole.builder.build(0, common))
    for local in ranks:
        own = Shard(*local).query_heads(whole.masks)
        rank = backend(mode=mode, masks=whole.masks, local=local, dense_below=0, **options)
        query = steps.query[:, own].contiguous()
        cache, output = steps.cache[:, slice(*local[:2])], torch.full_like(query, torch.nan)
        metadata = rank.builder.build(0, common)
        rank.impl.forward(rank.layer, query, None, None, cache.contiguous(), metadata, output)
        torch.testing.assert_close(output.cpu(), found[:, own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["auto", "naive"])
def test_guessed_tokens_choose_pages_one_by_one(backend, rng, device, kernel):
    """Queries that verify guesses, but not short ends of prompts."""
    served = backend(mode="dynamic", dense_below=0, kernel=kernel)
    served.builder.guessed = 3
    requests = ((300, 1), (411, 250), (391, 3), (271, 2))
    steps = Steps(rng, device, torch.float32, None)
    common = steps.step(served, requests)
    common.is_prefilling = torch.tensor([False, True, False, True])
    found = steps.run(served, served.builder.build(0, common))
    # The third request's, as if each had come in a step of its own.
    steps.requests = (*requests[:2], (389, 1), (390, 1), (391, 1), requests[3])
    for kept in (steps.keys, steps.values):
        kept[2:3] = [kept[2][:stop] for stop in (389, 390, 391)]
    torch.testing.assert_close(found, steps.expected(served), rtol=1e-4, atol=1e-4)


def test_short_steps_are_flash_attentions_own(backend, rng, device):
    served = backend(dense_below=512)
    steps = Steps(rng, device, torch.float32, None)
    assert served.builder.build(0, steps.step(served, MIXED)).planned is None
    assert served.builder.build(0, steps.step(served, DECODE)).planned is not None


@pytest.mark.parametrize("stored", [None, FP8])
def test_keys_of_dynamic_heads_are_turned_as_they_are_stored(backend, rng, device, stored):
    """By the one launch that stores them; padding is left alone."""
    served = backend(stored=stored, mode="dynamic", dense_below=0)
    cache = torch.full((6, KV_HEADS, PAGE, 2 * SIZE), torch.nan).to(stored or torch.float32)
    cache, rotation = cache.to(device), served.impl.rotation
    fused = torch.randn(40, HEADS + 2 * KV_HEADS, SIZE).to(device)
    key, value = fused[:, HEADS:].split(KV_HEADS, dim=1)
    slots = torch.from_numpy(rng.permutation(6 * PAGE)[:37]).to(device)
    slots[5] = -1
    with Launches() as launches:
        handed = cache.view(torch.uint8) if stored else cache
        served.impl.do_kv_cache_update(served.layer, key, value, handed, slots)
    assert launches.all == ["_store_kernel"]
    wanted, kept = torch.cat([rotation.keys(key), value], dim=-1), slots >= 0
    if stored:
        scales = torch.tensor([KEY_SCALE, VALUE_SCALE], device=device).repeat_interleave(SIZE)
        wanted = (wanted / scales).to(stored)
    found = cache[slots[kept] // PAGE, :, slots[kept] % PAGE].float()
    error = 0.13 if stored else 1e-5
    torch.testing.assert_close(found, wanted[:37][kept].float(), rtol=error, atol=error)
    assert cache.float().isnan().all(dim=-1).sum() == (6 * PAGE - 36) * KV_HEADS


def test_token_masks_do_not_depend_on_the_step(backend, rng, device):
    """Pages of 48 make query blocks of 144: up to there queries are dense, in any step."""
    torch.manual_seed(int(rng.integers(2**31)))
    served = backend(page=48, granularity="token", dense_below=40)
    steps = Steps(rng, device, torch.float32, None, page=48)
    assert served.builder.build(0, steps.step(served, ((144, 144),))).planned is None
    found = steps.run(served, served.builder.build(0, steps.step(served, ((301, 301),))))
    dense = torch.ones(1, 144, 144, dtype=torch.bool).tril().expand(HEADS, -1, -1)
    key, value = steps.keys[0][:144], steps.values[0][:144]
    wanted = masked_attention(steps.query[:144].cpu(), key, value, dense, 0.17)
    torch.testing.assert_close(found[:144], wanted, rtol=1e-4, atol=1e-4)
    wanted = steps.expected(served, "token", 40)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_whole_layers_are_refused_beside_a_quantised_cache(backend, random_masks):
    masks = random_masks(layers=1, heads=HEADS, kv_heads=KV_HEADS)
    masks.header.layer_types[0] = "other"
    assert not backend(masks=masks).builder.masked
    with pytest.raises(OptionError, match=r"--kv-cache-dtype is fp8: .*which model.layers.0"):
        backend(masks=masks, dtype=torch.bfloat16, stored=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("options", "stored", "message"),
    [
        (
            {"kernel": "flash"},
            torch.float8_e4m3fn,
            "dam.kernel is 'flash'.*an fp8 KV cache without FlashAttention 3",
        ),
        ({"kernel": "flash", "granularity": "token"}, None, 'does not serve granularity "token"'),
    ],
)
def test_flash_is_refused_where_it_cannot_serve(backend, options, stored, message):
    with pytest.raises(OptionError, match=message):
        backend(stored=stored, dtype=torch.bfloat16, **options)


def test_pages_are_counted_as_they_are_read(backend, rng, device):
    served = backend(dense_below=0)
    steps = Steps(rng, device, torch.float32, None)
    steps.run(served, served.builder.build(0, steps.step(served, MIXED)))
    query_block = 128
    read, dense = np.zeros((2, 2, KV_HEADS), int)
    for stop, count in MIXED:
        for first in range((stop - count) // query_block * query_block, stop, query_block):
            rows = range(max(first, stop - count), min(first + query_block, stop))
            mask = page_mask(served.masks, 0, rows[0], rows[-1] + 1, PAGE)
            seen = mask[::GROUP, -1]
            padded = np.pad(seen, ((0, 0), (0, -seen.shape[1] % PAGE)))
            pages = padded.reshape(KV_HEADS, -1, PAGE).any(axis=2)
            read[int(count == 1)] += pages.sum(axis=1) * len(rows)
            dense[int(count == 1)] += pages.shape[1] * len(rows)
    told = served.impl.counts.report()
    assert told["read"] == {"prefill": [read[0].tolist()], "decode": [read[1].tolist()]}
    assert told["dense"] == {"prefill": [dense[0].tolist()], "decode": [dense[1].tolist()]}
    densities = read.sum(axis=1) / dense.sum(axis=1)
    assert list(told["densities"].values()) == pytest.approx(densities)
    assert [sum(each) for each in told["steps"].values()] == [1, 1]
    assert told["plan_seconds"] > 0
    served.builder.dense_until = LONGEST
    served.builder.build(0, steps.step(served, MIXED))
    later = served.impl.counts.report()
    for phase, each in zip(("prefill", "decode"), dense, strict=True):
        assert later["read"][phase] == [(np.array(told["read"][phase][0]) + each).tolist()]
        assert later["dense"][phase] == [(2 * each).tolist()]
        assert later["steps"][phase][-1] == told["steps"][phase][-1] + 1


def test_capturing_a_graph_counts_nothing(backend, rng, device):
    served = backend(dense_below=0, kernel="triton")
    steps = Steps(rng, device, torch.float32, None)
    common = steps.step(served, DECODE)
    captured = served.builder.build_for_cudagraph_capture(common)
    steps.run(served, captured)
    assert served.impl.counts.report()["dense"]["decode"] == [[0] * KV_HEADS]
    steps.run(served, captured)  # a replay
    assert served.impl.counts.report()["dense"]["decode"] == [[13 + 1 + 20 + 2] * KV_HEADS]


def test_short_steps_that_a_graph_replays_are_counted_once(backend, rng, device):
    """By the graph, which plans whatever their length."""
    served = backend(dense_below=4096, kernel="triton")
    served.builder.use_full_cuda_graph, served.builder.max_cudagraph_size = True, 8
    steps = Steps(rng, device, torch.float32, None)
    common = steps.step(served, DECODE)
    captured = served.builder.build_for_cudagraph_capture(replace(common, max_seq_len=LONGEST))
    steps.run(served, captured)
    served.builder.build(0, common)
    steps.run(served, captured)  # a replay
    assert served.impl.counts.report()["dense"]["decode"] == [[13 + 1 + 20 + 2] * KV_HEADS]


def test_padded_pages_are_refused(backend):
    with pytest.raises(OptionError, match="KV pages are padded"):
        backend(padded=2**20)


def test_shared_caches_hold_no_rotated_keys(backend):
    assert backend(shares="layers.0").impl.rotation is None
    with pytest.raises(OptionError, match=r"has dynamic heads.*keys of another, layers.0"):
        backend(mode="dynamic", shares="layers.0")
