"""The CUDA backend's own code: on a GPU, or on this processor with Triton's interpreter.

What a GPU alone has is replaced where there is none: FlashAttention by an oracle, which also takes
float32 where it is, and the kernel that stores keys by plain indexing.
"""

import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle import exact_mask, masked_attention, page_mask
from dam_vllm.demo import model_dir
from dam_vllm.options import DamOptions, OptionError
from tests.oracle import dynamic_mask
from tests.unit.attention.cuda.launches import Launches, compiled, new, signature
from tests.unit.attention.cuda.no_sync import no_sync
from tests.unit.attention.cuda.varlen_oracle import varlen

pytestmark = pytest.mark.engine

SIZE, PAGE, HEADS, KV_HEADS, LONGEST = 64, 32, 6, 3, 1024
NAME = "model.layers.0.self_attn.attn"
GROUP = HEADS // KV_HEADS
QUERY_SCALE, KEY_SCALE, VALUE_SCALE = 0.03, 0.5, 0.25
FP8 = torch.float8_e4m3fn
# What FlashAttention takes itself, where there is a GPU.
OWN = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# Tokens up to the last query, and queries; vLLM puts requests with one query first.
MIXED = ((300, 1), (65, 1), (411, 250), (129, 129), (5, 5), (271, 2))
DECODE = ((391, 1), (1, 1), (640, 1), (64, 1))


