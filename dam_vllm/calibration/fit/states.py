"""Queries, keys and values of every layer, one text a forward pass, and the keys' directions."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dam_vllm.calibration import capture
from dam_vllm.masks.mask_set import FloatArray


@dataclass(frozen=True)
class LayerStates:
    """One text in one layer, or the queries of its end alone.

    Attributes:
        layer: global layer index.
        query: [heads, queries, head_size], of the last tokens.
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
    def first(self) -> int:
        """Position of the first query."""
        return self.key.shape[1] - self.query.shape[1]

    @property
    def heads_per_kv(self) -> int:
        """Query heads a KV head."""
        return len(self.query) // len(self.key)

    def query_heads(self, head: int) -> slice:
        """The query heads of a KV head."""
        return slice(head * self.heads_per_kv, (head + 1) * self.heads_per_kv)


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


class KeyCovariance:
    """Hook that finds the bases in which dynamic heads score tokens (Loki, arXiv 2406.02542).

    They are the keys' principal directions, per KV head: it sums first and second moments.

    A direction in which all keys are alike adds the same to every score and tells no page from
    another, so the covariance is centred, text by text.
    """

    def __init__(self) -> None:
        self._sums: dict[int, torch.Tensor] = {}

    def __call__(self, states: LayerStates) -> None:
        key = states.key.double()
        centred = key - key.mean(dim=1, keepdim=True)
        added = centred.transpose(1, 2) @ centred / key.shape[1]
        self._sums[states.layer] = self._sums.get(states.layer, torch.zeros_like(added)) + added

    def rotations(self, layers: int, kv_heads: int) -> FloatArray:
        """Orthogonal bases, directions of largest variance first.

        Args:
            layers: layers of the model; those not seen get the identity.
            kv_heads: KV heads a layer.

        Returns:
            float32 [layers, kv_heads, head_size, head_size], directions in columns.
        """
        size = next(iter(self._sums.values())).shape[-1]
        result = np.tile(np.eye(size, dtype=np.float32), (layers, kv_heads, 1, 1))
        for layer, covariance in self._sums.items():
            directions = torch.linalg.eigh(covariance).eigenvectors.flip(-1)
            result[layer] = directions.float().cpu().numpy()
        return result
