"""From the options of `dam-vllm eval` to an evaluation that is ready to run."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from dam_vllm import __version__
from dam_vllm.evaluation import checks
from dam_vllm.evaluation.settings import Settings, Subject
from dam_vllm.evaluation.state import digest
from dam_vllm.machine import machine
from dam_vllm.masks.fingerprint import Fingerprint, fingerprint
from dam_vllm.masks.model_shape import model_shape
from dam_vllm.options import OptionError
from dam_vllm.questions.tasks import VERSION


@dataclass(frozen=True)
class Job:
    """A checked evaluation.

    Attributes:
        settings: what to ask.
        masks: the mask files.
        tokenizer: the model's.
        folder: where its answers are kept.
    """

    settings: Settings
    masks: list[Subject]
    tokenizer: Any
    folder: Path


@dataclass(frozen=True)
class Options:
    """What `dam-vllm eval` is given.

    Attributes:
        model: folder or Hub id.
        masks: mask files.
        tasks: comma-separated names.
        lengths: comma-separated tokens, or None for the default.
        samples: questions a task and length.
        seed: of the questions.
        page: tokens a KV-cache page, or None for those of the masks' fit.
        dense_below: query positions below it attend densely.
        streaming: whether to ask streaming masks of equal density too.
        text: file for perplexity and agreement.
        windows: pieces of it a length, or None for the default.
        serve_args: further arguments of `vllm serve`, as shell words.
        keys: kind of the records' keys.
        completion: whether to ask by completions in any case.
    """

    model: str
    masks: Sequence[Path]
    tasks: str
    lengths: str | None
    samples: int
    seed: int
    page: int | None
    dense_below: int
    streaming: bool
    text: Path | None
    windows: int | None
    serve_args: str
    keys: str
    completion: bool


def prepare(options: Options) -> Job:
    """Checks all options against model and files, before anything is started.

    Args:
        options: as given.

    Returns:
        The job.

    Raises:
        ValueError: for an option that cannot be honoured.
    """
    names, text = checks.tasks_option(options.tasks), options.text
    checks.keys_option(options.keys)
    arguments = checks.serve_args_option(options.serve_args)
    pieces = checks.windows_option(options.windows, text)
    served = fingerprint(options.model)
    subjects = checks.masks_option(options.masks, served)
    tokenizer, longest = _load(options.model)
    tokens = checks.lengths_option(options.lengths, names, longest)
    settings = Settings(
        model=options.model,
        tasks=names,
        lengths=tokens,
        samples=options.samples,
        seed=options.seed,
        page=checks.page_option(options.page, subjects),
        dense_below=options.dense_below,
        streaming=options.streaming,
        serve_args=arguments,
        text=None if text is None else checks.text_option(text, tokenizer, pieces, tokens[-1]),
        windows=pieces,
        record_keys=options.keys,
        completion=options.completion,
    )
    checks.check_questions(settings, tokenizer)
    return Job(settings, subjects, tokenizer, cache_folder(settings, subjects, served))


def _load(model: str) -> tuple[Any, int | None]:
    """Tokenizer and longest position of a model."""
    try:
        shape = model_shape(AutoConfig.from_pretrained(model))
        return AutoTokenizer.from_pretrained(model), shape.max_length
    except OSError as error:
        raise OptionError(f"MODEL is {model!r}: {str(error).splitlines()[0]}") from None


def cache_folder(settings: Settings, masks: Sequence[Subject], served: Fingerprint) -> Path:
    """Where an evaluation's answers are kept.

    Tasks and lengths are no part of it, so that more of them may be asked for later.

    Args:
        settings: what to ask.
        masks: the mask files.
        served: fingerprint of the model.

    Returns:
        A folder named by all that the answers and their times depend on.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = asdict(settings)
    for name in ("model", "tasks", "lengths", "streaming"):
        del chosen[name]
    contents = sorted(subject.key for subject in masks)
    versions = [VERSION, __version__, vllm_version()]
    # A model without weights on disk that can be sampled is known by its name.
    name = settings.model if served.weights is None else ""
    key = digest(chosen, served.model_dump(), name, contents, versions)
    return root / "dam-vllm" / "eval" / key


def vllm_version() -> str:
    """Version of the installed vLLM; raises OptionError where there is none."""
    found = str(machine()["vllm"])
    if found == "none":
        raise OptionError("`dam-vllm eval` needs vLLM, which is not installed beside this Python")
    return found
