"""Asks every subject every question, one server at a time, and stores each answer at once."""

import statistics
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from dam_vllm.evaluation.agreement import compare, text_windows
from dam_vllm.evaluation.client import Client
from dam_vllm.evaluation.equal_density import SINKS, TOLERANCE, equal_window
from dam_vllm.evaluation.results import page_density
from dam_vllm.evaluation.settings import REPLY_TOKENS, STOCK, TEXT, Key, Place, Settings, Subject
from dam_vllm.evaluation.state import State
from dam_vllm.evaluation.subjects import Start
from dam_vllm.masks.baselines import streaming
from dam_vllm.questions.prompting import prompting
from dam_vllm.questions.tasks import Question, is_correct, make_questions

Progress = Callable[[str, int, int], None]


class Evaluation:
    """One evaluation; what its state already holds is not asked again.

    Args:
        settings: what to ask.
        tokenizer: the model's.
        state: where answers go.
        start: starts a subject's server.
        progress: told the subject, the requests done and all that there are.
    """

    def __init__(
        self, settings: Settings, tokenizer: Any, state: State, start: Start, progress: Progress
    ) -> None:
        self.settings, self.tokenizer, self.state = settings, tokenizer, state
        self.start, self.progress = start, progress
        self._prompting = prompting(tokenizer, settings.completion)
        self._questions = cache(self._make_questions)
        self._windows = cache(self._make_windows)
        self._done = self._total = 0

    def run(self, masks: Sequence[Subject]) -> list[Place]:
        """Measures what is still open.

        Args:
            masks: mask files; stock vLLM is always asked too, and first.

        Returns:
            All that was measured: dense, each mask file, each one's streaming peers.
        """
        lengths = self.settings.lengths
        compared = masks if self.settings.streaming else []
        self._total = (1 + len(masks) + len(compared)) * len(lengths) * self.settings.steps
        places: list[Place] = []
        for subject in (STOCK, *masks):
            places += self._measure(subject, lengths)
        for subject in compared:
            for length in lengths:
                peer = self._peer(subject, length)
                if peer is None:
                    self._total -= self.settings.steps
                else:
                    places += self._measure(peer, [length])
        return places

    def _peer(self, subject: Subject, length: int) -> Subject | None:
        """Sinks and a window of the density just measured; None where that is full."""
        settings = self.settings
        keys = settings.keys(subject.key, length)
        records = [self.state[key] for key in keys if key[1] != TEXT]
        wanted = page_density(records)
        if wanted >= 1 - TOLERANCE:
            return None
        tokens = int(statistics.median(record["tokens"] for record in records))
        window = equal_window(settings.model, wanted, tokens, settings.page, settings.dense_below)
        masks = streaming(settings.model, SINKS, window)
        return Subject(f"streaming@{subject.name}", f"streaming-{window}", masks)

    def _measure(self, subject: Subject, lengths: Sequence[int]) -> list[Place]:
        """Starts the subject's server if anything is open."""
        opened = {
            length: [k for k in self.settings.keys(subject.key, length) if k not in self.state]
            for length in lengths
        }
        left = sum(map(len, opened.values()))
        self._advance(subject, self.settings.steps * len(lengths) - left)
        if left:
            with self.start(subject) as client:
                for keys in opened.values():
                    self._measure_length(client, subject, keys)
        return [Place(subject, length) for length in lengths]

    def _measure_length(self, client: Client, subject: Subject, keys: list[Key]) -> None:
        """Answers one length's open keys, after one question that does not count."""
        for key in [key for key in keys if key[1] != TEXT][:1]:
            self._ask(client, key)
        if subject.masks is not None:
            client.pages()
        for key in keys:
            record = self._read(client, key) if key[1] == TEXT else self._ask(client, key)
            if subject.masks is not None:
                record["read"], record["dense"] = client.pages()
            self.state.add(key, record)
            self._advance(subject, 1)

    def _ask(self, client: Client, key: Key) -> dict[str, Any]:
        _, task, length, index = key
        question = self._questions(task, length)[index]
        reply = client.ask(question.prompt, REPLY_TOKENS[task])
        return {
            "right": is_correct(question, reply.text),
            "seconds": reply.seconds,
            "tokens": question.tokens + self._prompting.overhead,
            "depth": question.depth,
            "reply": reply.text,
        }

    def _read(self, client: Client, key: Key) -> dict[str, Any]:
        subject, _, length, index = key
        name = f"{STOCK.key}-{length}-{index}"
        found = client.logprobs(self._windows(length)[index])
        if subject == STOCK.key:
            self.state.add_logprobs(name, found)
        return dict(compare(self.state.logprobs(name), found))

    def _advance(self, subject: Subject, requests: int) -> None:
        self._done += requests
        self.progress(subject.name, self._done, self._total)

    def _make_questions(self, task: str, length: int) -> list[Question]:
        samples, seed = self.settings.samples, self.settings.seed
        tokens = length - self._prompting.overhead
        wording = self._prompting.wording
        keys = self.settings.record_keys
        return make_questions(task, self.tokenizer, tokens, samples, seed, wording, keys)

    def _make_windows(self, length: int) -> list[list[int]]:
        assert self.settings.text is not None
        return text_windows(self.tokenizer, self.settings.text, length, self.settings.windows)
