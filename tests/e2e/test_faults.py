"""Faults while serving: mask files that change, and processes that are killed."""

import json

import openai
import psutil
import pytest

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import save_mask_set
from dam_vllm.options import MASKS_IN_MODEL
from dam_vllm.server import Server

pytestmark = pytest.mark.e2e

MODEL = str(model_dir())
PROMPT = [1, *(300 + (31 * token) % 2000 for token in range(3000))]


def serve(masks):
    options = {"dam": {"masks": str(masks), "dense_below": 0}}
    arguments = ["--attention-backend=dam", "--enforce-eager", "--max-model-len=4096"]
    arguments += ["--kv-cache-memory-bytes=50000000", "--block-size=32"]
    arguments += ["--no-enable-prefix-caching"]  # what was computed before would hide a change
    return Server(MODEL, [*arguments, "--additional-config", json.dumps(options)])


def ask(server):
    """Tokens and log-probabilities that follow the prompt."""
    client = openai.OpenAI(base_url=server.url, api_key="-", max_retries=0)
    reply = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=16, temperature=0, logprobs=1
    )
    return reply.choices[0].text, reply.choices[0].logprobs.token_logprobs


def kill(server, name):
    """Kills a process by its name, and waits until the whole server has ended."""
    api = psutil.Process(server.pid)
    every = [api, *api.children(recursive=True)]
    next(each for each in every if name in "".join(each.cmdline())).kill()
    _, alive = psutil.wait_procs(every, timeout=60)
    assert not alive
    with pytest.raises(openai.APIConnectionError):
        ask(server)


def test_files_that_change_and_processes_that_are_killed(tmp_path):
    file = tmp_path / "masks.safetensors"
    held = (model_dir() / MASKS_IN_MODEL).read_bytes()
    file.write_bytes(held)
    with serve(file) as server:
        first = ask(server)
        file.write_bytes(held[:100])
        assert ask(server) == first
        save_mask_set(streaming(MODEL, 16, 256), file)
        assert ask(server) == first
        file.unlink()
        assert ask(server) == first
        kill(server, "EngineCore")
    file.write_bytes(held)
    with serve(file) as server:
        assert ask(server) == first
