"""What cannot be served is refused at start by one message, the last line of `vllm serve`."""

import json

import pytest
from transformers import BloomConfig

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import save_mask_set
from dam_vllm.server import Server, ServerError

pytestmark = pytest.mark.e2e


def refused(model, options, *arguments):
    """Output of a start that must fail."""
    common = ["--attention-backend=dam", "--enforce-eager", "--max-model-len=512"]
    common += ["--kv-cache-memory-bytes=50000000", "--additional-config"]
    server = Server(model, [*common, json.dumps({"dam": options}), *arguments])
    with pytest.raises(ServerError), server:
        pass
    return server.output()


def test_what_needs_no_weights_is_told_before_a_worker_starts():
    output = refused(model_dir(), {"mask": "file"})
    assert output.splitlines()[-1].startswith(
        "Error: --additional-config: unknown option 'dam.mask'; allowed are masks"
    )
    assert "Traceback" not in output
    assert "EngineCore" not in output


def test_what_a_worker_refuses_is_repeated_at_the_end(tmp_path):
    model = tmp_path / "alibi"
    BloomConfig(
        vocab_size=512, hidden_size=64, n_layer=1, n_head=2, architectures=["BloomForCausalLM"]
    ).save_pretrained(model)
    save_mask_set(streaming(str(model), 4, 64), tmp_path / "masks")
    output = refused(
        model, {"masks": str(tmp_path / "masks")}, "--load-format=dummy", "--skip-tokenizer-init"
    )
    assert output.splitlines()[-1] == (
        "Error: --attention-backend dam: this model has ALiBi, which DAM does not serve; leave the "
        "option away"
    )
    assert "Loading weights took" not in output
