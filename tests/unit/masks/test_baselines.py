import numpy as np
import pytest
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config

from dam_vllm.masks.baselines import dense, streaming
from dam_vllm.masks.density import density
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.rule import allowed


@pytest.fixture
def model(tmp_path):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
    )
    config.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(("sinks", "window"), [(5, 37), (37, 5), (1, 1)])
def test_streaming_is_sinks_and_window(model, sinks, window):
    masks = streaming(model, sinks, window)
    i, j = np.arange(120)[:, None], np.arange(120)[None]
    expected = ((j < sinks) | (i - j < window)) & (j <= i)
    np.testing.assert_array_equal(allowed(masks, 2, 0, 120), np.tile(expected, (4, 1, 1)))


def test_file_does_not_grow_with_the_square(model, tmp_path):
    save_mask_set(streaming(model, 4, 20_000), tmp_path / "masks")
    assert (tmp_path / "masks").stat().st_size < 2**20


def test_dense_reads_everything(model):
    _, kv_heads = density(dense(model), [5000], 32)
    assert (kv_heads == 1).all()


def test_they_hold_for_any_weights(model):
    assert streaming(model, 1, 1).header.fingerprint.weights is None
    assert streaming(model, 4, 64).header.parameters == {"sinks": 4, "window": 64}


@pytest.mark.parametrize(("sinks", "window", "name"), [(0, 8, "--sinks"), (4, -1, "--window")])
def test_sizes_are_checked(model, sinks, window, name):
    with pytest.raises(ValueError, match=f"{name} is"):
        streaming(model, sinks, window)


@pytest.mark.parametrize(
    ("config", "types"),
    [
        (MistralConfig(sliding_window=64, num_hidden_layers=2), ["sliding"] * 2),
        (MistralConfig(sliding_window=None, num_hidden_layers=2), ["full"] * 2),
        (Qwen2Config(use_sliding_window=False, num_hidden_layers=2), ["full"] * 2),
        (GemmaConfig(num_hidden_layers=2), ["full"] * 2),
    ],
)
def test_sliding_layers_are_recorded(tmp_path, config, types):
    config.save_pretrained(tmp_path)
    assert streaming(str(tmp_path), 4, 64).header.layer_types == types
