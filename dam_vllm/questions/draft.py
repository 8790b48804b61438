"""What the makers of all tasks hand over: a prompt and what a right reply names."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Draft:
    """A question of a given number of records, whatever its length in tokens.

    Attributes:
        prompt: the user's text; the question stands at its end.
        answers: all that a right reply names.
        candidates: regular expression of what counts as named in a reply.
        given: names in the question itself, which a reply may restate.
        place: character of the prompt at which the last needed record begins, or None where
            the whole text is needed.
    """

    prompt: str
    answers: tuple[str, ...]
    candidates: str
    given: tuple[str, ...]
    place: int | None


# Makes a draft of (source of randomness, number of records, depth from 0 to 1).
Maker = Callable[[Random, int, float], Draft]
