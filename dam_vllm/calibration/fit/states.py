"""Queries, keys and values of every layer, one text a forward pass."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from dam_vllm.calibration import capture


@dataclass(frozen=True)
class LayerStates:
    """One text in one layer.

    Attributes:
        layer: global layer index.
        query: [heads, tokens, head_size].
        key: [kv_heads, tokens, head_size].
        value: [kv_heads, tokens, head_size].
        scale: factor of the scores.
        softcap: soft-capping of the scores, 0 for none.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return len(self.query) // len(self.key)


Hook = Callable[[LayerStates], torch.Tensor | None]
"""Sees a layer's states; returns its output [heads, tokens, head_size], or None for stock."""


def prepare(model: Any) -> None:
    """Lets a decoder compute attention by `capture`."""
    capture.register()
    model.set_attn_implementation(capture.IMPLEMENTATION)


def hooked(hook: Hook) -> AbstractContextManager[None]:
    """Calls a hook in every layer of the forward passes inside; they run one text each."""

    def one_text(call: capture.AttentionCall) -> torch.Tensor | None:
        output = hook(
            LayerStates(
                call.layer, call.query[0], call.key[0], call.value[0], call.scale,
                call.softcap or 0.0,
            )
        )  # fmt: skip
        return None if output is None else output[None]

    return capture.hooked(one_text)


def run(model: Any, ids: list[int], rows: list[int] | None = None) -> torch.Tensor:
    """Runs a text through a prepared model.

    Args:
        model: the decoder.
        ids: the text.
        rows: positions whose logits are wanted, or None for the last.

    Returns:
        float32 [rows, vocabulary].
    """
    inputs = torch.tensor([ids], device=model.device)
    kept = torch.tensor(rows or [len(ids) - 1], device=model.device)
    with torch.inference_mode():
        found = model(input_ids=inputs, use_cache=False, logits_to_keep=kept)
    return torch.as_tensor(found.logits[0]).float()
