"""Sentences without numbers, to hide needles in."""

from random import Random

from dam_vllm.evaluation.words import ADJECTIVES, NOUNS, VERBS


def sentence(rng: Random) -> str:
    r"""Makes one random sentence, a whole line.

    Args:
        rng: Source of randomness.

    Returns:
        A line such as ``"The able acorn found the warm harbor.\\n"``.
    """
    subject, thing = rng.choices(NOUNS, k=2)
    first, second = rng.choices(ADJECTIVES, k=2)
    return f"The {first} {subject} {rng.choice(VERBS)} the {second} {thing}.\n"
