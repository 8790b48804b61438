"""Configurations that are refused before anything is loaded."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.sharding import Shard
from dam_vllm.options import DamOptions, OptionError
from tests.conftest import random_mask_set
from tests.frontiers import with_frontier

pytestmark = pytest.mark.engine

MODEL = str(model_dir())
DEMO = AutoConfig.from_pretrained(MODEL)


def config(masks, **changed):
    """What admit reads of vLLM's configuration."""
    values = {
        "parallel_config": {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "cache_config": {"block_size": 32, "cache_dtype": "auto"},
        "speculative_config": None,
        "kv_transfer_config": None,
        "model_config": {
            "model": MODEL,
            "revision": None,
            "use_mla": False,
            "is_attention_free": False,
            "is_encoder_decoder": False,
            "attn_type": "decoder",
            "enable_sleep_mode": False,
            "hf_config": DEMO,
            "get_head_size": lambda: DEMO.head_dim,
            "get_total_num_kv_heads": lambda: DEMO.num_key_value_heads,
        },
        "load_config": {"download_dir": None, "load_format": "auto"},
        "additional_config": {"dam": {"masks": str(masks)}},
    }
    for name, change in changed.items():
        values[name] = {**(values[name] or {}), **change}
    parts = {
        name: SimpleNamespace(**value) if name.endswith("_config") and value else value
        for name, value in values.items()
        if name != "additional_config"
    }
    return SimpleNamespace(**parts, additional_config=values["additional_config"])


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    file = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    save_mask_set(streaming(MODEL, 4, 64), file)
    return file


def demo_masks(rng):
    """Random masks of the demo model's shape, with dynamic heads."""
    return random_mask_set(rng, 4, 8, 4, dynamic=True, head_size=32, fingerprint=fingerprint(MODEL))


def test_what_fits_is_served(masks):
    from dam_vllm.engine.checks import admit

    serving = admit(config(masks))
    assert serving.file == masks
    assert serving.masks.kv_heads == 4


def test_the_folder_for_downloads_is_where_masks_are_looked_for(masks, monkeypatch):
    from dam_vllm.engine import checks, serving

    asked = []
    monkeypatch.setattr(serving, "find_masks", lambda *given: asked.append(given) or masks)
    served = config("", load_config={"download_dir": "/downloads"})
    assert checks.admit(served).file == serving.serving_of(served).file == masks
    assert [given[1:] for given in asked] == [(MODEL, None, "/downloads")] * 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "--decode-context-parallel-s"),
        ({"parallel_config": {"prefill_context_parallel_size": 4}}, "-parallel-size is 4"),
        ({"parallel_config": {"use_ubatching": True}}, "--enable-dbo .*plans one batch at a time"),
        (
            {"cache_config": {"block_size": 48}},
            "--block-size is 48: .*multiple of 32 tokens on cpu",
        ),
        ({"cache_config": {"cache_dtype": "nvfp4"}}, "--kv-cache-dtype is nvfp4"),
        ({"model_config": {"use_mla": True}}, "multi-head latent attention"),
        ({"model_config": {"is_attention_free": True}}, "has no attention layers"),
        ({"model_config": {"is_encoder_decoder": True}}, "has an encoder"),
        ({"model_config": {"attn_type": "encoder_only"}}, "has an encoder"),
        ({"model_config": {"enable_sleep_mode": True}}, "--enable-sleep-mode: .* level 2 discards"),
        ({"speculative_config": {"method": "draft_model"}}, "--speculative-config names a draft"),
    ],
)
def test_refused(masks, changed, message):
    from dam_vllm.engine.checks import admit

    with pytest.raises(OptionError, match=message):
        admit(config(masks, **changed))


def test_other_platforms_are_refused(masks, monkeypatch):
    from dam_vllm.engine import checks

    # As ROCm calls itself.
    other = SimpleNamespace(device_type="cuda", device_name="rocm")
    monkeypatch.setattr(checks, "current_platform", other)
    with pytest.raises(OptionError, match="it serves on cpu and cuda, not on rocm"):
        checks.admit(config(masks))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"layers": 3}, "it has layers 3, the model 4"),
        ({"heads": 4}, "it has query heads 4, the model 8"),
        ({"kv_heads": 2}, "it has KV heads 2, the model 4"),
        ({"head_size": 16}, "it has channels a head 16, the model 32"),
        ({"layer_types": ["full", "full", "sliding", "full"]}, "it has layer types .*'sliding'"),
    ],
)
def test_masks_of_another_shape_are_refused_whatever_their_fingerprint(
    tmp_path, rng, shape, message
):
    from dam_vllm.engine.checks import admit

    whole = {"layers": 4, "heads": 8, "kv_heads": 4, "head_size": 32} | shape
    types = whole.pop("layer_types", None)
    made = random_mask_set(rng, **whole, dynamic=True, fingerprint=fingerprint(MODEL))
    if types is not None:
        made.header.layer_types = types
        for array in (made.columns, made.diagonals, made.true_bits, made.modes):
            array[2] = 0
    save_mask_set(made, tmp_path / "masks")
    with pytest.raises(OptionError, match=f"masks does not fit {MODEL}: {message}"):
        admit(config(tmp_path / "masks"))


