"""What all parts of the fit work on, and how their passes through the model are counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dam_vllm.calibration.errors import CalibrationError, CalibrationStopped
from dam_vllm.calibration.fit.candidates import Pattern
from dam_vllm.calibration.fit.samples import PLAIN, REPLY_TOKENS, FitText, question_prompts
from dam_vllm.calibration.fit.store import FitStore
from dam_vllm.calibration.progress import Work
from dam_vllm.calibration.settings import FitConfig
from dam_vllm.masks.model_shape import ModelShape
from dam_vllm.masks.tails import span_pages

# A pass that measures costs as much as some plain ones; for the progress bar only.
WEIGHTS = {"reply": 2, "basis": 1, "loss": 4, "readers": 4, "proof": 2, "check": 3, "probe": 1}
PROVEN = 2  # texts of each kind of question that prove choices

Prompt = tuple[str, list[int]]
"""Kind of a text and its tokens, without a reply."""


@dataclass(frozen=True)
class FitInputs:
    """What the fit works on.

    Attributes:
        model: the decoder, loaded.
        shape: its shape.
        config: the settings.
        patterns: static patterns; the first keeps nothing.
        store: holds what an earlier run did.
        work: counts the passes.
        memory: bytes that rows in work may take.
    """

    model: Any
    shape: ModelShape
    config: FitConfig
    patterns: list[Pattern]
    store: FitStore
    work: Work
    memory: int

    @property
    def layers(self) -> list[int]:
        """Layers of full attention."""
        return [row for row, kind in enumerate(self.shape.layer_types) if kind == "full"]

    @property
    def attention_alone(self) -> bool:
        """Whether every layer has attention, and a text's beginning can be cached."""
        return "other" not in self.shape.layer_types

    def query_blocks_at_once(self, tokens: int, head_size: int) -> int:
        """Query blocks of a page whose attention, split by page, fits into the memory.

        Raises:
            CalibrationError: if it does not hold a single one.
        """
        shape, page = self.shape, self.config.page
        rows = page * shape.heads // shape.kv_heads
        pages = tokens // page + 1
        # Masses times values of pages and of spans; then weights and scores of each token.
        floats = rows * (pages * (head_size + 3 * page) + pages // span_pages(page) * head_size)
        most = self.memory // (4 * floats)
        if most < 1:
            raise CalibrationError(
                f"--memory-gib is {self.memory / 2**30:.2f}, must be at least "
                f"{4 * floats / 2**30:.2f} for texts of {tokens} tokens; smaller fit.lengths need "
                f"less"
            )
        return most

    def advance(self, kind: str, ids: list[int], first: int = 0) -> None:
        """Counts a pass of a kind of `WEIGHTS`, which begins at a layer.

        Raises:
            CalibrationStopped: if the caller wants to stop.
        """
        if self.work.advance([ids] * WEIGHTS[kind], [len(self.shape.layer_types) - 1 - first]):
            raise CalibrationStopped


def fit_prompts(tokenizer: Any, config: FitConfig, plain: list[list[int]]) -> list[Prompt]:
    """Kind and tokens of all texts, plain ones first, replies not yet known."""
    questions = question_prompts(tokenizer, config.lengths, config.questions, config.seed)
    return [*((PLAIN, window) for window in plain), *questions]


def fit_cost(prompts: list[Prompt], shape: ModelShape, config: FitConfig) -> int:
    """Tokens times layers of all passes, as `Work` counts them."""
    once = sum(WEIGHTS[kind] for kind in ("reply", "basis", "loss", "readers", "check"))
    passes = sum(len(ids) for _, ids in prompts) * once
    sizes = [(kind, len(ids)) for kind, ids in prompts]
    proven = sum(sizes[row][1] for row in proof_rows(sizes, config))
    passes += proven * (1 + config.proofs) * WEIGHTS["proof"]
    count = len(shape.layer_types)
    # Probes begin at the layer that is probed; of questions, those past the context at its end.
    probed = sum(count - row for row, kind in enumerate(shape.layer_types) if kind == "full")
    kinds, heads = {kind for kind, _ in prompts}, shape.kv_heads + 1
    short = config.page + REPLY_TOKENS
    rows = sum(
        heads * min(config.lengths) if kind == PLAIN else min(config.lengths) + 2 * heads * short
        for kind in kinds
    )
    probes = probed * 2 * rows
    return passes * count + probes * WEIGHTS["probe"]


def proof_rows(sizes: Sequence[tuple[str, int]], config: FitConfig) -> list[int]:
    """Which texts prove choices: plain ones, and some of each kind of question, the longest.

    Args:
        sizes: kind of each text, and tokens of its prompt.
        config: the settings.

    Returns:
        Their rows.
    """
    # A prompt may be some tokens shorter than the length it was made for.
    longest = 0.9 * max(config.lengths)
    rows = list[int]()
    for kind in dict.fromkeys(kind for kind, _ in sizes):
        mine = [row for row, (each, size) in enumerate(sizes)
                if each == kind and (kind == PLAIN or size > longest)]  # fmt: skip
        rows += mine if kind == PLAIN else mine[:PROVEN]
    return rows


def compared_rows(text: FitText, most: int) -> list[int]:
    """Rows whose next token is compared: all that reply, or some of a plain text."""
    if text.kind != PLAIN:
        return list(range(text.prompt - 1, len(text.ids) - 1))
    return np.linspace(1, text.prompt - 2, min(most, text.prompt - 2)).astype(int).tolist()
