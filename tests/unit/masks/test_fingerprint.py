import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from dam_vllm.masks.fingerprint import Fingerprint, FingerprintError, fingerprint


@pytest.fixture
def model(tmp_path):
    """A folder with a configuration and two small weight files."""
    folder = tmp_path / "model"
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2).save_pretrained(folder)
    torch.manual_seed(0)
    write(folder, {"a": torch.randn(30, 40), "b": torch.randn(7)})
    return folder


def write(folder, tensors, split=None):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    names = list(tensors)
    parts = [names] if split is None else [names[:split], names[split:]]
    for index, part in enumerate(parts):
        chosen = {name: tensors[name] for name in part}
        save_file(chosen, folder / f"model-{index}.safetensors")


def test_does_not_depend_on_files_or_place(model, tmp_path):
    before = fingerprint(str(model))
    torch.manual_seed(0)
    write(model, {"a": torch.randn(30, 40), "b": torch.randn(7)}, split=1)
    assert fingerprint(str(model)) == before
    assert fingerprint(str(model.rename(tmp_path / "elsewhere"))) == before


def test_other_weights_differ(model):
    before = fingerprint(str(model))
    torch.manual_seed(0)
    write(model, {"a": torch.randn(30, 40) * 1.01, "b": torch.randn(7)})
    after = fingerprint(str(model))
    assert before.config == after.config
    assert before.mismatch(after) == "weights"


@pytest.mark.parametrize(
    ("key", "value"), [("num_key_value_heads", 2), ("vocab_size", 5), ("num_hidden_layers", 3)]
)
def test_other_configuration_differs(model, key, value):
    before = fingerprint(str(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: value}))
    assert before.mismatch(fingerprint(str(model))) == "config"


def test_masks_for_any_weights_fit_every_weights(model):
    of_shape = fingerprint(str(model), weights=False)
    assert of_shape.weights is None
    assert of_shape.mismatch(fingerprint(str(model))) is None


def test_unused_settings_do_not_matter(model):
    before = fingerprint(str(model))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert fingerprint(str(model)) == before


def test_damaged_weights(model):
    (model / "model-0.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(FingerprintError, match=r"model-0\.safetensors is no readable"):
        fingerprint(str(model))


def test_no_such_model():
    with pytest.raises(FingerprintError, match="'no/such' is neither a folder"):
        fingerprint("no/such")


def test_is_short_hexadecimal(model):
    assert all(int(part, 16) >= 0 for part in fingerprint(str(model)).model_dump().values())
    assert Fingerprint(config="0").weights is None
