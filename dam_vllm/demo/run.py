"""The demo: calibrate the packaged model, serve it with and without masks, ask both."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dam_vllm.demo import model_dir
from dam_vllm.evaluation.tasks import Question, is_correct, make_questions
from dam_vllm.masks.file import load_mask_set
from dam_vllm.masks.pages import density
from dam_vllm.server import Server, rest

PAGE = 32
MAX_LENGTH = 8704
REPLY_TOKENS = 48


@dataclass(frozen=True)
class Row:
    """One line of the demo's table.

    Attributes:
        masks: "dense" or the mask file's kind.
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
    masks: Path, lengths: list[int], samples: int, seed: int, advance: Callable[[], None]
) -> list[Row]:
    """Asks the dense server and the one with masks the same questions, length by length.

    Args:
        masks: mask file of the demo model.
        lengths: lengths of the prompts in tokens.
        samples: questions a length.
        seed: of the questions.
        advance: called after every answer.

    Returns:
        Two rows a length.
    """
    options = {"dam": {"masks": str(masks), "dense_below": 0}}
    dam = ["--attention-backend=dam", "--additional-config", json.dumps(options)]
    common = [
        f"--block-size={PAGE}",
        f"--max-model-len={MAX_LENGTH}",
        "--kv-cache-memory-bytes=100000000",
        "--no-enable-prefix-caching",
        "--enforce-eager",
    ]
    with Server(model_dir(), common) as dense, Server(model_dir(), [*common, *dam]) as sparse:
        rows: list[Row] = []
        for tokens, questions in _questions(lengths, samples, seed):
            dense_answers = _ask_all(dense.url, questions, advance)
            rows += _rows(masks, tokens, dense_answers, _ask_all(sparse.url, questions, advance))
    return rows


def _questions(lengths: list[int], samples: int, seed: int) -> Iterator[tuple[int, list[Question]]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    for tokens in lengths:
        yield tokens, make_questions("lines", tokenizer, tokens, samples, seed)


def _ask_all(
    url: str, questions: list[Question], advance: Callable[[], None]
) -> list[tuple[bool, float]]:
    """Asks one server alone, after the other has gone to sleep."""
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


def _rows(
    masks: Path, tokens: int, dense: list[tuple[bool, float]], sparse: list[tuple[bool, float]]
) -> list[Row]:
    loaded = load_mask_set(masks)
    share = float(density(loaded, [tokens], PAGE)[1].mean())
    base = statistics.median(seconds for _, seconds in dense)
    rows = []
    for name, read, answers in (("dense", 1.0, dense), (loaded.header.kind, share, sparse)):
        seconds = statistics.median(seconds for _, seconds in answers)
        accuracy = sum(right for right, _ in answers) / len(answers)
        rows.append(Row(name, tokens, accuracy, read, seconds, base / seconds))
    return rows
