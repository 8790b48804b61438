"""Training texts: retrieval asked in many wordings, plain text, repeated strings.

A sample is a list of segments, each a text with the weight of its tokens in the loss. The
whole text is tokenised at once, so that training sees exactly what a user's text becomes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np
from tokenizers import Tokenizer

from dam_vllm.demo.training.tokenizer import BOS
from dam_vllm.questions.keys import make_keys, make_value
from dam_vllm.questions.wordings import WORDINGS, Wording
from dam_vllm.questions.words import ADJECTIVES, NOUNS, sentence

TEMPLATE, REPLY, VALUE, FILLER, TEXT = 0.03, 0.3, 1.0, 0.3, 0.5
KINDS = ("lines", "kv", "needle", "text", "copy")
KEY_SHARES = {"pair": 0.55, "code": 0.15, "number": 0.15, "syllables": 0.15}
MAX_POSITIONS = 8960
CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class Sample:
    """One training sequence of n + 1 tokens.

    Attributes:
        ids: int64 [n + 1].
        weights: float32 [n + 1], weight of each token as a target.
        positions: int64 [n + 1], with random gaps between records.
    """

    ids: np.ndarray
    weights: np.ndarray
    positions: np.ndarray


class Writer:
    """Collects segments and counts their tokens roughly."""

    def __init__(self, tokenizer: Tokenizer, tokens: int) -> None:
        self.tokenizer, self.limit = tokenizer, tokens + 1
        self.segments: list[tuple[str, float]] = []
        self.cuts: list[int] = []
        self.tokens = 1

    @property
    def full(self) -> bool:
        return self.tokens >= self.limit

    def add(self, text: str, weight: float = TEMPLATE) -> None:
        if text:
            self.segments.append((text, weight))
            self.tokens += len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def cut(self) -> None:
        """Starts a piece that is tokenised on its own, as a reply is to a user's prompt."""
        self.cuts.append(len(self.segments))

    def encode(self) -> tuple[list[int], list[int]]:
        """Token ids, and for each the index of the segment that its last character is in."""
        ids, owner = [BOS], [0]
        bounds = [0, *self.cuts, len(self.segments)]
        for first, last in pairwise(bounds):
            texts = [text for text, _ in self.segments[first:last]]
            encoding = self.tokenizer.encode("".join(texts), add_special_tokens=False)
            ends = np.cumsum([len(text) for text in texts])
            final = np.array([stop - 1 for _, stop in encoding.offsets])
            ids += encoding.ids
            owner += (first + np.searchsorted(ends, final, side="right")).tolist()
        return ids, owner

    def ask(self, wording: Wording, key: str, value: int, chat: bool, first: bool) -> None:
        """Adds a question and its reply; in a chat, as a turn of its own."""
        question = wording.question.format(key=key)
        before, after = wording.reply.format(key=key, value="\0").split("\0")
        if chat:
            self.add(question if first else "<|user|>\n" + question.lstrip("\n"))
            self.add("<|end|>\n<|assistant|>\n", 0.0)
            self.add(before, REPLY)
            self.add(str(value), VALUE)
            self.add(after + "<|end|>", REPLY)
            self.add("\n")
        else:
            self.add(question)
            self.cut()
            self.add(before if wording.continues else "\n" + before, REPLY)
            self.add(str(value), VALUE)
            self.add(after if wording.continues else after + "<|end|>", REPLY)


