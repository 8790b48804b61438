"""Generators of training sequences: questions of the three tasks, copying and plain text."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from dam_vllm.demo.training.corpus import Corpus
from dam_vllm.demo.training.keys import KINDS, make_keys, random_value
from dam_vllm.demo.training.sequences import Encoder, Sample, Sequence, finish
from dam_vllm.demo.training.tokenizer import ASSISTANT_ID, END_ID, USER_ID, VOCABULARY
from dam_vllm.evaluation.filler import sentence
from dam_vllm.evaluation.wordings import WORDINGS, Wording

# Loss weights. Nearly all of the loss stands on what must be retrieved.
_VALUE, _KEY, _END, _TEMPLATE, _TEXT, _NO_LOSS = 1.0, 0.5, 0.3, 0.03, 0.4, 0.0
_KIND_SHARES = (0.55, 0.15, 0.2, 0.1)
_LEAST_RECORDS = 3
# Longest header, record and question together, in tokens: shorter contexts go without header.
_ROOM_FOR_HEADER = 400
# From this token id on, tokens are words or parts of words rather than special or bytes.
_ORDINARY_TOKENS = 300


@dataclass(frozen=True)
class Generators:
    """Makes training sequences by name.

    Attributes:
        encode: Tokenises pieces of text.
        corpus: Natural text.
    """

    encode: Encoder
    corpus: Corpus

    def make(self, name: str, rng: Random, tokens: int) -> Sample:
        """Makes one training sequence.

        Args:
            name: ``"lines"``, ``"kv"``, ``"needle"``, ``"text"`` or ``"copy"``.
            rng: Source of randomness.
            tokens: Length of the model's input.

        Returns:
            A sample of ``tokens + 1`` tokens.
        """
        methods: dict[str, Callable[[Random, int], Sequence]] = {
            "lines": self._lines,
            "kv": self._kv,
            "needle": self._needle,
            "text": self._text,
            "copy": self._copy,
        }
        sequence = methods[name](rng, tokens)
        return finish(sequence, tokens, rng, gap_share=0.3 if name == "text" else 0.6)

    def _lines(self, rng: Random, tokens: int) -> Sequence:
        return self._records(rng, tokens, list(WORDINGS["lines"].values()))

    def _kv(self, rng: Random, tokens: int) -> Sequence:
        wordings = WORDINGS["kv"]
        if rng.random() < 0.25:
            return self._records(rng, tokens, [wordings["assignment"]])
        return self._records(
            rng, tokens, [wordings[name] for name in ("json", "question", "completion")]
        )

    def _records(self, rng: Random, tokens: int, wordings: list[Wording]) -> Sequence:
        """Records and many questions about them, at the end or in between."""
        kind = rng.choices(KINDS, _KIND_SHARES)[0]
        keys = make_keys(rng, kind, tokens // 10 + 4)
        facts = [(key, random_value(rng)) for key in keys]
        sequence = Sequence()
        if rng.random() < 0.35:
            self._ask_between(rng, tokens, wordings, facts, sequence)
            return sequence
        first, chat = rng.choice([w for w in wordings if not w.continues]), rng.random() < 0.5
        if chat:
            sequence.add((USER_ID,), _NO_LOSS)
        if tokens >= _ROOM_FOR_HEADER and rng.random() < 0.8:
            sequence.add(self.encode(first.header), _TEMPLATE)
        stored, records_end = 0, rng.uniform(0.35, 0.85) * tokens
        while len(sequence) < records_end or stored < _LEAST_RECORDS:
            self._store(sequence, first.record, *facts[stored])
            stored += 1
        sequence.add(self.encode(first.footer), _TEMPLATE)
        self._ask_all(rng, tokens, [first, *wordings], facts[:stored], sequence, chat)
        return sequence

    def _ask_between(
        self,
        rng: Random,
        tokens: int,
        wordings: list[Wording],
        facts: list[tuple[str, int]],
        sequence: Sequence,
    ) -> None:
        """Fills a sequence with records and, in between, questions about earlier ones."""
        stored, ask_share = 0, rng.uniform(0.25, 0.6)
        few = rng.sample(wordings, rng.choice([1, len(wordings)]))
        while len(sequence) <= tokens:
            if stored >= _LEAST_RECORDS and (stored == len(facts) or rng.random() < ask_share):
                self._ask(sequence, rng.choice(few), *facts[rng.randrange(stored)])
            else:
                self._store(sequence, wordings[0].record, *facts[stored])
                stored += 1

    def _needle(self, rng: Random, tokens: int) -> Sequence:
        """A few facts hidden in text, and questions about them at the end."""
        wordings = WORDINGS["needle"]
        names = ["ruler"] if rng.random() < 0.4 else ["question", "completion"]
        first, chat = wordings[names[0]], rng.random() < 0.5
        keys = make_keys(rng, rng.choices(KINDS, _KIND_SHARES)[0], rng.choice([1, 2, 4, 8, 12]))
        room = tokens - 40 * len(keys) - 40
        if room < 64:
            keys, room = keys[:1], max(32, tokens - 80)
        facts = [(key, random_value(rng)) for key in keys]
        lines = self._filler(rng, room)
        places = sorted(rng.randrange(len(lines) + 1) for _ in facts)
        sequence = Sequence()
        if chat:
            sequence.add((USER_ID,), _NO_LOSS)
        if tokens >= _ROOM_FOR_HEADER and rng.random() < 0.8:
            sequence.add(self.encode(first.header), _TEMPLATE)
        for at in range(len(lines) + 1):
            for place, fact in zip(places, facts, strict=True):
                if place == at:
                    self._store(sequence, first.record, *fact)
            if at < len(lines):
                sequence.add(lines[at], _TEXT)
        self._ask_all(rng, tokens, [wordings[name] for name in names], facts, sequence, chat)
        return sequence

    def _filler(self, rng: Random, tokens: int) -> list[list[int]]:
        if rng.random() < 0.5:
            return self.corpus.sample(rng, tokens)
        lines, filled = [], 0
        while filled < tokens:
            lines.append(list(self.encode(sentence(rng))))
            filled += len(lines[-1])
        return lines

    def _ask_all(
        self,
        rng: Random,
        tokens: int,
        wordings: list[Wording],
        facts: list[tuple[str, int]],
        sequence: Sequence,
        chat: bool,
    ) -> None:
        """Asks about all facts in random order, in the first wording first, until it is full."""
        if chat:
            wordings = [wording for wording in wordings if not wording.continues]
        wording, order = wordings[0], list[tuple[str, int]]()
        opened = True
        while len(sequence) <= tokens:
            order = order or rng.sample(facts, len(facts))
            if chat:
                self._turn(sequence, wording, *order.pop(), opened)
                opened = False
            else:
                self._ask(sequence, wording, *order.pop())
            wording = rng.choice(wordings)

    def _store(self, sequence: Sequence, record: str, key: str, value: int) -> None:
        for _, ids in self.encode.fill(record, key, value):
            sequence.add(ids, _TEMPLATE)
        sequence.joint()

    def _ask(self, sequence: Sequence, wording: Wording, key: str, value: int) -> None:
        """A question as plain text: the reply stands in a new line, or completes the line."""
        for _, ids in self.encode.fill(wording.question, key, value):
            sequence.add(ids, _TEMPLATE)
        if wording.continues:
            self._reply(sequence, wording, key, value)
        else:
            sequence.add(self.encode("\n"), _TEMPLATE)
            self._reply(sequence, wording, key, value)
            sequence.add((END_ID,), _END)
            sequence.add(self.encode("\n"), _NO_LOSS)
        sequence.joint()

    def _turn(
        self, sequence: Sequence, wording: Wording, key: str, value: int, opened: bool
    ) -> None:
        """A question and its reply as chat turns; the user's turn may be open already."""
        if not opened:
            sequence.add((USER_ID,), _NO_LOSS)
        question = wording.question if opened else wording.question.removeprefix("\n")
        for _, ids in self.encode.fill(question, key, value):
            sequence.add(ids, _TEMPLATE)
        sequence.add((END_ID, ASSISTANT_ID), _NO_LOSS)
        self._reply(sequence, wording, key, value)
        sequence.add((END_ID,), _END)
        sequence.joint()

    def _reply(self, sequence: Sequence, wording: Wording, key: str, value: int) -> None:
        weights = {"key": _KEY, "value": _VALUE, "text": _TEMPLATE}
        for what, ids in self.encode.fill(wording.reply, key, value):
            sequence.add(ids, weights[what])

    def _text(self, rng: Random, tokens: int) -> Sequence:
        sequence = Sequence()
        while len(sequence) <= tokens:
            for line in self.corpus.sample(rng, tokens + 300):
                sequence.add(line, _TEXT)
        return sequence

    def _copy(self, rng: Random, tokens: int) -> Sequence:
        """Random strings, each many times over: the densest signal for copying circuits."""
        alphabet = rng.sample(range(_ORDINARY_TOKENS, VOCABULARY), 600)
        sequence, known = Sequence(), list[list[int]]()
        while len(sequence) <= tokens:
            if not known or (rng.random() < 0.35 and len(known) < 12):
                known.append(rng.choices(alphabet, k=rng.randrange(5, 25)))
                sequence.add(known[-1], _NO_LOSS)
            else:
                string = rng.choice(known)
                sequence.add(string[:1], _NO_LOSS)
                sequence.add(string[1:], _VALUE)
        return sequence
