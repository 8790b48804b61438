"""Completions, chat and streaming through the masked backend, on questions with answers."""

import json

import openai
import pytest
from transformers import AutoTokenizer

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import save_mask_set
from dam_vllm.questions.tasks import is_correct, make_questions
from dam_vllm.server import Server

pytestmark = pytest.mark.e2e

MODEL = str(model_dir())
LENGTH, SAMPLES = 2048, 12
LIMITS = {"max_tokens": 40, "temperature": 0}


@pytest.fixture(scope="module")
def questions():
    return make_questions("lines", AutoTokenizer.from_pretrained(MODEL), LENGTH, SAMPLES, seed=77)


@pytest.fixture(scope="module")
def urls(tmp_path_factory, mask_files):
    """Servers with everything selected, and with sinks and a window that lose the middle."""
    window = tmp_path_factory.mktemp("masks") / "streaming.safetensors"
    save_mask_set(streaming(MODEL, 16, 256), window)
    common = ["--attention-backend=dam", "--enforce-eager", "--max-model-len=4096"]
    common += ["--kv-cache-memory-bytes=50000000", "--block-size=32", "--additional-config"]
    options = [
        json.dumps({"dam": {"masks": str(file), "dense_below": 0}})
        for file in (mask_files["dense"], window)
    ]
    with Server(MODEL, [*common, options[0]]) as full, Server(MODEL, [*common, options[1]]) as cut:
        yield full.url, cut.url


def complete(client, question):
    return client.completions.create(model=MODEL, prompt=question.prompt, **LIMITS).choices[0].text


def chat(client, question, stream):
    messages = [{"role": "user", "content": question.prompt}]
    reply = client.chat.completions.create(model=MODEL, messages=messages, stream=stream, **LIMITS)
    if not stream:
        return reply.choices[0].message.content
    return "".join(part.choices[0].delta.content or "" for part in reply if part.choices)


def right(questions, ask):
    return sum(is_correct(question, ask(question)) for question in questions)


def test_everything_selected_retrieves(urls, questions):
    client = openai.OpenAI(base_url=urls[0], api_key="-")
    assert right(questions, lambda q: complete(client, q)) >= SAMPLES - 1
    assert right(questions, lambda q: chat(client, q, stream=False)) >= SAMPLES - 1


def test_streamed_chat_is_the_same(urls, questions):
    for url in urls:
        client = openai.OpenAI(base_url=url, api_key="-")
        for question in questions[:4]:
            assert chat(client, question, stream=True) == chat(client, question, stream=False)


def test_window_retrieves_only_what_it_holds(urls, questions):
    """The masks are really applied: of twelve depths a window of 256 tokens sees about one."""
    client = openai.OpenAI(base_url=urls[1], api_key="-")
    replies = [is_correct(question, complete(client, question)) for question in questions]
    assert replies[-1]
    assert sum(replies) <= 4
