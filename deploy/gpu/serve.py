"""Serves the demo model on a GPU and holds its answers against stock vLLM's: the parts `serve-...`.

    python deploy/gpu/serve.py flash|triton

Masks that keep everything must answer as stock does, the model's own must find what was asked for.
Kernels that are compiled after the start end the server (`--jit-monitor-mode error`).
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import dense
from dam_vllm.masks.file import save_mask_set
from dam_vllm.questions.prompting import chat_tokens
from dam_vllm.questions.tasks import Question, is_correct, make_questions
from dam_vllm.server import Server

ARGUMENTS = ("--max-model-len=8192", "--jit-monitor-mode=error")
# Prompts of every kind of length at once, whose answers mean nothing.
RANDOM = [[1, *(300 + (7 * row + 37 * at) % 1900 for at in range(length))]
          for row, length in enumerate((6001, 2999, 150, 1))]  # fmt: skip
QUESTIONS, TOKENS, REPLY_TOKENS = 8, 6000, 48
# Share of stock's greedy tokens up to each answer's first difference: rounding parts answers at
# ties, wrong kernels part them at once.
AGREEMENT = 0.5
# Share of what stock answers rightly: masks that read the wrong pages find next to nothing.
FOUND = 0.7


class Answer(NamedTuple):
    """Greedy tokens, and what they say."""

    tokens: Sequence[str]
    text: str


def answers(prompts: Sequence[Sequence[int]], *arguments: str) -> list[Answer]:
    """Answers to all prompts, asked at once, of a server of its own."""
    import openai

    with Server(model_dir(), [*ARGUMENTS, *arguments]) as server:
        client = openai.OpenAI(base_url=server.url, api_key="-", timeout=120)
        reply = client.completions.create(
            model=str(model_dir()), prompt=prompts, max_tokens=REPLY_TOKENS, temperature=0,
            logprobs=1, extra_body={"return_tokens_as_token_ids": True},
        )  # fmt: skip
    choices = sorted(reply.choices, key=lambda choice: choice.index)
    return [Answer(choice.logprobs.tokens, choice.text) for choice in choices]


def dam(**options: object) -> tuple[str, ...]:
    """Arguments of a server with the backend, no prompt being too short for masks."""
    given = {"dam": {"dense_below": 0, **options}}
    return "--attention-backend=dam", "--additional-config", json.dumps(given)


def agreement(stock: Sequence[Answer], found: Sequence[Answer]) -> float:
    """Share of greedy tokens before the first one that differs, over all answers."""
    same = total = 0
    for one, other in zip(stock, found, strict=True):
        pairs = zip(one.tokens, other.tokens, strict=False)
        same += len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
        total += max(len(one.tokens), len(other.tokens))
    return same / total


def right(questions: Sequence[Question], found: Sequence[Answer]) -> int:
    """How many of the last answers, which are those to the questions, are right."""
    replies = found[-len(questions) :]
    pairs = zip(questions, replies, strict=True)
    return sum(is_correct(question, reply.text) for question, reply in pairs)


def ask() -> tuple[list[Question], list[list[int]]]:
    """Questions, and all prompts as tokens: random ones, then those of the questions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    questions = make_questions("lines", tokenizer, TOKENS, QUESTIONS, seed=0)
    return questions, RANDOM + [chat_tokens(tokenizer, each.prompt) for each in questions]


def main(kernel: str) -> int:
    """Compares what a kernel serves; 1 where it differs too much."""
    questions, prompts = ask()
    stock = answers(prompts)
    wanted = right(questions, stock)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.safetensors"
        save_mask_set(dense(str(model_dir())), whole)
        share = agreement(stock, answers(prompts, *dam(masks=str(whole), kernel=kernel)))
    print(f"all kept: {share:.2f} of the tokens as stock's, must be at least {AGREEMENT}")
    found = right(questions, answers(prompts, *dam(kernel=kernel)))
    print(f"fitted: {found} of {QUESTIONS} right, must be at least {FOUND} of stock's {wanted}")
    return int(share < AGREEMENT or wanted == 0 or found < FOUND * wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