class Samples:
    """Draws samples.

    Args:
        tokenizer: the demo model's tokenizer.
        sources: plain texts.
        rng: source of randomness.
    """

    def __init__(self, tokenizer: Tokenizer, sources: list[str], rng: Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.source = "\n".join(sources)

    def draw(self, kind: str, tokens: int) -> Sample:
        """Draws one sample of a kind in `KINDS` with `tokens` + 1 tokens."""
        writer = Writer(self.tokenizer, tokens)
        fill: dict[str, Callable[[Writer], None]] = {"text": self._text, "copy": self._copy}
        if kind in fill:
            fill[kind](writer)
        elif kind == "needle":
            self._needle(writer)
        else:
            self._records(writer, kind)
        return self._finish(writer, tokens, kind)

    def _records(self, writer: Writer, task: str) -> None:
        rng = self.rng
        wording, chat = self._style(task)
        count = writer.limit // 8 + 8
        keys = make_keys(rng, self._key_kind(), count)
        values = [make_value(rng) for _ in keys]
        interleaved = not chat and rng.random() < 0.4
        writer.add(("<|user|>\n" if chat else "") + (wording.header if writer.limit > 400 else ""))
        share = rng.uniform(0.3, 0.6) if interleaved else 0.0
        stop = writer.limit * (1.0 if interleaved else rng.uniform(0.3, 0.85))
        known = 0
        while writer.tokens < stop and known < count:
            if known >= 3 and rng.random() < share:
                index = rng.randrange(known)
                writer.ask(wording, keys[index], values[index], False, False)
            else:
                writer.add(wording.record.format(key=keys[known], value=values[known]))
                known += 1
        writer.add(wording.footer)
        self._ask_all(writer, wording, keys[:known], values, chat)

    def _needle(self, writer: Writer) -> None:
        rng = self.rng
        wording, chat = self._style("needle")
        keys = make_keys(rng, self._key_kind(), rng.choice([1, 2, 4, 8, 12]))
        values = [make_value(rng) for _ in keys]
        writer.add(("<|user|>\n" if chat else "") + (wording.header if writer.limit > 400 else ""))
        room = max(0.3, 0.95 - len(keys) * 40 / writer.limit) * writer.limit
        places = sorted(rng.uniform(0, room) for _ in keys)
        code = rng.random() < 0.5
        for place, key, value in zip(places, keys, values, strict=True):
            self._filler(writer, place, code)
            writer.add(wording.record.format(key=key, value=value))
        self._filler(writer, room, code)
        writer.add(wording.footer)
        self._ask_all(writer, wording, keys, values, chat)

    def _filler(self, writer: Writer, stop: float, code: bool) -> None:
        if code and writer.tokens < stop:
            size = int((stop - writer.tokens) * 3.2)
            start = self.rng.randrange(len(self.source) - size)
            writer.add(self.source[start : start + size] + "\n", FILLER)
        while writer.tokens < stop and not code:
            writer.add(sentence(self.rng), TEMPLATE)

    def _ask_all(
        self, writer: Writer, wording: Wording, keys: list[str], values: list[int], chat: bool
    ) -> None:
        order: list[int] = []
        first = True
        while not writer.full:
            order = order or self.rng.sample(range(len(keys)), len(keys))
            index = order.pop()
            writer.ask(wording, keys[index], values[index], chat, first)
            first = False

    def _text(self, writer: Writer) -> None:
        size = writer.limit * CHARACTERS_A_TOKEN
        start = self.rng.randrange(max(1, len(self.source) - size))
        writer.add(self.source[start : start + size], TEXT)

    def _copy(self, writer: Writer) -> None:
        """Random words and numbers, repeated: the densest signal for matching contexts."""
        rng = self.rng
        pools = [ADJECTIVES, NOUNS, tuple(f"{number:02d}" for number in range(100))]
        seen: list[list[str]] = []
        while not writer.full:
            if not seen or (rng.random() < 0.35 and len(seen) < 12):
                pool = rng.choice([*pools, sum(pools, ())])
                seen.append([" " + w for w in rng.choices(pool, k=rng.randrange(5, 25))])
                writer.add("".join(seen[-1]), 0.0)
            else:
                chosen = rng.choice(seen)
                writer.add(chosen[0], 0.0)
                writer.add("".join(chosen[1:]), VALUE)

    def _style(self, task: str) -> tuple[Wording, bool]:
        wordings = list(WORDINGS[task].values())
        wording = self.rng.choice(wordings)
        return wording, not wording.continues and self.rng.random() < 0.5

    def _key_kind(self) -> str:
        return self.rng.choices(list(KEY_SHARES), list(KEY_SHARES.values()))[0]

    def _finish(self, writer: Writer, tokens: int, kind: str) -> Sample:
        ids, owner = (np.array(part[: tokens + 1]) for part in writer.encode())
        weights = np.array([weight for _, weight in writer.segments], np.float32)[owner]
        weights[0] = 0
        padding = tokens + 1 - len(ids)
        return Sample(
            ids=np.pad(ids, (0, padding), constant_values=BOS),
            weights=np.pad(weights, (0, padding)),
            positions=self._positions(tokens, kind, np.pad(owner, (0, padding), mode="edge")),
        )

    def _positions(self, tokens: int, kind: str, segment: np.ndarray) -> np.ndarray:
        """Positions with a few random gaps at segment starts, so that all distances are met."""
        rng = self.rng
        positions = np.arange(tokens + 1)
        starts = np.flatnonzero(np.diff(segment)) + 1
        if tokens >= 8000 or len(starts) == 0 or rng.random() > (0.3 if kind == "text" else 0.6):
            return positions
        total = int((MAX_POSITIONS - 1 - tokens) * rng.random() ** 2)
        places = rng.sample(list(starts), min(len(starts), rng.choice([1, 2, 3, 6])))
        for place in places:
            positions[place:] += total // len(places)
        return positions
