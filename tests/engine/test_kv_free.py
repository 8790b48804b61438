"""When everything is kept, and what vLLM is told otherwise."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.options import DamOptions, OptionError

pytestmark = pytest.mark.engine

PAGE, HEAD_SIZE = 32, 24


class Base:
    """Stands for the attention backend."""

    @classmethod
    def customize_spec(cls, spec):
        return spec


def layer(**changed):
    """Stands for an attention layer of our backend."""
    impl = SimpleNamespace(groups=None, windowed=changed.pop("windowed", False))
    values = {
        "impl": impl,
        "attn_backend": Base,
        "kv_sharing_target_layer_name": None,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_size": HEAD_SIZE,
        "kv_cache_torch_dtype": torch.float32,
    }
    return SimpleNamespace(**values | changed)


def config(layers, **changed):
    values = {
        "kv_transfer_config": None,
        "speculative_config": None,
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "compilation_config": SimpleNamespace(
            static_forward_context={f"layers.{index}.attn": each for index, each in layers.items()}
        ),
        "cache_config": SimpleNamespace(block_size=PAGE),
        "model_config": SimpleNamespace(max_model_len=16384),
        "max_in_flight_tokens": 256,
    }
    return SimpleNamespace(**values | changed)


@pytest.fixture
def serve(monkeypatch, random_masks):
    """Function that lets `free_kv_heads` act on a configuration; returns what it logged."""
    from dam_vllm.engine.kv_free import apply
    from dam_vllm.engine.serving import Serving
    from dam_vllm.masks.sharding import Shard

    def act(configuration, modes=None, **options):
        masks = random_masks(layers=4, heads=8, kv_heads=4, pcl=200, head_size=HEAD_SIZE)
        masks.modes[:] = HeadMode.STATIC if modes is None else modes
        serving = Serving(DamOptions(dense_below=0, **options), Path("masks"), masks)
        logged = []
        monkeypatch.setattr(apply, "admit", lambda _: serving)
        monkeypatch.setattr(apply, "shard", lambda heads: Shard(0, heads))
        for name, value in (("rank", 0), ("world_size", 1)):
            monkeypatch.setattr(apply, f"get_tensor_model_parallel_{name}", lambda v=value: v)
        monkeypatch.setattr(
            apply, "logger", SimpleNamespace(info=lambda text, *args: logged.append(text % args))
        )
        apply.free_kv_heads(configuration)
        return logged

    return act


def plain():
    return {index: layer() for index in range(4)}


def specs(configuration):
    """The spec of every layer and unit, as vLLM collects them."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    full = FullAttentionSpec(
        block_size=PAGE, num_kv_heads=4, head_size=HEAD_SIZE, dtype=torch.float32
    )
    layers = configuration.compilation_config.static_forward_context
    return {
        name: (each.backend if hasattr(each, "backend") else each.attn_backend).customize_spec(full)
        for name, each in layers.items()
    }


@pytest.mark.parametrize(
    ("layers", "changed", "options", "reason"),
    [
        ({}, {}, {"kv_free": "off"}, "kv_free is off"),
        ({}, {}, {"kernel": "naive"}, "the naive kernel"),
        ({}, {"kv_transfer_config": SimpleNamespace(kv_connector="Some")}, {}, "KV connector Some"),
        (
            {},
            {"scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=True)},
            {},
            "the hybrid KV-cache manager is off",
        ),
        ({}, {"speculative_config": object()}, {}, "draft layers"),
        ({1: layer(windowed=True)}, {}, {}, "layers.1.attn is not full attention"),
        ({4: layer()}, {}, {}, "layers.4.attn is not full attention with masks"),
        ({2: layer(kv_sharing_target_layer_name="x")}, {}, {}, "layers.2.attn is not plain"),
        ({3: SimpleNamespace()}, {}, {}, "layers.3.attn is not plain attention"),
        ({3: layer(head_size=64)}, {}, {}, "KV caches of different shapes"),
    ],
)
def test_everything_is_kept(serve, layers, changed, options, reason):
    configuration = config(plain() | layers, **changed)
    (line,) = serve(configuration, **options)
    assert line.startswith("DAM keeps all KV pages: ")
    assert reason in line
    for asked in ("layer", "head"):
        if "kv_free" not in options:
            message = f"dam.kv_free is '{asked}', and nothing can be freed: .*{reason}.*or 'off'"
            with pytest.raises(OptionError, match=message):
                serve(configuration, **options, kv_free=asked)
    for each in configuration.compilation_config.static_forward_context.values():
        assert getattr(each, "attn_backend", Base) is Base


@pytest.mark.parametrize("asked", ["auto", "head"])
def test_everything_is_kept_where_no_head_is_bounded(serve, asked):
    (line,) = serve(config(plain()), modes=HeadMode.DENSE, kv_free=asked)
    assert "gains enough" in line


def test_whole_layers(serve):
    from dam_vllm.engine.kv_free.spec import BoundedAttentionSpec

    modes = np.array([[HeadMode.DENSE] * 4, [HeadMode.STATIC] * 4] * 2)
    modes[0, 1:] = HeadMode.STATIC
    configuration = config(plain())
    (line,) = serve(configuration, modes, kv_free="layer")
    assert "by whole layers (2 of 4)" in line
    assert "not taken: nothing freed, 1.00x" in line
    found = specs(configuration)
    freed = [isinstance(spec, BoundedAttentionSpec) for spec in found.values()]
    assert freed == [False, True, False, True]
    assert {spec.num_kv_heads for spec in found.values()} == {4}
    assert found["layers.1.attn"] == found["layers.3.attn"]


def test_single_heads(serve):
    from dam_vllm.engine.kv_free.spec import BoundedAttentionSpec

    modes = np.full((4, 4), HeadMode.STATIC)
    modes[:, 2] = HeadMode.DENSE
    configuration = config(plain())
    (line,) = serve(configuration, modes)
    assert "by units of 1 KV heads (12 of 16)" in line
    assert "units of 2 KV heads" in line
    found = specs(configuration)
    assert {spec.num_kv_heads for spec in found.values()} == {1}
    layers = configuration.compilation_config.static_forward_context
    split = layers["layers.0.attn"].impl.groups
    for name, units in split.units.items():
        assert units == [name, f"{name}.kv1", f"{name}.kv2", f"{name}.kv3"]
        assert split.order[name][3] == 2
        freed = [isinstance(found[unit], BoundedAttentionSpec) for unit in units]
        assert freed == [True, True, True, False]
        assert layers[units[1]].impl is layers[name].impl