@pytest.fixture
def backend(monkeypatch, random_masks, device):
    """Function that makes the backend's builder and implementation for one layer."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

    from dam_vllm.engine import backend as shared
    from dam_vllm.engine import cuda, cuda_builder, cuda_layers
    from dam_vllm.engine.checks import Serving
    from dam_vllm.masks.sharding import Shard

    stock = getattr(flash_attn, "flash_attn_varlen_func", None)

    def make(
        dtype=torch.float32, stored=None, softcap=0.0, mode="static", padded=None, masks=None,
        local=(0, KV_HEADS), shares=None, version=None, **options,
    ):  # fmt: skip
        masks = masks or random_masks(
            layers=1, heads=HEADS, kv_heads=KV_HEADS, pcl=150, share=0.01,
            dense=mode == "static", dynamic=mode == "dynamic", head_size=SIZE,
        )  # fmt: skip
        kv_heads = local[1] - local[0]
        serving = Serving(DamOptions(**options), Path("masks"), masks)
        for module in (cuda, cuda_builder, cuda_layers, shared):
            monkeypatch.setattr(module, "admit", lambda config: serving)
        for module in (cuda_layers, shared):
            monkeypatch.setattr(module, "shard", lambda count: Shard(*local))
        if version is not None:
            monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda *a, **given: version)
            schedule = {"get_scheduler_metadata": lambda **given: torch.zeros(5)}
            monkeypatch.setattr(flash_attn, *schedule.popitem(), raising=False)
        monkeypatch.setattr(cuda_builder, "log_masks", lambda *args: None)
        refused = stock is None or dtype == torch.float32
        if refused and getattr(flash_attn, "flash_attn_varlen_func", None) is stock:
            monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", varlen, raising=False)
        monkeypatch.setattr(
            flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *args, **kwargs: True
        )
        name = "fp8_e4m3" if stored else "auto"
        config = EngineArgs(
            model=str(model_dir()),
            max_model_len=LONGEST,
            block_size=PAGE,
            max_num_seqs=6,
            kv_cache_dtype=name,
            dtype=str(dtype).removeprefix("torch."),
        ).create_engine_config()
        with set_current_vllm_config(config):
            made = cuda.DamCUDAImpl(
                kv_heads * GROUP // Shard(*local).parts, SIZE, 0.17, kv_heads, None, None, name,
                logits_soft_cap=softcap, kv_sharing_target_layer_name=shares,
            )  # fmt: skip
        scales = {"q": QUERY_SCALE, "k": KEY_SCALE, "v": VALUE_SCALE}
        floats = {f"_{part}_scale_float": scale for part, scale in scales.items()}
        tensors = {
            f"_{part}_scale": torch.tensor(scale, device=device) for part, scale in scales.items()
        }
        layer = SimpleNamespace(impl=made, layer_name=NAME, **floats, **tensors)
        config.compilation_config.static_forward_context[NAME] = layer
        spec = FullAttentionSpec(
            block_size=PAGE, num_kv_heads=kv_heads, head_size=SIZE, dtype=stored or dtype,
            kv_quant_mode=KVQuantMode.FP8_PER_TENSOR if stored else KVQuantMode.NONE,
            page_size_padded=padded,
        )  # fmt: skip
        made.rotation = made.rotations.of_layer(masks, 0, Shard(*local), device)
        made.counts = made.counting([0], kv_heads, local[0], device)
        monkeypatch.setattr(shared, "set_up_layers", lambda config: None)
        made.asks = made.supports_quant_query_input
        made.process_weights_after_loading(dtype)
        builder = cuda_builder.DamCUDAMetadataBuilder(spec, [NAME], config, device)
        return SimpleNamespace(builder=builder, impl=made, layer=layer, masks=masks)

    return make


class Steps:
    """A paged cache with poison where nothing is stored, and steps over it."""

    def __init__(self, rng, device, dtype, stored):
        self.rng, self.device, self.dtype, self.stored = rng, device, dtype, stored
        self.blocks = 64
        shape = (self.blocks, KV_HEADS, PAGE, 2 * SIZE)
        self.cache = torch.full(shape, torch.nan).to(stored or dtype).to(device)

    def step(self, served, requests):
        """Stores new random requests and gives vLLM's metadata for their last queries."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        counts = [-(-stop // PAGE) for stop, _ in requests]
        order = self.rng.permutation(self.blocks)
        table = torch.full((len(requests), LONGEST // PAGE), 2**30, dtype=torch.int32)
        self.requests, self.keys, self.values = requests, [], []
        for row, (stop, _) in enumerate(requests):
            pages, order = torch.from_numpy(order[: counts[row]].copy()), order[counts[row] :]
            table[row, : counts[row]] = pages
            key, value = (torch.randn(stop, KV_HEADS, SIZE).to(self.dtype) for _ in range(2))
            rotation = served.impl.rotation
            if rotation is not None:
                key = rotation.keys(key.to(self.device)).cpu()
            both = torch.cat([key, value], dim=-1).to(self.cache.dtype)
            token = torch.arange(stop)
            self.cache[pages[token // PAGE], :, token % PAGE] = both.to(self.device)
            self.keys.append(both[..., :SIZE].float())
            self.values.append(both[..., SIZE:].float())
        new = np.array([count for _, count in requests])
        starts = torch.from_numpy(np.concatenate([[0], new.cumsum()])).int()
        lens = torch.tensor([stop for stop, _ in requests], dtype=torch.int32)
        self.query = torch.randn(int(new.sum()), HEADS, SIZE).to(self.dtype).to(self.device)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self.device), query_start_loc_cpu=starts,
            seq_lens=lens.to(self.device), num_reqs=len(requests),
            num_actual_tokens=int(new.sum()), max_query_len=int(new.max()),
            max_seq_len=int(lens.max()), block_table_tensor=table.to(self.device),
            slot_mapping=torch.zeros(int(new.sum()), dtype=torch.int64, device=self.device),
            seq_lens_cpu_upper_bound=lens,
        )  # fmt: skip

    def run(self, served, metadata):
        cache = self.cache.view(torch.uint8) if self.stored else self.cache
        output, query = torch.full_like(self.query, torch.nan), self.query
        if self.stored and served.impl.asks:
            query = (query / QUERY_SCALE).to(FP8)  # by vLLM's layer
        served.impl.forward(served.layer, query, None, None, cache, metadata, output)
        return output.float().cpu()

    def expected(self, served, granularity="page", dense_below=0, softcap=0.0):
        """The oracle's output for the requests of the last step."""
        rows, first = [], 0
        rotation = served.impl.rotation
        query = self.query
        if served.impl.quantises:
            query = served.impl.prepared(served.layer, query).float() * QUERY_SCALE
        elif rotation is not None:
            query = rotation.queries(query, KV_HEADS)
        if self.stored and served.impl.asks:
            query = (query / QUERY_SCALE).to(FP8).float() * QUERY_SCALE
        query = query.cpu()
        scales = (KEY_SCALE, VALUE_SCALE) if self.stored else (1.0, 1.0)
        for (stop, count), key, value in zip(self.requests, self.keys, self.values, strict=True):
            asked = query[first : first + count]
            key, value = key * scales[0], value * scales[1]
            args = (served.masks, 0, stop - count, stop)
            if granularity == "token":
                mask = exact_mask(*args, PAGE, dense_below)
            else:
                mask = page_mask(*args, PAGE, dense_below)
            if rotation is not None:
                static = page_mask(*args, PAGE, dense_below, PAGE)
                for head in rotation.heads.tolist():
                    own = slice(head * GROUP, (head + 1) * GROUP)
                    mask[own] = dynamic_mask(
                        served.masks, 0, head, asked.unflatten(1, (KV_HEADS, GROUP))[:, head],
                        key[:, head], static[head * GROUP], PAGE, 0.17, softcap,
                    )  # fmt: skip
            rows.append(masked_attention(asked, key, value, torch.from_numpy(mask), 0.17, softcap))
            first += count
        return torch.cat(rows)


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


def test_token_masks_do_not_depend_on_the_step(backend, rng, device, monkeypatch):
    """Pages of 48 make query blocks of 144: up to there queries are dense, in any step."""
    monkeypatch.setattr(sys.modules[__name__], "PAGE", 48)
    torch.manual_seed(int(rng.integers(2**31)))
    served = backend(granularity="token", dense_below=40)
    steps = Steps(rng, device, torch.float32, None)
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


def test_shared_caches_hold_no_rotated_keys(backend):
    assert backend(shares="layers.0").impl.rotation is None
    with pytest.raises(OptionError, match=r"has dynamic heads.*keys of another, layers.0"):
        backend(mode="dynamic", shares="layers.0")
