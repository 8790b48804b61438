"""Queries, keys and values of every layer, through transformers' attention interface.

A hook sees them after the rotary embedding, as serving does, and may compute attention itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from dam_vllm.calibration.capture import capture_attention

IMPLEMENTATION = "dam_states"


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

_active: ContextVar[Hook | None] = ContextVar("dam_states", default=None)


def prepare(model: Any) -> None:
    """Lets a decoder compute attention by this module."""
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    model.set_attn_implementation(IMPLEMENTATION)


@contextmanager
def hooked(hook: Hook) -> Iterator[None]:
    """Calls a hook in every layer of the forward passes inside; they run one text each."""
    token = _active.set(hook)
    try:
        yield
    finally:
        _active.reset(token)


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


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    hook = _active.get()
    if hook is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        states = LayerStates(
            module.layer_idx, query[0], key[0], value[0], float(scale), softcap or 0.0
        )
        output = hook(states)
        if output is not None:
            return output.transpose(0, 1)[None].to(query.dtype).contiguous(), None
    # Stock attention, soft-capping included, which "sdpa" leaves out.
    return capture_attention(
        module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **kwargs
    )
