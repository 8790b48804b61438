"""Random keys and values of the retrieval records."""

from collections.abc import Callable
from random import Random

from dam_vllm.questions.words import ADJECTIVES, NOUNS

CONSONANTS, VOWELS = "bcdfghklmnprstvwz", "aeiou"
POOL_SIZES = (4, 8, 16, 32, 64, 128, 256)
KINDS = ("pair", "code", "number", "syllables")


def make_keys(rng: Random, kind: str, count: int) -> list[str]:
    """Draws distinct keys.

    Args:
        rng: source of randomness.
        kind: "pair" (adjective-noun, from small pools so that both words recur), "code"
            (letters and digits), "number", or "syllables" (an invented word).
        count: keys wanted.

    Returns:
        The keys, in random order.
    """
    makers = {"pair": _pairs, "code": _codes, "number": _numbers, "syllables": _words}
    return makers[kind](rng, count)


def make_value(rng: Random) -> int:
    """Draws a value: five digits mostly, sometimes three to seven."""
    if rng.random() < 0.8:
        return rng.randrange(10_000, 100_000)
    digits = rng.choice((3, 4, 6, 7))
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _pairs(rng: Random, count: int) -> list[str]:
    size = rng.choice([size for size in POOL_SIZES if size**2 >= 2 * count])
    adjectives = rng.sample(ADJECTIVES, min(size, len(ADJECTIVES)))
    nouns = rng.sample(NOUNS, min(size, len(NOUNS)))
    return _distinct(lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}", count)


def _codes(rng: Random, count: int) -> list[str]:
    return _distinct(
        lambda: (
            rng.choice(CONSONANTS) + "".join(rng.choices("0123456789abcdef", k=rng.randrange(4, 8)))
        ),
        count,
    )


def _numbers(rng: Random, count: int) -> list[str]:
    low = 10 ** max(3, len(str(count)))
    return [str(number) for number in rng.sample(range(low, 10 * low), count)]


def _words(rng: Random, count: int) -> list[str]:
    def word() -> str:
        parts = rng.randrange(3, 5)
        return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(parts))

    return _distinct(word, count)


def _distinct(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)
