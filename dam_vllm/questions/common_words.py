"""Common words (RULER, arXiv 2404.06654): the ten words that a numbered list repeats most."""

from random import Random

from dam_vllm.questions.draft import Draft, Maker
from dam_vllm.questions.keys import make_keys
from dam_vllm.questions.wordings import Wording
from dam_vllm.questions.words import ADJECTIVES, NOUNS, VERBS

COMMON = 10
OFTEN = 30  # RULER repeats common words 30 times and others 3 times
RATIO = 10


def common_words(texts: Wording) -> Maker:
    """A shuffled list; in short ones, where 300 common words would be most, all is scaled down.

    Args:
        texts: the wording.

    Returns:
        The maker. The answer has no place, so depth does not matter.
    """

    def make(rng: Random, count: int, depth: float) -> Draft:
        often = min(OFTEN, count // (2 * COMMON))
        seldom = max(1, often // RATIO)
        rest = count - COMMON * often
        words = _words(rng, COMMON - (-rest // seldom))
        common, others = words[:COMMON], words[COMMON:]
        entries = common * often + (others * seldom)[:rest]
        rng.shuffle(entries)
        listed = "".join(
            texts.record.format(key=number, value=word)
            for number, word in enumerate(entries, start=1)
        )
        prompt = texts.header + listed + texts.footer + texts.question.format(value=COMMON)
        return Draft(prompt, tuple(common), rf"(?i)\b(?:{'|'.join(words)})\b", (), None)

    return make


def _words(rng: Random, count: int) -> list[str]:
    """Distinct words: English ones, which the wordings do not use, and invented ones beyond."""
    words = list(dict.fromkeys(ADJECTIVES + NOUNS + VERBS))
    rng.shuffle(words)
    return words[:count] + make_keys(rng, "syllables", max(0, count - len(words)))
