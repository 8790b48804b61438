"""Asks a running server: replies with the time to their first token, log-probabilities, pages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dam_vllm.questions.prompting import TEMPLATE_OPTIONS
from dam_vllm.server import SHOWN, ServerError

TOP = 20  # vLLM's own limit (--max-logprobs)
TIMEOUT = 3600.0


@dataclass(frozen=True)
class Reply:
    """A reply and the seconds until its first token."""

    text: str
    seconds: float


@dataclass(frozen=True)
class Logprobs:
    """What a model gives to the tokens of a text, from the second token on.

    Attributes:
        actual: float32 [n], of the text's own tokens.
        tokens: int32 [n, TOP + 1], the most likely tokens, best first, then the text's own one
            where it is not among them; -1 where there is no more.
        told: float32 [n, TOP + 1], theirs; minus infinity for -1.
    """

    actual: np.ndarray
    tokens: np.ndarray
    told: np.ndarray


class Client(Protocol):
    """One server under evaluation."""

    def ask(self, prompt: str, tokens: int) -> Reply:
        """Greedy reply of at most `tokens` tokens."""

    def logprobs(self, ids: list[int]) -> Logprobs:
        """Log-probabilities of a text given as token ids."""

    def pages(self) -> tuple[int, int]:
        """Pages that prefills read, and that dense ones would have, since the last call."""


class HttpClient:
    """A `vllm serve` on this machine.

    Args:
        url: base of its API, ending in "/v1".
        model: name that it knows its model by.
        chat: whether questions go through the chat endpoint.

    All that asks raises ServerError where the server refuses or is gone.
    """

    def __init__(self, url: str, model: str, chat: bool) -> None:
        from openai import OpenAI

        self.url, self.model, self.chat = url, model, chat
        self._pages = (0, 0)
        self._openai = OpenAI(base_url=url, api_key="-", timeout=TIMEOUT, max_retries=0)

    def ask(self, prompt: str, tokens: int) -> Reply:
        """See `Client`."""
        began = time.perf_counter()
        first, text = 0.0, ""
        with self._errors():
            for part in self._chat(prompt, tokens) if self.chat else self._complete(prompt, tokens):
                if part:
                    first = first or time.perf_counter() - began
                    text += part
        return Reply(text, first or time.perf_counter() - began)

    def _chat(self, prompt: str, tokens: int) -> Any:
        stream = self._openai.chat.completions.create(
            model=self.model,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"chat_template_kwargs": TEMPLATE_OPTIONS},
        )
        return (part.choices[0].delta.content for part in stream if part.choices)

    def _complete(self, prompt: str, tokens: int) -> Any:
        stream = self._openai.completions.create(
            model=self.model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True
        )
        return (part.choices[0].text for part in stream if part.choices)

    def logprobs(self, ids: list[int]) -> Logprobs:
        """See `Client`."""
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP}
        reply = self._ask("POST", f"{self.url}/completions", {"model": self.model, **body})
        return read_logprobs(ids, reply["choices"][0]["prompt_logprobs"])

    def pages(self) -> tuple[int, int]:
        """See `Client`; the server needs the endpoint."""
        told = self._ask("GET", f"{self.url.removesuffix('/v1')}/dam/density")["prefill"]
        before, self._pages = self._pages, (told["read"], told["dense"])
        return told["read"] - before[0], told["dense"] - before[1]

    def _ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        import httpx

        with self._errors():
            reply = httpx.request(method, url, json=body, timeout=TIMEOUT)
        if reply.is_error:
            raise ServerError(f"{url} answers {reply.status_code}: {_line(reply.text)}")
        return reply.json()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Tells what either of the two clients raises as our own error."""
        import httpx
        from openai import OpenAIError

        try:
            yield
        except (httpx.HTTPError, OpenAIError) as error:
            raise ServerError(f"{self.url}: {_line(str(error))}") from error


def _line(text: str) -> str:
    return " ".join(text.split())[:SHOWN]


def read_logprobs(ids: list[int], positions: list[dict[str, dict[str, Any]] | None]) -> Logprobs:
    """Reads vLLM's `prompt_logprobs`.

    Args:
        ids: the text's tokens.
        positions: for each of them the likely tokens by id, with "logprob"; the text's
            own token is among them however unlikely. The first one has none.

    Returns:
        Arrays over all tokens but the first.
    """
    count = len(ids) - 1
    actual = np.empty(count, np.float32)
    tokens = np.full((count, TOP + 1), -1, np.int32)
    told = np.full((count, TOP + 1), -np.inf, np.float32)
    for row, (own, entry) in enumerate(zip(ids[1:], positions[1:], strict=True)):
        assert entry is not None
        actual[row] = entry[str(own)]["logprob"]
        # Ties go by token, so that two servers break them alike.
        likely = sorted((-item["logprob"], int(token)) for token, item in entry.items())
        for column, (loss, token) in enumerate(likely):
            tokens[row, column], told[row, column] = token, -loss
    return Logprobs(actual, tokens, told)
