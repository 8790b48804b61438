"""How `dam-vllm` ends where something fails."""

import os
import signal

import pytest

from dam_vllm.bench.client import ClientError
from dam_vllm.cli import main
from dam_vllm.options import OptionError
from dam_vllm.server import ServerError


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "status"),
    [(OptionError("why"), 2), (ServerError("why"), 1), (ClientError("why"), 1)],
)
def test_errors_are_told_in_one_message(monkeypatch, capsys, error, status):
    def fails():
        raise error

    monkeypatch.setattr(main, "app", fails)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == status
    assert capsys.readouterr().err == "Error: why\n"


def test_a_signal_to_end_stops_what_was_started(monkeypatch):
    stopped = []

    def runs():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            stopped.append("server")

    monkeypatch.setattr(main, "app", runs)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 143
    assert stopped == ["server"]
