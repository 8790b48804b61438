"""Every file of configs/ calibrates a small random model of its family, with shorter lengths."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.model import ModelSource
from dam_vllm.calibration.pipeline import Job, calibrate
from dam_vllm.calibration.settings_file import load_config
from dam_vllm.demo import model_dir
from dam_vllm.masks.file import load_mask_set
from dam_vllm.masks.mask_set import HeadMode

FOLDER = Path(__file__).parents[3] / "configs"
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "paper": LlamaConfig(**SMALL),
    "llama": LlamaConfig(**SMALL),
    "qwen2.5": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "phi": Phi3Config(**SMALL, sliding_window=None),
    "gemma": Gemma3TextConfig(
        **SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
# Positions (max_position_embeddings) of the shortest models that each file's comment names.
POSITIONS = {
    "paper": 4096,  # Llama 2
    "llama": 131072,  # 3.1, 3.2 and 3.3
    "qwen2.5": 32768,
    "qwen3": 40960,
    "mistral": 32768,  # 7B v0.3 and Small 3
    "phi": 16384,
    "gemma": 8192,  # 2
}
PRESETS = ("quality", "balanced", "speed")
# What a small model's length and texts allow, and what is measured often.
LENGTHS = {"pcl": 40, "window": 60, "texts": 8, "batch_size": 4, "min_support": None}
REACH = {"reach": 64, "pcl": 32, "long_texts": 3}
FIT = {"lengths": [660], "questions": 1, "plain": 3, "query_blocks": 1, "taus": [0.1],
       "mus": [0.8], "channels": [4], "page": 32}  # fmt: skip


def job(folder, config, data):
    source = ModelSource(str(folder), None, torch.device("cpu"), "auto")
    return Job(source, str(data), "text", config, folder / "masks.safetensors", 1.0)


def save(config, folder):
    """Saves a random model whose attention is far from uniform."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "embed")):
                weight.normal_(std=0.6)
    model.save_pretrained(folder)


def test_every_file_is_tried():
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*FAMILIES, *PRESETS}


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_within_a_familys_positions(name):
    """The small models below are calibrated with shorter ones."""
    config = load_config([FOLDER / f"{name}.yaml"], {})
    assert max(config.pcl, config.reach or 0, config.window) <= POSITIONS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_file_calibrates_it(name, texts_file, tokenizer, tmp_path, monkeypatch):
    # What AutoTokenizer makes of a small vocabulary differs by family.
    monkeypatch.setattr(ModelSource, "tokenizer", lambda source: tokenizer)
    config = load_config([FOLDER / f"{name}.yaml"], {})
    small = LENGTHS | (REACH if config.reach else {})
    save(FAMILIES[name], tmp_path)
    masks = calibrate(job(tmp_path, config.model_copy(update=small), texts_file))
    parameters = load_mask_set(tmp_path / "masks.safetensors").header.parameters
    assert (parameters["tau"], parameters["mu"]) == (config.tau, config.mu)
    assert masks.reach == (64 if config.reach else 40)
    types = ["sliding", "full"] if name == "gemma" else ["full", "full"]
    assert masks.header.layer_types == types
    for layer, kind in enumerate(types):
        assert masks.true_bits[layer].any() == (kind == "full")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_a_model_to_its_target(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    shape = SMALL | {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    shape |= {"num_hidden_layers": 1}
    save(LlamaConfig(**shape), tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = load_config([FOLDER / "llama.yaml", FOLDER / f"{name}.yaml"], {})
    small = {"pcl": 64, "window": 700, "texts": 24, "held_out": 0.3, "reach": None}
    config = config.model_copy(update=small | {"fit": config.fit.model_copy(update=FIT)})
    masks = calibrate(job(tmp_path, config, model_dir().parent / "texts.jsonl"))
    fit = masks.header.parameters["fit"]
    assert fit["chosen"]["loss"] <= config.fit.target_error == fit["target_error"]
    assert fit["chosen"]["density"] < 1
    assert (masks.modes != HeadMode.DENSE).any()


def test_a_model_of_windows_alone_is_refused(texts_file, tmp_path):
    """As the files of Mistral and Phi say."""
    save(MistralConfig(**SMALL, sliding_window=8), tmp_path)
    config = load_config([FOLDER / "mistral.yaml"], {})
    with pytest.raises(CalibrationError, match="has no full-attention layer"):
        calibrate(job(tmp_path, config, texts_file))
