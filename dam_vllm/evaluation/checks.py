"""The options of `dam-vllm eval`, checked before the first server starts.

Every error is one line that names the option, its value and what is allowed.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dam_vllm.evaluation.settings import REPLY_TOKENS, Settings, Subject
from dam_vllm.evaluation.state import content_digest
from dam_vllm.masks.file import load_mask_set
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.options import PAGE, PAGE_MULTIPLES, OptionError, output_option
from dam_vllm.questions.keys import KINDS
from dam_vllm.questions.prompting import prompting
from dam_vllm.questions.tasks import TASKS, make_questions

DEFAULT_LENGTHS, DEFAULT_WINDOWS = (2048, 4096, 8192), 4
MIN_LENGTH = 256
IMAGES = (".png", ".pdf", ".svg")


def tasks_option(text: str) -> tuple[str, ...]:
    """Tasks of a comma-separated list, each once."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(name in TASKS for name in names):
        raise OptionError(f"--tasks is {text!r}, must be names among {','.join(TASKS)}")
    return names


def keys_option(keys: str) -> None:
    """Refuses unknown kinds of keys."""
    if keys not in KINDS:
        raise OptionError(f"--keys is {keys!r}, must be one of {', '.join(KINDS)}")


def lengths_option(text: str | None, tasks: Sequence[str], longest: int | None) -> tuple[int, ...]:
    """Prompt lengths in rising order.

    Args:
        text: comma-separated tokens, or None for those of the default that fit the model.
        tasks: the tasks; the longest of their replies must fit beside the prompt.
        longest: positions of the model, or None if it does not tell.

    Returns:
        The lengths.

    Raises:
        OptionError: if one is not allowed.
    """
    most = sys.maxsize if longest is None else longest - max(REPLY_TOKENS[t] for t in tasks)
    if text is None:
        values = [length for length in DEFAULT_LENGTHS if length <= most]
    else:
        parts = [part.strip() for part in text.split(",")]
        values = [int(part) for part in parts if part.isdecimal()]
        values = values if len(values) == len(parts) else []
    if not values or not all(MIN_LENGTH <= value <= most for value in values):
        given = ",".join(map(str, DEFAULT_LENGTHS)) if text is None else text
        limit = "" if longest is None else f" to {most} (the model's {longest}, less the reply)"
        raise OptionError(f"--lengths is {given!r}, must be numbers from {MIN_LENGTH}{limit}")
    return tuple(sorted(set(values)))


def page_option(page: int | None, masks: Sequence[Subject]) -> int:
    """Tokens a page: the option, else those that the masks were fitted for, as in serving.

    Raises:
        OptionError: for a size that the backend does not take, and for masks of different ones.
    """
    pages = (subject.masks.header.fitted_page for subject in masks if subject.masks is not None)
    fitted = sorted({each for each in pages if each is not None})
    platform = "cuda" if torch.cuda.is_available() else "cpu"
    multiple = PAGE_MULTIPLES[platform]
    if page is not None:
        if page < 1 or page % multiple:
            raise OptionError(f"--page is {page}, must be a multiple of {multiple} tokens")
        return page
    if len(fitted) > 1 or any(each % multiple for each in fitted):
        sizes = ", ".join(map(str, fitted))
        raise OptionError(
            f"--masks were fitted for pages of {sizes} tokens, must be of one size that is a "
            f"multiple of {multiple} on {platform}: give --page"
        )
    return fitted[0] if fitted else PAGE


def serve_args_option(text: str) -> tuple[str, ...]:
    """Arguments as a shell would split them; raises OptionError for a size of pages."""
    try:
        arguments = tuple(shlex.split(text))
    except ValueError as error:
        raise OptionError(f"--serve-args is {text!r}, must be shell words: {error}") from None
    # vLLM takes both spellings.
    if any(each.split("=")[0].replace("_", "-") == "--block-size" for each in arguments):
        raise OptionError(f"--serve-args is {text!r}, must be without --block-size: use --page")
    return arguments


def output_options(
    json_file: Path | None, plot: Path | None, write: bool, masks: Sequence[str]
) -> None:
    """Refuses outputs that could not be written once all is measured."""
    output_option("--json", json_file)
    output_option("--plot", plot)
    if plot is not None and plot.suffix not in IMAGES:
        raise OptionError(f"--plot is {str(plot)!r}, must end in {', '.join(IMAGES)}")
    if write and not masks:
        raise OptionError("--write stores a report in mask files; name them with --masks")
    for place in masks:
        if write and not Path(place).exists():
            raise OptionError(
                f"--write stores a report in mask files, {place!r} is none here: download it, or "
                f"leave the option away"
            )


def masks_option(files: Sequence[Path], served: Fingerprint) -> list[Subject]:
    """Reads mask files and checks that they belong to the model.

    Args:
        files: the files.
        served: fingerprint of the model.

    Returns:
        A subject each, named by its file's name, or its path where two files have one name.

    Raises:
        ValueError: if a file cannot be read, is named twice or is of another model.
    """
    names = [file.name for file in files]
    subjects = []
    for file in files:
        if [other.resolve() for other in files].count(file.resolve()) > 1:
            raise OptionError(f"--masks names {str(file)!r} twice, must be different files")
        masks = load_mask_set(file)
        differs = masks.header.fingerprint.mismatch(served)
        if differs is not None:
            raise OptionError(
                f"--masks {str(file)!r} was made for {masks.header.model!r}, whose {differs} is "
                "not the model's; must be a mask file of this model"
            )
        name = file.name if names.count(file.name) == 1 else str(file)
        subjects.append(Subject(name, content_digest(file), masks, file))
    return subjects


def text_option(file: Path, tokenizer: Any, windows: int, longest: int) -> str:
    """Reads the text for perplexity and agreement.

    Args:
        file: plain text, or .jsonl with a "text" a line.
        tokenizer: the model's.
        windows: pieces that are wanted at each length.
        longest: tokens of the longest.

    Returns:
        The whole text.

    Raises:
        OptionError: if it cannot be read or is too short.
    """
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--text is {str(file)!r}, must be a UTF-8 text file: {error}") from None
    text = "\n".join(_jsonl(file, content)) if file.suffix == ".jsonl" else content
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if tokens < windows * longest:
        raise OptionError(
            f"--text is {str(file)!r} with {tokens} tokens, must have at least {windows * longest}"
            f" for --windows {windows} of {longest} tokens"
        )
    return text


def windows_option(windows: int | None, text: Path | None) -> int:
    """Pieces of the text at each length, 0 without one; raises OptionError if given without one."""
    if text is None and windows is not None:
        raise OptionError(f"--windows is {windows}, must be left away without --text")
    return 0 if text is None else windows or DEFAULT_WINDOWS


def _jsonl(file: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise OptionError(
                    f'--text is {str(file)!r}, whose line {number} must be JSON with a "text"'
                ) from None


def check_questions(settings: Settings, tokenizer: Any) -> None:
    """Refuses lengths that are too short for one question of a task."""
    asked, shortest = prompting(tokenizer, settings.completion), settings.lengths[0]
    for task in settings.tasks:
        tokens = shortest - asked.overhead
        try:
            make_questions(
                task, tokenizer, tokens, 1, settings.seed, asked.wording, settings.record_keys
            )
        except ValueError:
            raise OptionError(
                f"--lengths has {shortest}, too few tokens for one {task!r} question"
            ) from None
