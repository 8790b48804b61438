"""Makes the shipped texts, `dam_vllm/demo/texts.jsonl`: half prose and code, half retrieval.

    python -m dam_vllm.calibration.make_texts TOKENIZER [--output FILE]

The first half comes from the Python standard library of the running interpreter; the second
from the evaluation's retrieval questions, each text with its answer, under seeds that evaluation
does not use. The shipped file was made when the same seeds still drew other names and numbers.
"""

import argparse
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from dam_vllm.questions.tasks import RETRIEVAL, make_questions

OUTPUT = Path(__file__).parent.parent / "demo" / "texts.jsonl"
FOLDERS = (".", "asyncio", "collections", "concurrent", "email", "http", "importlib", "json",
           "logging", "multiprocessing", "unittest", "urllib", "xml")  # fmt: skip
SEED = 20250611
TEXTS = 66
MIN_TOKENS, MAX_TOKENS = 1500, 4000
ASKED = 750


def library_texts(tokenizer: Any, count: int, rng: Random) -> list[str]:
    """Stretches of standard library sources.

    Args:
        tokenizer: a transformers tokenizer, which measures the length.
        count: texts wanted.
        rng: source of randomness.

    Returns:
        At most `count` texts of MIN_TOKENS to MAX_TOKENS tokens, from a file each, cut at lines.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for folder in FOLDERS for file in (root / folder).glob("*.py"))
    rng.shuffle(files)
    texts: list[str] = []
    for file in files:
        if len(texts) == count:
            break
        text = _first_tokens(file.read_text(encoding="utf-8"), tokenizer, _length(rng))
        if _count(text, tokenizer) >= MIN_TOKENS:
            texts.append(text)
    return texts


def retrieval_texts(tokenizer: Any, count: int, rng: Random) -> Iterator[str]:
    """Yields questions with their answers, the retrieval tasks in turn.

    A text holds several questions of ASKED tokens, so that windows shorter than it have some.
    """
    for index in range(count):
        task = RETRIEVAL[index % len(RETRIEVAL)]
        text, left = "", _length(rng)
        for part in range(left // ASKED):
            question = make_questions(task, tokenizer, ASKED, 1, SEED + 100 * index + part)[0]
            text += f"{question.prompt}\n{question.answer}\n\n"
        yield text


def _length(rng: Random) -> int:
    return rng.randint(MIN_TOKENS, MAX_TOKENS)


def _count(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _first_tokens(text: str, tokenizer: Any, tokens: int) -> str:
    """The whole lines that begin a text within a number of tokens."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        tokens -= _count(line, tokenizer)
        if tokens < 0:
            break
        lines.append(line)
    return "".join(lines)


def main() -> None:
    """Writes the file."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description="Makes the shipped texts.")
    parser.add_argument("tokenizer", help="folder or Hub id of the demo model")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    rng = Random(SEED)
    texts = library_texts(tokenizer, TEXTS // 2, rng)
    texts += retrieval_texts(tokenizer, TEXTS // 2, rng)
    rng.shuffle(texts)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    arguments.output.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
