"""Random names for records, of several kinds, and random values."""

from random import Random

from dam_vllm.evaluation.words import ADJECTIVES, NOUNS

KINDS = ("pair", "invented", "identifier", "number")

_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")
_CODAS = ("", "", "l", "n", "r", "s", "x", "th")


def make_keys(rng: Random, kind: str, count: int) -> list[str]:
    """Makes distinct keys.

    Args:
        rng: Source of randomness.
        kind: ``"pair"`` (adjective and noun, three tokens), ``"invented"`` (words of several
            tokens), ``"identifier"`` (letters and digits) or ``"number"``.
        count: How many keys; at most 30,000.

    Returns:
        The keys in random order.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
    if kind == "pair":
        return _pairs(rng, ADJECTIVES, NOUNS, count)
    if kind == "invented":
        if rng.random() < 0.5:
            return _distinct(rng, _invented, count)
        words = list(dict.fromkeys(_invented(rng) for _ in range(600)))[:512]
        return _pairs(rng, words[:256], words[256:], count)
    return _distinct(rng, _identifier if kind == "identifier" else _number, count)


def random_value(rng: Random) -> int:
    """Draws a value of one to five digits, five in most cases."""
    return rng.randrange(10000, 100000) if rng.random() < 0.8 else rng.randrange(1, 50000)


def _pairs(rng: Random, firsts, seconds, count: int) -> list[str]:
    """Pairs words of small pools, so that many keys share a word with another."""
    pool = rng.choice([4, 8, 16, 32, 64, 128, 256, 256])
    while pool * pool < 2 * count or pool * pool < 12:
        pool *= 2
    first_pool = rng.sample(firsts, min(pool, len(firsts)))
    second_pool = rng.sample(seconds, min(pool, len(seconds)))
    return _distinct(rng, lambda r: f"{r.choice(first_pool)}-{r.choice(second_pool)}", count)


def _distinct(rng: Random, draw, count: int) -> list[str]:
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[draw(rng)] = None
    return list(keys)


def _invented(rng: Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.choice([2, 3]))) + rng.choice(_CODAS)


def _identifier(rng: Random) -> str:
    alphabet = "0123456789abcdef" if rng.random() < 0.5 else "0123456789abcdefghijklmnopqrstuvwxyz"
    return "".join(rng.choices(alphabet, k=rng.choice([5, 6, 8])))


def _number(rng: Random) -> str:
    return str(rng.randrange(1000, 10 ** rng.choice([5, 6])))
