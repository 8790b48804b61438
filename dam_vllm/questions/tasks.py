"""Questions with known answers as text, made from a seed, for any model and tokenizer."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from dam_vllm.questions.common_words import common_words
from dam_vllm.questions.draft import Draft, Maker
from dam_vllm.questions.keys import KINDS
from dam_vllm.questions.retrieval import lookup, needle
from dam_vllm.questions.tracking import tracking
from dam_vllm.questions.wordings import SET_WORDINGS, WORDINGS

RETRIEVAL = tuple(WORDINGS)
TASKS = (*RETRIEVAL, *SET_WORDINGS)
TASK_WORDINGS = WORDINGS | SET_WORDINGS
DEFAULT_WORDING = dict.fromkeys(TASKS, "question") | {"lines": "longeval"}
COMPLETION = "completion"
VERSION = 2  # of all that a seed's questions and their scores depend on
MIN_RECORDS = {"lines": 2, "kv": 2, "needle": 6, "tracking": 16, "words": 60}
PROBES = (64, 128)
TRIES = 12


@dataclass(frozen=True)
class Question:
    """One question over a long text.

    Attributes:
        task: one of `TASKS`.
        prompt: the user's text; the question stands at its end.
        answers: all that a right reply names: a number, or names.
        tokens: length of the prompt in tokens, special tokens not counted.
        depth: where in the text the last needed record lies, 0 (start) to 1 (end), or None
            where the whole text is needed.
        candidates: regular expression of what counts as named in a reply.
        given: names in the question itself, which a reply may restate.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    tokens: int
    depth: float | None
    candidates: str
    given: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """A right reply."""
        return ", ".join(self.answers)


def make_questions(
    task: str,
    tokenizer: Any,
    tokens: int,
    samples: int,
    seed: int,
    wording: str | None = None,
    keys: str = "pair",
) -> list[Question]:
    """Makes questions whose answers lie evenly spread over the depth of their texts.

    Args:
        task: one of `TASKS`.
        tokenizer: a transformers tokenizer, which measures the length.
        tokens: tokens that a prompt may have at most; it comes within a record of that.
        samples: questions wanted, each over a text of its own.
        seed: the same seed gives the same questions.
        wording: one of `TASK_WORDINGS[task]`; by default a question in words.
        keys: one of `keys.KINDS`, for the tasks of `RETRIEVAL`.

    Returns:
        The questions.

    Raises:
        ValueError: for an unknown task, wording or kind of key, or too few tokens.
    """
    _known("task", task, TASKS)
    wording = wording or DEFAULT_WORDING[task]
    _known("wording", wording, tuple(TASK_WORDINGS[task]))
    _known("keys", keys, KINDS)
    texts = TASK_WORDINGS[task][wording]
    makers: dict[str, Callable[[], Maker]] = {
        "lines": lambda: lookup(texts, keys),
        "kv": lambda: lookup(texts, keys),
        "needle": lambda: needle(texts, keys),
        "tracking": lambda: tracking(texts),
        "words": lambda: common_words(texts),
    }
    make = makers[task]()
    return [
        _fit(task, make, tokenizer, tokens, (index + 0.5) / samples, f"{seed}/{index}")
        for index in range(samples)
    ]


def is_correct(question: Question, reply: str) -> bool:
    """Whether a reply names exactly the answers.

    Lines are read until as many names have come as there are answers, so that text after a
    full reply does not count. What the question itself gives is no answer.
    """
    wanted = {answer.casefold() for answer in question.answers}
    given = {name.casefold() for name in question.given}
    found: set[str] = set()
    for line in reply.splitlines():
        found |= {name.casefold() for name in re.findall(question.candidates, line)} - given
        if len(found) >= len(wanted):
            break
    return found == wanted


def _fit(task: str, make: Maker, tokenizer: Any, tokens: int, depth: float, seed: str) -> Question:
    """The question with as many records as its length allows, found by trying."""

    def draft(count: int) -> tuple[Draft, int]:
        made = make(Random(seed), count, depth)
        return made, len(tokenizer(made.prompt, add_special_tokens=False, verbose=False).input_ids)

    few, many = (draft(count)[1] for count in PROBES)
    size = (many - few) / (PROBES[1] - PROBES[0])
    count = PROBES[0] + int((tokens - few) / size)
    best: tuple[Draft, int] | None = None
    tried: set[int] = set()
    while count >= MIN_RECORDS[task] and count not in tried and len(tried) < TRIES:
        tried.add(count)
        made, length = draft(count)
        if length <= tokens and (best is None or length > best[1]):
            best = made, length
        spare = (tokens - length) / size
        count += int(spare) if spare >= 0 else min(-1, int(spare))
    if best is None:
        raise ValueError(f"tokens is {tokens}: too few for one {task} question")
    made, length = best
    place = None if made.place is None else made.place / len(made.prompt)
    return Question(task, made.prompt, made.answers, length, place, made.candidates, made.given)


def _known(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
