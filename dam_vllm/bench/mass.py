"""What pages that are not read would add: a whole model run under estimates of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dam_vllm.bench.estimates import Estimate, Estimated
from dam_vllm.bench.report import Row
from dam_vllm.bench.timing import Advance
from dam_vllm.calibration.fit.inputs import compared_rows
from dam_vllm.calibration.fit.probes import mean_kl
from dam_vllm.calibration.fit.samples import PLAIN, FitText, question_prompts, with_reply
from dam_vllm.calibration.fit.states import hooked, run
from dam_vllm.calibration.model import ModelSource
from dam_vllm.evaluation.agreement import text_windows
from dam_vllm.evaluation.checks import text_option
from dam_vllm.masks.file import load_mask_set
from dam_vllm.masks.fingerprint import fingerprint
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.targets import at_target
from dam_vllm.options import PAGE, OptionError

ROWS = 512  # rows of a window whose next token is compared
SEED = 7  # of the questions; fits have 0 by default
LEAST_TOKENS = 1024
TARGETS = "agreement with full attention, in float32 by transformers; delta is not served"


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        text: held-out plain text.
        length: tokens of a window and of a question's prompt.
        windows: of the text.
        questions: of each task of retrieval.
        estimates: what is tried.
        period: of DELTA.
    """

    text: Path
    length: int
    windows: int
    questions: int
    estimates: list[Estimate]
    period: int


def measure_file(
    case: Case, name: str, masks: Path, densities: Sequence[float | None], advance: Advance
) -> Iterator[Row]:
    """Measures choices of a mask file on its model.

    Args:
        case: what is measured.
        name: folder or Hub id of the model.
        masks: the mask file.
        densities: choices of its frontier, None for the file's own.
        advance: called once a row.

    Yields:
        Rows of `measure`.

    Raises:
        OptionError: if the text is too short, or the file was made for another model.
        TargetError: if the file holds no such choice.
    """
    source = ModelSource(name, None, torch.device("cpu"), "float32")
    made = load_mask_set(masks)
    choices = [at_target(made, target_density=each) for each in densities]
    differs = made.header.fingerprint.mismatch(fingerprint(name))
    if differs:
        raise OptionError(f"--masks {str(masks)!r} was made for another model: {differs} differs")
    model = source.load()
    yield from measure(case, choices, model, source.tokenizer(), advance)


def measure(
    case: Case, choices: Sequence[MaskSet], model: Any, tokenizer: Any, advance: Advance
) -> Iterator[Row]:
    """Runs the model under every choice and estimate.

    Args:
        case: what is measured.
        choices: masks.
        model: the decoder, loaded by `ModelSource`.
        tokenizer: its tokenizer.
        advance: called once a row.

    Yields:
        "read" is the density, "extra" what the estimate costs in units of dense attention; "kl" in
        nats and "top1" of plain text, "kl_tasks" the largest of the tasks, "replies" the share of
        greedy replies kept token by token.

    Raises:
        OptionError: if the text is too short.
    """
    texts = _texts(case, model, tokenizer)
    rows = [compared_rows(text, ROWS) for text in texts]
    full = [run(model, text.ids, some) for text, some in zip(texts, rows, strict=True)]
    for masks in choices:
        for estimate in case.estimates:
            served = estimate.tails(masks)
            period = case.period if estimate in (Estimate.DELTA, Estimate.BOTH) else 0
            found = []
            for text, some, logits in zip(texts, rows, full, strict=True):
                hook = Estimated(served, _page(masks), text.prompt, some, period)
                with hooked(hook):
                    other = run(model, text.ids, some)
                found.append((text.kind, hook, mean_kl(logits, other), _same(logits, other)))
            yield {"bench": "mass", "estimate": str(estimate)} | _figures(found)
            advance()


def _page(masks: MaskSet) -> int:
    """Tokens a page that is served."""
    return masks.header.fitted_page or PAGE


def _figures(found: list[tuple[str, Estimated, float, torch.Tensor]]) -> Row:
    """A row's figures, from kind, hook, KL and equal best tokens of every text."""
    hooks = [hook for _, hook, _, _ in found]
    plain = [(kl, same) for kind, _, kl, same in found if kind == PLAIN]
    tasks = {kind: 0.0 for kind, *_ in found if kind != PLAIN}
    for kind in tasks:
        tasks[kind] = float(np.mean([kl for each, _, kl, _ in found if each == kind]))
    replies = [bool(same.all()) for kind, _, _, same in found if kind != PLAIN]
    full = [row for row, kind in enumerate(hooks[0].masks.header.layer_types) if kind == "full"]
    return {
        "read": float(np.mean([hook.read[full] for hook in hooks])),
        "extra": float(np.mean([hook.extra[full] for hook in hooks])),
        "scored": int((hooks[0].masks.modes == HeadMode.DYNAMIC).sum()),
        "kl": float(np.mean([kl for kl, _ in plain])),
        "top1": float(torch.cat([same for _, same in plain]).float().mean()),
        "kl_tasks": max(tasks.values(), default=None),
        "replies": float(np.mean(replies)) if replies else None,
    }


def _same(full: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return full.argmax(-1) == other.argmax(-1)


def _texts(case: Case, model: Any, tokenizer: Any) -> list[FitText]:
    """Windows of the text, then questions with the model's own replies."""
    text = text_option(case.text, tokenizer, case.windows, case.length)
    windows = text_windows(tokenizer, text, case.length, case.windows)
    texts = [FitText(PLAIN, window, len(window)) for window in windows]
    if case.questions:
        asked = question_prompts(tokenizer, [case.length], case.questions, SEED)
        texts += [with_reply(model, kind, ids) for kind, ids in asked]
    return texts
