"""The demo: serve the packaged model dense, with the paper's masks and with fitted ones."""

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dam_vllm.demo import model_dir
from dam_vllm.masks.density import density
from dam_vllm.masks.file import load_mask_set
from dam_vllm.questions.tasks import Question, is_correct, make_questions
from dam_vllm.server import Server, rest

DENSE = "dense"
PAGE = 32
MAX_LENGTH = 8704
REPLY_TOKENS = 48


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Attributes:
        masks: "dense", or the name that the masks are shown by.
        tokens: length of the prompts.
        accuracy: share of right answers.
        density: pages read over pages of dense attention, in the prompt's prefill.
        seconds: median time to the first token.
        ratio: dense median time over this one's.
    """

    masks: str
    tokens: int
    accuracy: float
    density: float
    seconds: float
    ratio: float


def serve_and_ask(
    masks: Mapping[str, Path],
    lengths: list[int],
    samples: int,
    seed: int,
    advance: Callable[[], None],
) -> list[Row]:
    """Asks the dense server and those with masks the same questions, length by length.

    Args:
        masks: mask files by the name shown.
        lengths: tokens of the prompts.
        samples: questions a length.
        seed: of the questions.
        advance: called after every answer.

    Returns:
        A row for each server and length.
    """
    common = [
        f"--block-size={PAGE}",
        f"--max-model-len={MAX_LENGTH}",
        "--kv-cache-memory-bytes=100000000",
        "--no-enable-prefix-caching",
        "--enforce-eager",
    ]
    with contextlib.ExitStack() as stack:
        servers = {DENSE: stack.enter_context(Server(model_dir(), common))}
        for name, file in masks.items():
            options = {"dam": {"masks": str(file), "dense_below": 0}}
            dam = ["--attention-backend=dam", "--additional-config", json.dumps(options)]
            servers[name] = stack.enter_context(Server(model_dir(), [*common, *dam]))
        rows: list[Row] = []
        for tokens, questions in _questions(lengths, samples, seed):
            answers = {
                name: _ask_all(server.url, questions, advance) for name, server in servers.items()
            }
            rows += [_row(name, masks.get(name), tokens, answers) for name in servers]
    return rows


def _questions(lengths: list[int], samples: int, seed: int) -> Iterator[tuple[int, list[Question]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    for tokens in lengths:
        yield tokens, make_questions("lines", tokenizer, tokens, samples, seed)


def _ask_all(
    url: str, questions: list[Question], advance: Callable[[], None]
) -> list[tuple[bool, float]]:
    """Asks one server alone, after the others have gone to sleep."""
    rest()
    _ask(url, questions[0])
    answers = []
    for question in questions:
        answers.append(_ask(url, question))
        advance()
    return answers


def _ask(url: str, question: Question) -> tuple[bool, float]:
    """Whether the reply is right, and seconds to its first token."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="-", timeout=300)
    began = time.perf_counter()
    first = 0.0
    reply = ""
    stream = client.chat.completions.create(
        model=str(model_dir()),
        messages=[{"role": "user", "content": question.prompt}],
        max_tokens=REPLY_TOKENS,
        temperature=0,
        stream=True,
    )
    for part in stream:
        text = part.choices[0].delta.content if part.choices else None
        if text:
            first = first or time.perf_counter() - began
            reply += text
    return is_correct(question, reply), first or time.perf_counter() - began


def _row(
    name: str, masks: Path | None, tokens: int, answers: Mapping[str, list[tuple[bool, float]]]
) -> Row:
    mine = answers[name]
    share = 1.0 if masks is None else float(density(load_mask_set(masks), [tokens], PAGE)[1].mean())
    base = statistics.median(seconds for _, seconds in answers[DENSE])
    seconds = statistics.median(seconds for _, seconds in mine)
    accuracy = sum(right for right, _ in mine) / len(mine)
    return Row(name, tokens, accuracy, share, seconds, base / seconds)
