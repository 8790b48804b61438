"""Lines, key-value pairs and needles: many numbers under their names, one of them asked for."""

from random import Random

from dam_vllm.questions.draft import Draft, Maker
from dam_vllm.questions.keys import make_keys
from dam_vllm.questions.wordings import Wording
from dam_vllm.questions.words import sentence

NEEDLES = 4
NUMBER = r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])"


def lookup(texts: Wording, keys: str) -> Maker:
    """Every record holds a number; the one at the depth is asked for.

    Args:
        texts: the wording.
        keys: one of `keys.KINDS`.

    Returns:
        The maker.
    """

    def make(rng: Random, count: int, depth: float) -> Draft:
        names = make_keys(rng, keys, count)
        values = _values(rng, count)
        records = [
            texts.record.format(key=key, value=value)
            for key, value in zip(names, values, strict=True)
        ]
        asked = min(count - 1, int(depth * count))
        return _draft(texts, records, asked, names[asked], values[asked])

    return make


def needle(texts: Wording, keys: str) -> Maker:
    """A few numbers hidden among sentences; the one at the depth is asked for (multi-key).

    Args:
        texts: the wording.
        keys: one of `keys.KINDS`.

    Returns:
        The maker.
    """

    def make(rng: Random, count: int, depth: float) -> Draft:
        names, values = make_keys(rng, keys, NEEDLES), _values(rng, NEEDLES)
        records = [sentence(rng) for _ in range(count)]
        asked = min(count - 1, int(depth * count))
        others = rng.sample([place for place in range(count) if place != asked], NEEDLES - 1)
        for place, key, value in zip([asked, *others], names, values, strict=True):
            records[place] = texts.record.format(key=key, value=value)
        return _draft(texts, records, asked, names[0], values[0])

    return make


def _values(rng: Random, count: int) -> list[int]:
    return rng.sample(range(10_000, 100_000), count)


def _draft(texts: Wording, records: list[str], asked: int, key: str, value: int) -> Draft:
    before = texts.header + "".join(records[:asked])
    after = "".join(records[asked:]) + texts.footer + texts.question.format(key=key)
    return Draft(before + after, (str(value),), NUMBER, (key,), len(before))
