"""Training sequences: token ids with a weight for each token's loss and random positions."""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dam_vllm.demo.training.tokenizer import BOS_ID

MAX_POSITIONS = 8704

# A key takes the space before it along, since the tokenizer does.
_PLACES = re.compile(r"( ?\{key\}|\{value\})")


class Encoder:
    """Tokenises the pieces of questions one by one.

    Args:
        tokenizer: The demo model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = lru_cache(maxsize=300_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )

    def __call__(self, text: str) -> tuple[int, ...]:
        """Returns the token ids of a piece of text."""
        return self._encode(text)

    def fill(self, template: str, key: str, value: int) -> list[tuple[str, tuple[int, ...]]]:
        """Fills a template in and tokenises it.

        Args:
            template: Text with the places ``{key}`` and ``{value}``.
            key: Text for the key.
            value: Number for the value.

        Returns:
            Pairs of what a piece is (``"key"``, ``"value"`` or ``"text"``) and its token ids.
        """
        pieces = []
        for part in _PLACES.split(template):
            if part.endswith("{key}"):
                pieces.append(("key", self(part.replace("{key}", key))))
            elif part == "{value}":
                pieces.append(("value", self(str(value))))
            elif part:
                pieces.append(("text", self(part)))
        return pieces


@dataclass
class Sequence:
    """Token ids and loss weights under construction; BOS comes first.

    Attributes:
        ids: Token ids.
        weights: Weight of each token's own loss.
        joints: Indices at which the positions may jump.
    """

    ids: list[int] = field(default_factory=lambda: [BOS_ID])
    weights: list[float] = field(default_factory=lambda: [0.0])
    joints: list[int] = field(default_factory=lambda: [1])

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, ids: tuple[int, ...] | list[int], weight: float) -> None:
        """Appends tokens of one weight."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def joint(self) -> None:
        """Allows the positions to jump here."""
        self.joints.append(len(self.ids))


@dataclass(frozen=True)
class Sample:
    """A training sequence of ``tokens + 1`` tokens.

    Attributes:
        ids: Token ids, int64.
        weights: Weight of each token's own loss, float32.
        positions: Positions for the rotary embedding, int64, increasing from 0.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    positions: NDArray[np.int64]


def finish(sequence: Sequence, tokens: int, rng: Random, gap_share: float) -> Sample:
    """Cuts a sequence to length and draws its positions.

    Gaps in the positions teach short sequences the distances of long ones.

    Args:
        sequence: At least ``tokens + 1`` tokens.
        tokens: Length of the model's input.
        rng: Source of randomness.
        gap_share: Share of the sequences that get gaps, 0 to 1.

    Returns:
        The sample; its positions stay below ``MAX_POSITIONS``.
    """
    positions = np.arange(tokens + 1)
    if rng.random() < gap_share:
        room = int((MAX_POSITIONS - tokens - 1) * rng.random() ** 2)
        joints = [joint for joint in sequence.joints if joint < tokens]
        chosen = rng.sample(joints, min(len(joints), rng.choice([1, 2, 3, 6])))
        shares = [rng.expovariate(1.0) for _ in chosen]
        for joint, share in zip(chosen, shares, strict=True):
            positions[joint:] += int(room * share / sum(shares))
    return Sample(
        np.array(sequence.ids[: tokens + 1]),
        np.array(sequence.weights[: tokens + 1], dtype=np.float32),
        positions,
    )
