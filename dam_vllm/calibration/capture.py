"""Attention with its weights shown to an observer, through transformers' attention interface.

The function below stands beside "sdpa" and "flash_attention_2" under the name IMPLEMENTATION,
so no model's code is touched. A hook sees every call, after the rotary embedding, as serving does,
and may compute attention itself: what shows weights (Stage 1) and what works on queries, keys and
values (the fit) are hooks. Eager attention is computed in blocks of queries, so that no whole
[heads, queries, keys] tensor of weights exists.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dam_vllm.calibration.errors import CalibrationError

IMPLEMENTATION = "dam_capture"
BLOCK_BYTES = 2**26
UNSUPPORTED = ("s_aux", "position_bias")

Observer = Callable[[int, int, torch.Tensor], None]
"""Called with (layer, first row, float32 weights [batch, heads, rows, keys])."""


@dataclass(frozen=True)
class AttentionCall:
    """What a model asks of its attention in one layer.

    Attributes:
        layer: global layer index.
        query: [batch, heads, queries, head size].
        key: [batch, KV heads, keys, head size].
        value: [batch, KV heads, keys, value size].
        mask: bool (True is seen) or additive [batch, 1 or heads, queries, keys], or None for
            causal attention.
        scale: factor of the scores.
        softcap: bound of the scores by tanh, or None.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    softcap: float | None

    def eager(self, observe: Observer | None = None) -> torch.Tensor:
        """Eager attention in blocks of queries, [batch, heads, queries, value size].

        Args:
            observe: called with the weights of every block.
        """
        output = self.query.new_empty(*self.query.shape[:3], self.value.shape[-1])
        cached = self.key.shape[2] - self.query.shape[2]
        for start, stop in _blocks(self.query, self.key):
            keys = cached + stop if self.mask is None else self.key.shape[2]
            mask = None if self.mask is None else self.mask[:, :, start:stop, :keys]
            query, key = self.query[:, :, start:stop], self.key[:, :, :keys]
            weights = _weights(query, key, mask, cached + start, self.scale, self.softcap)
            if observe is not None:
                observe(self.layer, start, weights)
            found = _grouped(weights.to(query.dtype), self.value[:, :, :keys])
            output[:, :, start:stop] = found
        return output


Hook = Callable[[AttentionCall], torch.Tensor | None]
"""Sees a call; returns its output [batch, heads, queries, value size], or None for the usual."""

_active: ContextVar[Hook | None] = ContextVar("dam_capture", default=None)


class _Finished(Exception):  # noqa: N818 - leaves a forward pass early
    """The last observed layer has been seen."""


@dataclass
class _Weights:
    """Hook that shows the weights of some layers."""

    layers: frozenset[int]
    observe: Observer
    seen: set[int] = field(default_factory=set)

    def __call__(self, call: AttentionCall) -> torch.Tensor | None:
        if call.layer not in self.layers:
            return None
        output = call.eager(self.observe)
        self.seen.add(call.layer)
        if call.layer == max(self.layers) and self.seen == self.layers:
            raise _Finished
        return output


def register() -> None:
    """Makes IMPLEMENTATION known to transformers."""
    AttentionInterface.register(IMPLEMENTATION, capture_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@contextmanager
def hooked(hook: Hook) -> Iterator[None]:
    """Calls a hook in every layer of the forward passes inside."""
    token = _active.set(hook)
    try:
        yield
    finally:
        _active.reset(token)


def observe_forward(model: Any, ids: torch.Tensor, layers: list[int], observe: Observer) -> None:
    """Runs a model up to the last observed layer.

    Windows of a batch are padded on the right and no padding mask is passed: attention is
    causal, so what follows a window changes nothing before it.

    Args:
        model: a decoder loaded with `attn_implementation=IMPLEMENTATION`.
        ids: int64 [batch, tokens] on the model's device.
        layers: global indices of the layers to observe, ascending, not empty.
        observe: called for every block of queries of these layers.

    Raises:
        CalibrationError: if a layer never calls transformers' attention interface.
    """
    weights = _Weights(frozenset(layers), observe)
    with hooked(weights), torch.inference_mode():
        try:
            model(input_ids=ids, use_cache=False)
        except _Finished:
            return
    missing = sorted(weights.layers - weights.seen)
    raise CalibrationError(
        f"model type {model.config.model_type!r} does not use transformers' attention interface "
        f"in layers {missing}, so its attention cannot be captured"
    )


def capture_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as the hook in force computes it, else as usual (transformers' interface).

    Args:
        module: the attention layer, for its `layer_idx`.
        query: [batch, heads, queries, head size].
        key: [batch, KV heads, keys, head size].
        value: [batch, KV heads, keys, value size].
        attention_mask: bool (True is seen) or additive [batch, 1 or heads, queries, keys], or
            None for causal attention.
        scaling: factor of the scores, or None for 1 / sqrt(head size).
        softcap: bound of the scores by tanh, or None.
        **kwargs: what else models pass; dropout is none at evaluation.

    Returns:
        [batch, queries, heads, value size], and None for the weights.

    Raises:
        CalibrationError: for attention that eager attention with these arguments is not.
    """
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise CalibrationError(
                f"layer {module.layer_idx} has attention with {name!r}, which is not supported"
            )
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    call = AttentionCall(module.layer_idx, query, key, value, attention_mask, scale, softcap)
    hook = _active.get()
    output = None if hook is None else hook(call)
    if output is None and softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scale, **kwargs
        )
    output = call.eager() if output is None else output
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


def _blocks(query: torch.Tensor, key: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Query ranges whose float32 scores take about BLOCK_BYTES."""
    batch, heads, queries, _ = query.shape
    rows = max(1, BLOCK_BYTES // (4 * batch * heads * key.shape[2]))
    for start in range(0, queries, rows):
        yield start, min(start + rows, queries)


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention weights of a block whose first query is at key `start`.

    Returns:
        float32 [batch, heads, rows, keys].
    """
    scores = _grouped(query, key.transpose(2, 3)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is None:
        future = torch.ones(scores.shape[2], scores.shape[3], dtype=torch.bool, device=key.device)
        scores.masked_fill_(future.triu(start + 1), float("-inf"))
    elif mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def _grouped(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiplies left [batch, heads, rows, n] by right [batch, KV heads, n, m]; copies no heads."""
    batch, heads, rows, inner = left.shape
    kv_heads = right.shape[1]
    grouped = left.reshape(batch, kv_heads, heads // kv_heads * rows, inner)
    return (grouped @ right).view(batch, heads, rows, right.shape[-1])
