"""Random requests to a server, streamed or not, some cut short, and their answers."""

import asyncio
import json
from dataclasses import dataclass

import httpx
import numpy as np

NEW = 160


@dataclass(frozen=True)
class Request:
    """What is asked: token ids, and how many new ones."""

    prompt: list[int]
    new: int


@dataclass(frozen=True)
class Answer:
    """Tokens and their log-probabilities, as many as came."""

    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Way:
    """How a request is sent.

    Attributes:
        stream: token by token.
        tokens: after so many the connection is closed, or None.
        seconds: likewise, whatever has come.
    """

    stream: bool = False
    tokens: int | None = None
    seconds: float | None = None

    @property
    def whole(self):
        return self.tokens is None and self.seconds is None


def draw_requests(rng, count, longest):
    """Requests of 1 to `longest` tokens, the first of so many; half of them begin as others do."""
    starts = rng.integers(300, 2300, (3, longest))
    requests = [Request(rng.integers(300, 2300, longest).tolist(), NEW)]
    while len(requests) < count:
        short = rng.random() < 0.5
        length = int(np.exp(rng.uniform(0, np.log(longest)))) if short else rng.integers(1, longest)
        prompt = rng.integers(300, 2300, length)
        if rng.random() < 0.5:
            shared = int(rng.integers(0, length + 1))
            prompt[:shared] = starts[rng.integers(3), :shared]
        requests.append(Request(prompt.tolist(), int(rng.integers(1, NEW + 1))))
    return requests


def draw_filling(rng, count, length):
    """Requests of one length; what they generate takes most."""
    return [Request(rng.integers(300, 2300, length).tolist(), NEW) for _ in range(count)]


def draw_way(rng, request):
    """Streamed or not; about every sixth is cut, by then or somewhere."""
    kind = rng.random()
    if kind < 0.1:
        return Way(stream=True, tokens=int(rng.integers(1, request.new + 1)))
    if kind < 0.17:
        return Way(stream=bool(rng.random() < 0.5), seconds=float(rng.uniform(0, 1)))
    return Way(stream=bool(rng.random() < 0.5))


class Client:
    """Asks one server."""

    def __init__(self, url, model):
        self._model = model
        self._http = httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits())

    async def close(self):
        await self._http.aclose()

    async def ask(self, request, way):
        """The answer, as far as it came.

        Raises:
            httpx.HTTPError: if there is none.
        """
        answer = Answer([], [])
        try:
            async with asyncio.timeout(way.seconds):
                if way.stream:
                    await self._stream(request, way, answer)
                else:
                    await self._complete(request, answer)
        except TimeoutError:
            if way.seconds is None:
                raise
        return answer

    def _body(self, request, stream):
        return {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.new,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
            "stream": stream,
        }

    async def _complete(self, request, answer):
        reply = await self._http.post("/completions", json=self._body(request, False))
        reply.raise_for_status()
        take(reply.json()["choices"][0], answer)

    async def _stream(self, request, way, answer):
        body = self._body(request, True)
        async with self._http.stream("POST", "/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                told = line.removeprefix("data: ")
                if told and told != "[DONE]":
                    take(json.loads(told)["choices"][0], answer)
                if way.tokens is not None and len(answer.tokens) >= way.tokens:
                    return

    async def metrics(self):
        """vLLM's metrics by name, summed over their labels."""
        found = {}
        text = (
            await self._http.get(str(self._http.base_url).removesuffix("/v1/") + "/metrics")
        ).text
        for line in text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.split("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found


def take(choice, answer):
    """Adds what a reply or a part of it holds."""
    answer.tokens.extend(choice["token_ids"] or [])
    answer.logprobs.extend((choice["logprobs"] or {}).get("token_logprobs") or [])
