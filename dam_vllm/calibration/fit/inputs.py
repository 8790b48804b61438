"""What all parts of the fit work on, and how their passes through the model are counted."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dam_vllm.calibration.errors import CalibrationStopped
from dam_vllm.calibration.fit.candidates import Pattern
from dam_vllm.calibration.fit.samples import PLAIN, FitText, question_prompts
from dam_vllm.calibration.fit.store import FitStore
from dam_vllm.calibration.progress import Work
from dam_vllm.calibration.settings import FitConfig
from dam_vllm.masks.model_shape import ModelShape

# A pass that measures costs as much as some plain ones; for the progress bar only.
WEIGHTS = {"reply": 2, "basis": 1, "loss": 6, "proof": 4, "check": 6, "probe": 1}

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
    """

    model: Any
    shape: ModelShape
    config: FitConfig
    patterns: list[Pattern]
    store: FitStore
    work: Work

    @property
    def layers(self) -> list[int]:
        """Layers of full attention."""
        return [row for row, kind in enumerate(self.shape.layer_types) if kind == "full"]

    def advance(self, kind: str, ids: list[int]) -> None:
        """Counts a pass of a kind of `WEIGHTS`.

        Raises:
            CalibrationStopped: if the caller wants to stop.
        """
        if self.work.advance([ids] * WEIGHTS[kind], [len(self.shape.layer_types) - 1]):
            raise CalibrationStopped


def fit_prompts(tokenizer: Any, config: FitConfig, plain: list[list[int]]) -> list[Prompt]:
    """Kind and tokens of all texts, plain ones first, replies not yet known."""
    questions = question_prompts(tokenizer, config.lengths, config.questions, config.seed)
    return [*((PLAIN, window) for window in plain), *questions]


def fit_cost(prompts: list[Prompt], shape: ModelShape, config: FitConfig) -> int:
    """Tokens times layers of all passes, as `Work` counts them."""
    once = sum(WEIGHTS[kind] for kind in ("reply", "basis", "loss", "check"))
    passes = sum(len(ids) for _, ids in prompts) * once
    probed = shape.layer_types.count("full") * (shape.kv_heads + 1) * 2
    kinds = {kind: 1 if kind == PLAIN else 2 for kind, _ in prompts}
    passes += probed * sum(kinds.values()) * probe_length(config)
    proven = sum(len(ids) for kind, ids in prompts if is_proof(config, kind, len(ids)))
    passes += proven * (1 + config.proofs) * WEIGHTS["proof"]
    return passes * len(shape.layer_types)


def probe_length(config: FitConfig) -> int:
    """Length of the texts that heads are probed on: the middle one."""
    return sorted(config.lengths)[(len(config.lengths) - 1) // 2]


def is_proof(config: FitConfig, kind: str, length: int) -> bool:
    """Whether a text of the fit proves choices: plain ones, and the longest with a question."""
    # A prompt may be some tokens shorter than the length it was made for.
    return kind == PLAIN or length > 0.9 * max(config.lengths)


def compared_rows(text: FitText, most: int) -> list[int]:
    """Rows whose next token is compared: all that reply, or some of a plain text."""
    if text.kind != PLAIN:
        return list(range(text.prompt - 1, len(text.ids) - 1))
    return np.linspace(1, text.prompt - 2, min(most, text.prompt - 2)).astype(int).tolist()
