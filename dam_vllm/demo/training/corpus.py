"""Natural text: the source code of Python's standard library, without blank lines."""

import sysconfig
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_LEFT_OUT = ("test", "tests", "site-packages", "idlelib", "lib2to3", "encodings")
_SHORTEST = 2000


def read_standard_library() -> list[str]:
    """Reads the ASCII modules of the running Python's standard library.

    Returns:
        One text a module, sorted by path, each line ending in a newline, none blank.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(folder.rglob("*.py")):
        if any(part in _LEFT_OUT for part in path.relative_to(folder).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.isascii() and len(text) >= _SHORTEST:
            lines = (line.rstrip() for line in text.splitlines())
            texts.append("".join(line + "\n" for line in lines if line))
    return texts


class Corpus:
    """Tokenised lines of text, to be sampled in runs.

    Args:
        texts: Texts without blank lines.
        tokenizer: The demo model's tokenizer.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer) -> None:
        lines = [line for text in texts for line in text.splitlines(keepends=True)]
        encodings = tokenizer.encode_batch_fast(lines, add_special_tokens=False)
        self._lines: list[NDArray[np.int32]] = [
            np.array(encoding.ids, dtype=np.int32) for encoding in encodings
        ]

    def sample(self, rng: Random, tokens: int) -> list[list[int]]:
        """Takes consecutive lines from a random place.

        Args:
            rng: Source of randomness.
            tokens: How many tokens to fill at most.

        Returns:
            The token ids of each line.
        """
        at = rng.randrange(len(self._lines))
        lines, filled = [], 0
        while True:
            line = self._lines[at % len(self._lines)]
            filled += len(line)
            if filled > tokens:
                return lines
            lines.append(line.tolist())
            at += 1
