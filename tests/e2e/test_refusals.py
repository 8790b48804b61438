"""What cannot be served is refused at start, by one message that says what to do."""

import concurrent.futures
import json

import pytest
from transformers import BloomConfig, DeepseekV2Config, LlamaConfig

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import save_mask_set
from dam_vllm.server import Server, ServerError

pytestmark = pytest.mark.e2e

DUMMY = ("--load-format=dummy", "--skip-tokenizer-init")


def write_models(folder):
    """Tiny models, configuration only, of kinds that are refused or differ."""
    small = {"vocab_size": 512, "hidden_size": 64}
    configs = {
        "alibi": BloomConfig(**small, n_layer=1, n_head=2, architectures=["BloomForCausalLM"]),
        "mla": DeepseekV2Config(
            **small,
            num_hidden_layers=1,
            num_attention_heads=2,
            n_routed_experts=2,
            num_experts_per_tok=1,
            first_k_dense_replace=1,
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_rope_head_dim=16,
            qk_nope_head_dim=32,
            v_head_dim=32,
            architectures=["DeepseekV2ForCausalLM"],
        ),
        "other": LlamaConfig(
            **small, num_hidden_layers=1, num_attention_heads=2, architectures=["LlamaForCausalLM"]
        ),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Output of each refused start, by name; two start at a time."""
    folder = tmp_path_factory.mktemp("refused")
    write_models(folder)
    demo = str(model_dir())
    good, bad, foreign = folder / "good", folder / "damaged", folder / "foreign"
    save_mask_set(streaming(demo, 4, 64), good)
    save_mask_set(streaming(str(folder / "other"), 4, 64), foreign)
    bad.write_bytes(good.read_bytes()[:-9])
    starts = {
        "missing": (demo, {"masks": str(folder / "none")}, ()),
        "damaged": (demo, {"masks": str(bad)}, ()),
        "fingerprint": (demo, {"masks": str(foreign)}, ()),
        "option": (demo, {"mask": str(good)}, ()),
        "page": (demo, {"masks": str(good)}, ("--block-size=24",)),
        "cache": (demo, {"masks": str(good)}, ("--kv-cache-dtype=int8_per_token_head",)),
        "alibi": (str(folder / "alibi"), {"masks": str(good)}, DUMMY),
        "mla": (str(folder / "mla"), {"masks": str(good)}, (*DUMMY, "--block-size=16")),
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outputs = pool.map(lambda start: refused(*start), starts.values())
        return dict(zip(starts, outputs, strict=True))


def refused(model, options, arguments):
    common = ["--attention-backend=dam", "--enforce-eager", "--max-model-len=512"]
    common += ["--kv-cache-memory-bytes=50000000", "--additional-config"]
    server = Server(model, [*common, json.dumps({"dam": options}), *arguments])
    with pytest.raises(ServerError), server:
        pass
    return server.output()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "dam.masks is '"),
        ("damaged", "damaged is damaged"),
        ("fingerprint", "was made for another model"),
        ("option", "unknown option 'dam.mask'; allowed are masks"),
        ("page", "--block-size is 24: --attention-backend dam needs pages of a multiple of 16"),
        ("cache", "--kv-cache-dtype is int8_per_token_head"),
        ("alibi", "this model has ALiBi, which DAM does not serve"),
        ("mla", "multi-head latent attention (MLA)"),
    ],
)
def test_refused_at_start(refusals, name, message):
    assert message in refusals[name]
    assert "Loading weights took" not in refusals[name]
