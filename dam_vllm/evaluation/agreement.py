"""Agreement with full attention on a given text: perplexity, top-1, KL divergence.

A server tells the most likely tokens of each position only, and the text's own token. So the
divergence is an estimate from below: dense's known tokens are taken one by one and all others
as one bucket, and a probability that the masks' server did not tell counts with the most that
it can be.
"""

from typing import Any

import numpy as np

from dam_vllm.evaluation.client import TOP, Logprobs

FLOOR = 1e-6  # rounding of what float32 log-probabilities leave to the bucket
TINY = 1e-30


def text_windows(tokenizer: Any, text: str, length: int, count: int) -> list[list[int]]:
    """Cuts pieces out of a text, evenly spread and without overlap.

    Args:
        tokenizer: a transformers tokenizer.
        text: the text.
        length: tokens of a window, with the token that begins a text where there is one.
        count: windows wanted.

    Returns:
        Token ids; fewer windows where the text is too short for all, perhaps none.
    """
    first = tokenizer("").input_ids[:1]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = length - len(first)
    count = min(count, len(ids) // size)
    starts = [index * (len(ids) - size) // max(1, count - 1) for index in range(count)]
    return [first + ids[start : start + size] for start in starts]


def compare(dense: Logprobs, masks: Logprobs) -> dict[str, float]:
    """Compares two servers on one window.

    Args:
        dense: of full attention.
        masks: of the masks, on the same tokens.

    Returns:
        Means over positions: "nll" of the text under the masks, "top1" agreement, "kl" from
        dense in nats.
    """
    return {
        "nll": float(-masks.actual.mean(dtype=np.float64)),
        "top1": float((dense.tokens[:, 0] == masks.tokens[:, 0]).mean()),
        "kl": float(divergence(dense, masks).mean()),
    }


def divergence(dense: Logprobs, masks: Logprobs) -> np.ndarray:
    """KL(dense || masks) at each position, from below.

    Args:
        dense: of full attention.
        masks: of the masks, on the same tokens.

    Returns:
        float64 [n], in nats.
    """
    same = dense.tokens[:, :, None] == masks.tokens[:, None, :]
    found = np.where(same, np.exp(masks.told.astype(np.float64))[:, None], 0).max(axis=2)
    told = dense.tokens >= 0
    known = same.any(axis=2) & told
    p = np.where(told, np.exp(dense.told.astype(np.float64)), 0)
    # What the masks' server gives to all other tokens, hidden ones of dense's included.
    rest = np.maximum(1 - np.where(known, found, 0).sum(axis=1), FLOOR)
    most = np.minimum(np.exp(masks.told[:, TOP - 1].astype(np.float64)), rest)
    q = np.maximum(np.where(known, found, most[:, None]), TINY)
    left = 1 - p.sum(axis=1)
    inside = np.where(p > TINY, p * np.log(np.maximum(p, TINY) / q), 0).sum(axis=1)
    outside = np.where(left > FLOOR, left * np.log(np.maximum(left, FLOOR) / rest), 0)
    return np.asarray(np.maximum(inside + outside, 0))