def test_rotated_pages_stay_in_the_process(tmp_path, rng):
    from dam_vllm.engine.checks import admit

    file = tmp_path / "masks.safetensors"
    save_mask_set(demo_masks(rng), file)
    assert admit(config(file)).masks.dynamic is not None
    with pytest.raises(OptionError, match=r"--kv-transfer-config names Some.* has dynamic heads"):
        admit(config(file, kv_transfer_config={"kv_connector": "Some"}))


def test_tails_stay_in_the_process_and_stand_for_whole_pages(tmp_path, rng):
    from dam_vllm.engine.checks import admit
    from dam_vllm.engine.report import describe

    file = tmp_path / "masks.safetensors"
    made = streaming(MODEL, 4, 64)
    made = dataclasses.replace(made, tails=(rng.random(made.modes.shape) < 0.5).astype(np.uint8))
    made.tails[0, 0] = 1
    save_mask_set(made, file)
    told = describe(admit(config(file)), 32, 4096)
    layers = made.tails.any(axis=1).sum()
    (line,) = [line for line in told if "have a tail" in line]
    assert line.startswith(f"{made.tails.sum()} KV heads have a tail")
    assert f"spans of 128 tokens: beside the cache of {layers} layers" in line
    with pytest.raises(OptionError, match=r"--kv-transfer-config names Some.* has tails"):
        admit(config(file, kv_transfer_config={"kv_connector": "Some"}))
    exact = {"dam": {"masks": str(file), "granularity": "token", "kernel": "naive"}}
    with pytest.raises(OptionError, match=r"dam\.granularity is 'token': mask file .* has tails"):
        admit(config(file, additional_config=exact))


def test_a_target_chooses_from_the_frontier(tmp_path, rng):
    from dam_vllm.engine.checks import admit

    file = tmp_path / "masks.safetensors"
    each = [demo_masks(rng) for _ in range(4)]
    each = [dataclasses.replace(masks, dynamic=each[0].dynamic) for masks in each]
    save_mask_set(with_frontier(each), file)
    for target, point in (({}, 0), ({"target_density": 0.2}, 2), ({"target_error": 0.02}, 3)):
        served = admit(config(file, additional_config={"dam": {"masks": str(file)} | target}))
        np.testing.assert_array_equal(served.masks.columns, each[point].columns)
    with pytest.raises(OptionError, match=r"dam\.target_density is 0\.01: must be at least 0\.05"):
        admit(config(file, additional_config={"dam": {"masks": str(file), "target_density": 0.01}}))


@pytest.fixture(scope="module")
def following(tmp_path_factory):
    """Function from pairs of a follower and its anchor, (layer, KV head) each, to a mask file."""
    folder = tmp_path_factory.mktemp("following")

    def make(pairs):
        masks = demo_masks(np.random.default_rng(0))
        anchors = np.full((4, 4, 2), -1, np.int32)
        for follower, anchor in pairs.items():
            masks.modes[follower], anchors[follower] = HeadMode.REUSE, anchor
        file = folder / f"{len(list(folder.iterdir()))}.safetensors"
        save_mask_set(dataclasses.replace(masks, anchors=anchors), file)
        return file

    return make


# The first pair stays within its halves of heads and layers.
FOLLOWERS = {(1, 2): (0, 3), (2, 0): (0, 1), (3, 0): (3, 3)}


@pytest.mark.parametrize(
    ("ranks", "stages", "message"),
    [
        (1, 1, None),
        (
            2,
            1,
            "tensor-parallel-size is 2: in mask file .* layer 3, KV head 0 reuses .* layer 3, KV",
        ),
        (
            1,
            2,
            "pipeline-parallel-size is 2: in mask file .* layer 2, KV head 0 reuses .* layer 0, K",
        ),
        (
            4,
            1,
            "tensor-parallel-size is 4: in mask file .* layer 1, KV head 2 .* KV head 3 chooses",
        ),
        (1, 4, "pipeline-parallel-size is 4: in mask file .* layer 1, KV head 2 .*fewer ranks, or"),
    ],
)
def test_anchors_on_other_ranks_are_refused(following, ranks, stages, message):
    from dam_vllm.engine.checks import admit

    parallel = {"tensor_parallel_size": ranks, "pipeline_parallel_size": stages}
    asked = config(following(FOLLOWERS), parallel_config=parallel)
    if message is None:
        assert admit(asked).masks.anchor(1, 2) == (0, 3)
    else:
        with pytest.raises(OptionError, match=message):
            admit(asked)


