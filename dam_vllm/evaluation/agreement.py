"""Agreement with full attention on a given text: perplexity, top-1, KL divergence.

A server tells the most likely tokens of each position only, and the text's own token. So the
divergence is an estimate from below, the least one that what was told allows: tokens that dense
told count one by one and all others as one bucket; where the masks' server did not tell one of
the former, it gave it no more than the last that it told, and what it gave in all to tokens it
did not tell is split so that it costs least.
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
    told = dense.tokens >= 0
    known = same.any(axis=2) & told
    p = np.where(told, np.exp(dense.told.astype(np.float64)), 0)
    q = np.where(same, np.exp(masks.told.astype(np.float64))[:, None], 0).max(axis=2)
    rest = np.maximum(1 - np.where(known, q, 0).sum(axis=1), FLOOR)
    left = np.maximum(1 - p.sum(axis=1), FLOOR)
    most = np.exp(masks.told[:, TOP - 1].astype(np.float64))
    hidden, scale = _split(np.where(known, 0, p), left, rest, most)
    q = np.maximum(np.where(known, q, hidden), TINY)
    inside = (p * np.log(np.maximum(p, TINY) / q)).sum(axis=1)
    return np.asarray(np.maximum(inside - left * np.log(scale), 0))


def _split(
    p: np.ndarray, left: np.ndarray, rest: np.ndarray, most: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Splits `rest` over hidden tokens in proportion to p, up to `most` each, and the bucket.

    Args:
        p: [n, tokens], dense's probability of hidden tokens, else 0.
        left: [n], its probability of the bucket.
        rest: [n], what there is to split.
        most: [n], the most that a hidden token can have.

    Returns:
        [n, tokens], the share of each hidden token, and [n], the bucket's share over `left`.
    """
    capped = np.zeros(p.shape, dtype=bool)
    while True:
        free = np.where(capped, 0, p)
        spent = np.maximum(rest - most * capped.sum(axis=1), TINY)
        scale = spent / (left + free.sum(axis=1))
        over = free * scale[:, None] > most[:, None]
        if not over.any():
            return np.where(capped, most[:, None], free * scale[:, None]), scale
        capped |= over
