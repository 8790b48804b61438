"""Clients that know nothing of DAM, on one server: openai's and EleutherAI's harness."""

import json
import os
import re
import subprocess
import sys

import openai
import pytest
from transformers import AutoTokenizer

from dam_vllm.demo import model_dir
from dam_vllm.questions.tasks import make_questions
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
target_delimiter: ""
metric_list: [{metric: acc}]
"""
# As the command `lm_eval`, whose tables need eight packages more.
HARNESS = """
import sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[2], include_defaults=False)
found = simple_evaluate("local-completions", model_args=sys.argv[1], tasks=["lines"],
                        task_manager=tasks, bootstrap_iters=0)
print(found["results"]["lines"]["acc,none"])
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
    drawn = complete(n=3, temperature=1.0, seed=1).choices
    assert sorted(each.index for each in drawn) == [0, 1, 2]
    assert len({each.text for each in drawn}) > 1


def test_the_evaluation_harness_finds_what_was_read(url, tmp_path):
    """Log-probabilities of prompts: the line that was asked for is more likely than another's."""
    questions = make_questions("lines", AutoTokenizer.from_pretrained(MODEL), 1024, 6, seed=77)
    rows = []
    for index, question in enumerate(questions):
        key = re.search(r"in line ([\w-]+)\?", question.prompt).group(1)
        numbers = [question.answer, questions[index - 1].answer][:: 1 if index % 2 else -1]
        lines = [f"\nline {key}: REGISTER_CONTENT is <{number}>" for number in numbers]
        right = numbers.index(question.answer)
        rows.append({"text": question.prompt, "choices": lines, "answer": right})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lines.yaml").write_text(TASK.replace("DATA", str(data)))
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, f"model={MODEL},base_url={url}/completions", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) == 1.0