def test_anchors_on_the_same_rank_are_followed(following):
    """Ranks that share a KV head hold its anchor of an earlier layer; stages hold whole layers."""
    from dam_vllm.engine.checks import admit

    for pairs, parallel in (
        ({(1, 2): (0, 3), (3, 0): (0, 1)}, {"tensor_parallel_size": 2}),
        ({(1, 1): (0, 1), (3, 3): (2, 3)}, {"tensor_parallel_size": 8}),
        ({(1, 2): (0, 3), (3, 0): (2, 3)}, {"pipeline_parallel_size": 2}),
    ):
        asked = config(following(pairs), parallel_config=parallel)
        assert (admit(asked).masks.modes == HeadMode.REUSE).sum() == 2


def test_followers_need_pages_of_one_size(following):
    from dam_vllm.attention.chosen_pages import ChosenPages
    from dam_vllm.engine.backend import chosen_pages
    from dam_vllm.engine.checks import admit

    serving = admit(config(following(FOLLOWERS)))
    kept = ChosenPages.of_masks(serving.masks, Shard(0, 4))
    impl = SimpleNamespace(chosen=kept)
    for _ in range(2):
        assert chosen_pages(serving, impl, 32) is kept
    with pytest.raises(OptionError, match="layers have 32 and 64 tokens"):
        chosen_pages(serving, impl, 64)
    nobody = SimpleNamespace(chosen=ChosenPages())
    assert chosen_pages(serving, nobody, 32) is chosen_pages(serving, nobody, 64)


def test_start_up_table_tells_who_reuses(following):
    from dam_vllm.engine import checks
    from dam_vllm.engine.report import describe

    serving = checks.admit(config(following({**FOLLOWERS, (3, 2): (3, 1), (1, 0): (0, 1)})))
    lines = describe(serving, 32, 4096)
    assert "5 KV heads reuse the pages that 4 of them choose" in lines
    assert lines[-3].endswith("2 dynamic, 2 reuse")


@pytest.mark.parametrize(("mode", "accepted"), [("strict", False), ("config", True)])
def test_other_weights(tmp_path, mode, accepted):
    from dam_vllm.engine.checks import admit

    made = streaming(MODEL, 4, 64)
    made.header.fingerprint = fingerprint(MODEL).model_copy(update={"weights": "0" * 16})
    save_mask_set(made, tmp_path / "masks")
    asked = config("", additional_config={
        "dam": {"masks": str(tmp_path / "masks"), "fingerprint": mode}
    })  # fmt: skip
    if accepted:
        assert admit(asked).masks.reach == 64
    else:
        with pytest.raises(OptionError, match="was made for other weights"):
            admit(asked)


@pytest.mark.parametrize(
    ("cpu", "options", "message"),
    [
        (True, {}, None),
        (True, {"kernel": "naive", "granularity": "token", "kv_free": "head"}, None),
        (True, {"kernel": "flash"}, "dam.kernel is 'flash': on CPU it must be 'auto' or 'naive'"),
        (True, {"kernel": "triton"}, "dam.kernel is 'triton': on CPU"),
        (True, {"granularity": "token"}, "dam.granularity is 'token': on CPU it needs kernel"),
        (False, {}, None),
        (False, {"granularity": "token", "kv_free": "layer"}, None),
        (False, {"kernel": "flash", "granularity": "token"}, "dam.granularity is 'token': it"),
        (False, {"kv_free": "head"}, None),
    ],
)
def test_options_of_other_platforms_are_refused(masks, monkeypatch, cpu, options, message):
    from dam_vllm.engine import checks

    kind = "cpu" if cpu else "cuda"
    platform = SimpleNamespace(is_cpu=lambda: cpu, is_cuda=lambda: not cpu, device_name=kind)
    monkeypatch.setattr(checks, "current_platform", platform)
    asked = config(masks, additional_config={"dam": {"masks": str(masks), **options}})
    if message is None:
        served = checks.admit(asked).options
        wanted = served.kv_free == "head" or (cpu and served.kv_free == "auto")
        assert checks.may_free_heads(served) == wanted
    else:
        with pytest.raises(OptionError, match=message):
            checks.admit(asked)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_requests_run_dense_below_the_platforms_own_length(monkeypatch, random_masks, platform):
    from dam_vllm.engine import serving

    monkeypatch.setattr(serving, "current_platform", SimpleNamespace(device_name=platform))
    monkeypatch.setitem(serving.DENSE_BELOW, platform, 77)
    served = [
        serving.Serving(DamOptions(**options), Path("masks"), random_masks())
        for options in ({}, {"dense_below": 5}, {"dense_below": 0})
    ]
    assert [each.dense_below for each in served] == [77, 5, 0]


@pytest.mark.parametrize(
    ("backend", "others"),
    [
        ("dam_vllm.engine.cuda", ("dam_vllm.engine.cpu", "dam_vllm.attention.cpu")),
        ("dam_vllm.engine.cpu", ("dam_vllm.engine.cuda", "dam_vllm.attention.cuda")),
    ],
)
def test_a_platform_loads_nothing_of_the_other_or_of_the_oracle(backend, others):
    code = (
        f"import sys, {backend}; print([name for name in sys.modules if name.startswith('dam_')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.splitlines()[-1]
    assert backend in loaded
    for name in (*others, "dam_vllm.attention.oracle"):
        assert name not in loaded
