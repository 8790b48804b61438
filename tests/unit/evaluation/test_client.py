"""The client against a small HTTP server that speaks the parts of vLLM's API it uses."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dam_vllm.evaluation.client import HttpClient
from dam_vllm.server import ServerError, free_port

REFUSED = "What not?"
PAUSE = 0.2  # after the first part, which is empty


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/dam/density":
            return self._send(404, "text/plain", "not here")
        self.server.asked += 1
        told = {"prefill": {"read": 7 * self.server.asked, "dense": 20 * self.server.asked}}
        return self._send(200, "application/json", json.dumps(told))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        if "prompt_logprobs" in body:
            if body["prompt"] == [0]:
                return self._send(400, "text/plain", "too short")
            rows = [None, {"7": {"logprob": -0.5, "rank": 1, "decoded_token": "x"}}]
            reply = {"choices": [{"prompt_logprobs": rows}]}
            return self._send(200, "application/json", json.dumps(reply))
        if REFUSED in json.dumps(body):
            return self._send(500, "text/plain", "out of\norder")
        chat = "messages" in body
        parts = ["", "It is", " 12", "", "3."]
        chunks = [
            {"choices": [{"index": 0, **({"delta": {"content": p}} if chat else {"text": p})}]}
            for p in parts
        ]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in [*chunks, {"choices": []}]]
        lines.append("data: [DONE]\n\n")
        self._send(200, "text/event-stream", "".join(lines), pause_after=len(lines[0]))
        return None

    def _send(self, status, kind, text, pause_after=0):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[:pause_after].encode())
        time.sleep(PAUSE if pause_after else 0)
        self.wfile.write(text[pause_after:].encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.asked = [], 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client(server, chat):
    return HttpClient(f"http://127.0.0.1:{server.server_port}/v1", "a-model", chat)


@pytest.mark.parametrize("chat", [True, False])
def test_reply_is_joined_and_greedy(server, chat):
    reply = client(server, chat).ask("What?", 9)
    assert reply.text == "It is 123."
    assert PAUSE < reply.seconds < 60
    ((path, body),) = server.requests
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert (body["temperature"], body["max_tokens"], body["stream"]) == (0, 9, True)
    asked = body["messages"][0]["content"] if chat else body["prompt"]
    assert asked == "What?"
    assert body.get("chat_template_kwargs") == ({"enable_thinking": False} if chat else None)


def test_pages_are_those_since_the_last_call(server):
    asked = client(server, True)
    assert [asked.pages(), asked.pages(), asked.pages()] == [(7, 20)] * 3


def test_logprobs(server):
    found = client(server, True).logprobs([0, 7])
    assert found.actual.tolist() == [-0.5]
    assert server.requests[0][1]["max_tokens"] == 1


def test_errors_tell_the_answer(server):
    with pytest.raises(ServerError, match="answers 400: too short"):
        client(server, True).logprobs([0])


@pytest.mark.parametrize("chat", [True, False])
def test_a_server_that_refuses_or_is_gone_is_one_line(server, chat):
    refused = client(server, chat)
    for asked in (refused, HttpClient(f"http://127.0.0.1:{free_port()}/v1", "model", chat)):
        with pytest.raises(ServerError, match=r"^http://127.0.0.1:.*/v1: ") as error:
            asked.ask(REFUSED, 8)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ServerError):
        asked.pages()
