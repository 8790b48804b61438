"""A stand-in for servers: answers from the prompt alone, as its masks let it."""

from contextlib import contextmanager

import numpy as np
import pytest
from transformers import AutoTokenizer

from dam_vllm.demo import model_dir
from dam_vllm.evaluation.client import TOP, Logprobs, Reply
from dam_vllm.evaluation.settings import Settings
from dam_vllm.questions.tasks import make_questions

MODEL = str(model_dir())
DENSITY = {"dense": (0, 0), "full": (10, 10), "half": (5, 10)}


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def settings():
    """A function that makes settings with some changed."""

    def make(**changed):
        values = {
            "model": MODEL,
            "tasks": ("lines", "words"),
            "lengths": (512, 768),
            "samples": 3,
            "seed": 5,
            "page": 32,
            "dense_below": 0,
            "streaming": False,
            "text": None,
            "windows": 0,
        }
        return Settings(**(values | changed))

    return make


class Servers:
    """Starts pretended servers.

    Attributes:
        started: names of the subjects served, in order.
        asked: prompts answered, the unmeasured ones included.
        alive: servers that run now.
        limit: requests until Ctrl-C, or None.
    """

    def __init__(self, tokenizer, settings, density=None):
        self.started, self.asked, self.alive, self.limit = [], [], 0, None
        self.density = density or DENSITY
        self.answers = {
            question.prompt: question.answer
            for task in settings.tasks
            for length in settings.lengths
            for question in make_questions(
                task, tokenizer, length - overhead(tokenizer), settings.samples, settings.seed
            )
        }

    @contextmanager
    def start(self, subject):
        self.started.append(subject.name)
        self.alive += 1
        assert self.alive == 1
        try:
            yield Pretender(self, subject)
        finally:
            self.alive -= 1


class Pretender:
    """Dense and full masks answer all, others only prompts shorter than 2500 characters."""

    def __init__(self, servers, subject):
        self.servers, self.subject, self.since = servers, subject, 0

    def ask(self, prompt, tokens):
        servers = self.servers
        if servers.limit is not None:
            servers.limit -= 1
            if servers.limit < 0:
                raise KeyboardInterrupt
        servers.asked.append(prompt)
        self.since += 1
        knows = self.subject.name in ("dense", "full") or len(prompt) < 2500
        return Reply(servers.answers[prompt] if knows else "?", 0.5)

    def logprobs(self, ids):
        self.since += 1
        shift = 0.0 if self.subject.name == "dense" else 0.5
        count = len(ids) - 1
        tokens = np.tile(np.arange(TOP + 1, dtype=np.int32), (count, 1))
        told = np.tile(-3.5 - shift * np.arange(TOP + 1, dtype=np.float32), (count, 1))
        return Logprobs(told[:, 3], tokens, told)

    def pages(self):
        assert self.subject.masks is not None
        read, dense = self.servers.density[self.subject.name.split("@")[0]]
        since, self.since = self.since, 0
        return since * read, since * dense


def overhead(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )
    return len(tokenizer(text, add_special_tokens=False).input_ids) - 1
