"""Variable tracking (RULER, arXiv 2404.06654): chains of assignments hidden among sentences."""

from random import Random

from dam_vllm.questions.draft import Draft, Maker
from dam_vllm.questions.wordings import Wording
from dam_vllm.questions.words import sentence

CHAINS, HOPS = 2, 4
NAME = r"(?<!\w)[A-Z]{5}(?!\w)"


def tracking(texts: Wording) -> Maker:
    """A number is assigned to a variable, that to a next one, and so on: all are asked for.

    A second chain with another number is there to be left out. The last link of the asked one
    lies at the depth, the others anywhere before it.

    Args:
        texts: the wording.

    Returns:
        The maker.
    """

    def make(rng: Random, count: int, depth: float) -> Draft:
        links = HOPS + 1
        names, values = _names(rng, CHAINS * links), rng.sample(range(10_000, 100_000), CHAINS)
        last = min(count - 1, max(HOPS, int(depth * count)))
        places = [*sorted(rng.sample(range(last), HOPS)), last]
        free = [place for place in range(count) if place not in places]
        records = [sentence(rng) for _ in range(count)]
        for chain, value in enumerate(values):
            own = names[chain * links : (chain + 1) * links]
            at = sorted(rng.sample(free, links)) if chain else places
            for place, record in zip(at, _chain(texts, own, value), strict=True):
                records[place] = record
        before = texts.header + "".join(records[:last])
        question = texts.question.format(key=values[0], value=links)
        after = "".join(records[last:]) + texts.footer + question
        return Draft(before + after, tuple(names[:links]), NAME, (), len(before))

    return make


def _chain(texts: Wording, names: list[str], value: int) -> list[str]:
    sources = [str(value), *(f"VAR {name}" for name in names)]
    return [
        texts.record.format(key=name, value=source)
        for name, source in zip(names, sources, strict=False)
    ]


def _names(rng: Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5))] = None
    return list(found)
