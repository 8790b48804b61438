"""Clients that know nothing of DAM, on one server: openai's, and EleutherAI's evaluation harness."""

import json
import subprocess
import sys

import openai
import pytest

from dam_vllm.demo import model_dir
from dam_vllm.server import Server

pytestmark = pytest.mark.e2e

MODEL = str(model_dir())
PROMPT = "w " * 300
TASK = """
task: lines
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def url():
    """A server with the demo model's own masks, sparse from the first page on."""
    arguments = ["--attention-backend=dam", "--enforce-eager", "--max-model-len=4096"]
    arguments += ["--kv-cache-memory-bytes=50000000", "--block-size=32"]
    arguments += ["--additional-config.dam.dense_below=0"]
    with Server(MODEL, arguments) as server:
        yield server.url


@pytest.fixture
def complete(url):
    client = openai.OpenAI(base_url=url, api_key="-")

    def ask(**arguments):
        limits = {"max_tokens": 12, "temperature": 0, "logprobs": 3}
        return client.completions.create(model=MODEL, prompt=PROMPT, **limits | arguments)

    return ask


def test_a_stream_is_the_answer_in_parts(complete):
    whole = complete().choices[0]
    parts = [part.choices[0] for part in complete(stream=True) if part.choices]
    assert len(parts) > 1
    assert "".join(part.text for part in parts) == whole.text
    logprobs = [value for part in parts for value in part.logprobs.token_logprobs]
    assert logprobs == pytest.approx(whole.logprobs.token_logprobs, abs=0.05)


def test_logprobs_are_those_of_the_best_tokens(complete):
    found = complete().choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 12
    for value, best in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert len(best) >= 3
        assert value == max(best.values())


def test_several_answers_to_one_prompt(complete):
    assert len({each.text for each in complete(n=3).choices}) == 1
    drawn = complete(n=3, temperature=1.0, seed=1).choices
    assert sorted(each.index for each in drawn) == [0, 1, 2]
    assert len({each.text for each in drawn}) > 1


def test_the_evaluation_harness_scores_choices(url, tmp_path):
    """Prompts' log-probabilities (`echo`): a line that was read is more likely than others."""
