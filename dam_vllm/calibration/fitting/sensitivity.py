"""How much an error of a head's output matters: the KL that it causes, head by head.

The same relative error is harmless in one head and ruins the next token in another. Each KV head
is therefore probed alone, all others attending to everything: the mean KL of the next-token
distribution over its squared error is its sensitivity. It hardly depends on the size of the
error, so that errors times sensitivities, summed over heads, predict the KL of a whole choice.
Rows of context and rows that look back, those that end a question and its reply, are probed
apart: an error in a reply meets the next token at once, one in the context hardly ever.
Heads may stand in for each other, so that none is missed alone: all heads of a layer are probed
together too. Where all of them fail, that KL is far beyond what some of them failing causes, so
that the truth lies between the two; see `dam_vllm.calibration.fitting.proving`.
"""

from dataclasses import replace

import numpy as np
import torch

from dam_vllm.calibration.fitting.losses import CONTEXT, Sums
from dam_vllm.masks.mask_set import HeadMode, MaskSet

# Errors below tell nothing: the KL that they cause drowns in rounding.
LEAST_ERROR = 1e-5


def kinds_of(groups: list[str]) -> list[str]:
    """Kinds of text, in order."""
    return list(dict.fromkeys(group.split("/")[0] for group in groups))


def worst_by_part(errors: np.ndarray, groups: list[str]) -> np.ndarray:
    """Largest squared error over lengths, of context and of the rows that look back.

    Args:
        errors: squared relative errors [layers, groups, kv_heads, candidates].
        groups: names "kind/part/length".

    Returns:
        float64 [2, layers, kinds, kv_heads, candidates]: context; question and reply.
    """
    split = [group.split("/") for group in groups]
    found = []
    for asking in (False, True):
        rows = [
            [row for row, (each, part, _) in enumerate(split)
             if each == kind and (part != CONTEXT) == asking]
            for kind in kinds_of(groups)
        ]  # fmt: skip
        found.append([errors[:, part].max(axis=1, initial=0.0) for part in rows])
    return np.stack([np.stack(each, axis=1) for each in found])


def relative_errors(sums: Sums) -> np.ndarray:
    """Squared errors over the layer's squared output: [layers, groups, kv_heads, candidates]."""
    return sums.error / np.maximum(sums.norm, 1e-30)[:, :, None, None]


def alone(masks: MaskSet, layer: int, head: int) -> MaskSet:
    """Masks under which some of a layer's KV heads are as they are, and all others are dense.

    Args:
        masks: the mask set.
        layer: global layer index.
        head: the KV head, or the number of KV heads for all of the layer's.

    Returns:
        The masks.
    """
    modes = np.full_like(masks.modes, HeadMode.DENSE)
    heads = slice(None) if head == masks.kv_heads else head
    modes[layer, heads] = masks.modes[layer, heads]
    return replace(masks, modes=modes)


def sensitivities(kls: np.ndarray, errors: np.ndarray, trust: float) -> np.ndarray:
    """KL per squared error: the probes' largest of a head alone, moved towards its layer's.

    Args:
        kls: [probes, ..., kv_heads + 1], mean KL that each probe causes, the one of all of a
            layer's heads together last.
        errors: [probes, ..., kv_heads], squared error of each head under the probe.
        trust: how far probes of whole layers count, 0 to 1, on a scale of ratios.

    Returns:
        float64 [..., kv_heads]; where no probe errs enough, the largest of all heads.
    """
    both = np.concatenate([errors, errors.sum(axis=-1, keepdims=True)], axis=-1)
    each = np.where(both > LEAST_ERROR, np.maximum(kls, 0) / np.maximum(both, LEAST_ERROR), -1.0)
    found = each.max(axis=0)
    single, layer = found[..., :-1], np.maximum(found[..., :-1], found[..., -1:])
    blended = np.maximum(single, 0) ** (1 - trust) * np.maximum(layer, 0) ** trust
    return np.where(single < 0, max(layer.max(), 0.0), blended)


def mean_kl(full: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(full || other) in nats of logits float32 [rows, vocabulary]."""
    first, second = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())
