"""Retrieval questions as text, made from a seed, for any model and tokenizer."""

import re
from dataclasses import dataclass
from random import Random
from typing import Any

from dam_vllm.evaluation.filler import sentence
from dam_vllm.evaluation.keys import KINDS, make_keys
from dam_vllm.evaluation.wordings import WORDINGS, Wording

TASKS = tuple(WORDINGS)
DEFAULT_WORDING = {"lines": "longeval", "kv": "question", "needle": "question"}
NEEDLES = 4


@dataclass(frozen=True)
class Question:
    """One question over a long text.

    Attributes:
        task: "lines", "kv" or "needle".
        prompt: the user's text; the question stands at its end.
        answer: the number asked for, as digits.
        tokens: length of the prompt in tokens, special tokens not counted.
        depth: where in the text the answer lies, 0 (start) to 1 (end).
    """

    task: str
    prompt: str
    answer: str
    tokens: int
    depth: float


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
        wording: one of `WORDINGS[task]`; by default the first that the task names.
        keys: one of `keys.KINDS`.

    Returns:
        The questions.

    Raises:
        ValueError: for an unknown task, wording or kind of key, or too few tokens.
    """
    _known("task", task, TASKS)
    wording = wording or DEFAULT_WORDING[task]
    _known("wording", wording, tuple(WORDINGS[task]))
    _known("keys", keys, KINDS)
    texts = WORDINGS[task][wording]
    return [
        _question(
            task, texts, keys, tokenizer, tokens, (index + 0.5) / samples, Random(f"{seed}/{index}")
        )
        for index in range(samples)
    ]


def is_correct(question: Question, reply: str) -> bool:
    """Whether the reply's value is the answer: its last whole number on the first full line.

    The reply may restate the record, whose key can hold digits, so the number that counts is
    the last one of the first line that has any.
    """
    for line in reply.strip().splitlines():
        numbers = re.findall(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])", line)
        if numbers:
            return numbers[-1] == question.answer
    return False


def _question(
    task: str, texts: Wording, keys: str, tokenizer: Any, tokens: int, depth: float, rng: Random
) -> Question:
    records, names, values = _records(task, texts, keys, tokenizer, tokens, depth, rng)
    places = [index for index, name in enumerate(names) if name]
    asked = min(places, key=lambda index: abs(index + 0.5 - depth * len(records)))
    question = texts.question.format(key=names[asked])
    while True:
        prompt = texts.header + "".join(records) + texts.footer + question
        length = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        if length <= tokens:
            break
        spare = max(1, (length - tokens) * len(records) // length)
        if len(records) - spare < 2:
            raise ValueError(f"tokens is {tokens}: too few for one {task} question")
        kept = [index for index in range(len(records)) if index != asked][
            : len(records) - spare - 1
        ]
        order = sorted([*kept, asked])
        records = [records[index] for index in order]
        asked = order.index(asked)
    before = len(texts.header) + sum(map(len, records[:asked]))
    return Question(task, prompt, str(values[names_key(question, values)]), length,
                    before / len(prompt))  # fmt: skip


def names_key(question: str, values: dict[str, int]) -> str:
    """The key that a question names: the longest one it holds."""
    return max((key for key in values if key in question), key=len)


def _records(
    task: str, texts: Wording, keys: str, tokenizer: Any, tokens: int, depth: float, rng: Random
) -> tuple[list[str], list[str], dict[str, int]]:
    """Records enough for `tokens`, the key that each holds ("" for filler), and the values."""
    if task == "needle":
        names = make_keys(rng, keys, NEEDLES)
        values = {name: rng.randrange(10_000, 100_000) for name in names}
        size = len(tokenizer(sentence(Random(0)) * 20, add_special_tokens=False).input_ids) / 20
        count = int(tokens / size * 1.1) + NEEDLES + 2
        lines = [sentence(rng) for _ in range(count)]
        places = {int(depth * count): names[0]}
        places |= {rng.randrange(count): name for name in names[1:]}
        places[int(depth * count)] = names[0]
        held = [places.get(index, "") for index in range(count)]
        asked = int(depth * count)
        records = [
            texts.record.format(key=name, value=values[name]) if name else line
            for name, line in zip(held, lines, strict=True)
        ]
        return records, [name if index == asked else "" for index, name in enumerate(held)], values
    sample = texts.record.format(key=make_keys(rng, keys, 2)[0], value=12345)
    size = len(tokenizer(sample * 20, add_special_tokens=False).input_ids) / 20
    count = max(2, int(tokens / size * 1.05) + 2)
    names = make_keys(rng, keys, count)
    values = {name: rng.randrange(10_000, 100_000) for name in names}
    return [texts.record.format(key=k, value=values[k]) for k in names], names, values


def _known(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
