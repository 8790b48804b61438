"""The client's command line, its result file, and what is said where it fails."""

import json
import sys
from pathlib import Path

import pytest

from dam_vllm.bench.client import ClientError, Load, ask, figures
from dam_vllm.server import Server

LOAD = Load(tokens=1234, new=9, requests=6, concurrency=3, warm_ups=2)
# As vLLM 0.32 writes it, cut to what matters.
RESULT = {
    "completed": 6, "failed": 0, "request_throughput": 1.25, "errors": ["", "", "", "", "", ""],
    "mean_ttft_ms": 10.0, "median_ttft_ms": 9.0, "p99_ttft_ms": 20.0, "mean_tpot_ms": 5.0,
    "median_tpot_ms": 4.0, "median_itl_ms": 3.0,
}  # fmt: skip
# Stands in for `vllm`: keeps its arguments, says something, writes a result, ends.
FAKE = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
(here / "arguments").write_text(json.dumps(sys.argv[1:]))
given = dict(each[2:].split("=") for each in sys.argv[3:] if "=" in each)
print("x" * 9000, "the reason", flush=True)
if (here / "result").is_file():
    file = pathlib.Path(given["result-dir"], given["result-filename"])
    file.write_text((here / "result").read_text())
sys.exit(int((here / "status").read_text()))
"""


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path / "model")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Function that puts a client beside Python that writes a result and ends with a status."""

    def put(result, status):
        (tmp_path / "vllm").write_text(FAKE.format(python=sys.executable))
        (tmp_path / "vllm").chmod(0o755)
        (tmp_path / "status").write_text(str(status))
        if result is not None:
            (tmp_path / "result").write_text(json.dumps(result))

    monkeypatch.setattr("dam_vllm.bench.client.COMMAND", tmp_path / "vllm")
    return put


def test_figures_are_taken_from_the_result(server, fake, tmp_path):
    fake(RESULT, 0)
    found = ask(server, LOAD, seed=5)
    assert (found.ttft_mean, found.ttft, found.ttft_p99) == (10.0, 9.0, 20.0)
    assert (found.tpot, found.gap, found.requests_per_s) == (4.0, 3.0, 1.25)
    asked = json.loads((tmp_path / "arguments").read_text())
    assert asked[:2] == ["bench", "serve"]
    for option in (
        f"--base-url=http://127.0.0.1:{server.port}", f"--model={tmp_path / 'model'}",
        "--random-input-len=1234", "--random-output-len=9", "--num-prompts=6", "--seed=5",
        "--max-concurrency=3", "--num-warmups=2", "--ignore-eos", "--save-result",
    ):  # fmt: skip
        assert option in asked


def test_a_client_that_fails_is_told_in_a_line_that_names_its_output(server, fake):
    fake(None, 3)
    told = r"^vllm bench serve ended with 3: x+ the reason \(its whole output: .*\)$"
    with pytest.raises(ClientError, match=told) as error:
        ask(server, LOAD, 0)
    assert len(str(error.value)) < 700
    log = Path(str(error.value).split("output: ")[1].removesuffix(")"))
    assert log.read_text().endswith("x" * 9000 + " the reason\n")


def test_a_client_without_result_is_told(server, fake):
    fake(None, 0)
    with pytest.raises(ClientError, match="ended with 0"):
        ask(server, LOAD, 0)


def test_a_missing_client_is_told(server, monkeypatch, tmp_path):
    monkeypatch.setattr("dam_vllm.bench.client.COMMAND", tmp_path / "gone")
    with pytest.raises(ClientError, match=r"vllm bench serve cannot be started: .*gone"):
        ask(server, LOAD, 0)


def test_requests_that_failed_are_no_figures():
    errors = ["", "Traceback:\n...\nBad Request: too long\n"]
    result = RESULT | {"completed": 5, "failed": 1, "errors": errors}
    with pytest.raises(ClientError, match=r"5 of 6 requests of 1234 tokens.*ed: Bad.*too long$"):
        figures(result, LOAD)
    with pytest.raises(ClientError, match="5 of 6 requests"):
        figures(RESULT | {"completed": 5}, LOAD)


def test_where_requests_fail_the_servers_log_is_named(server, fake):
    fake(RESULT | {"completed": 0, "errors": ["gone"]}, 0)
    with pytest.raises(ClientError, match=r"0 of 6 .*: gone; the server's log: ") as error:
        ask(server, LOAD, 0)
    assert str(server.log) in str(error.value)


def test_a_figure_that_lacks_is_named():
    result = {name: value for name, value in RESULT.items() if name != "p99_ttft_ms"}
    with pytest.raises(ClientError, match="gave no p99_ttft_ms in"):
        figures(result, LOAD)
