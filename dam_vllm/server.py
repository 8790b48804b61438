"""Starts `vllm serve` as a child process, for the demo, the evaluation, benchmarks and tests."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

# An idle engine polls for a second (vllm/distributed/device_communicators/shm_broadcast.py) and
# takes the cores from a server that is asked next.
POLLING = 1.3
SHOWN = 500  # characters of a program's last line


class ServerError(RuntimeError):
    """vLLM did not start, ended or refused; one line, which names its whole log if any."""


class Server:
    """A running `vllm serve`, as a context manager.

    Args:
        model: folder or Hub id.
        arguments: further command-line arguments.
        environment: variables added to this process's own.
        timeout: seconds until it must be ready.

    Attributes:
        url: base of the OpenAI-compatible API, ending in "/v1".
        log: path of the server's output.
    """

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        timeout: float = 300.0,
    ) -> None:
        self.model, self.timeout = str(model), timeout
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        command = Path(sys.executable).parent / "vllm"
        self._command = [str(command), "serve", self.model, "--host", "127.0.0.1"]
        self._command += ["--port", str(self.port), *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self.log = _new_log()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def output(self) -> str:
        """What the server has printed so far."""
        return self.log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Process that runs the API; all others of the server are its children.

        Raises:
            ServerError: if the server was not started, or was stopped.
        """
        if self._process is None:
            raise ServerError("vllm serve is not running")
        return self._process.pid

    def stop(self) -> None:
        """Stops the server and every process it started."""
        if self._process is None:
            return
        for sign, patience in ((signal.SIGINT, 20.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._process = None

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + self.timeout
        health = f"http://127.0.0.1:{self.port}/health"
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerError(failure("vllm serve ended at start", self.output(), self.log))
            try:
                # The address is our own.
                with urllib.request.urlopen(health, timeout=5):  # nosec B310
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        what = f"vllm serve not ready in {self.timeout:.0f} s"
        raise ServerError(failure(what, self.output(), self.log))


def failure(what: str, output: str, log: Path | None = None) -> str:
    """One line about a program that failed.

    Args:
        what: what happened.
        output: all that the program said.
        log: file that holds it, or None to write one.

    Returns:
        What happened, the end of the last line, which names the reason, and the file.
    """
    if log is None:
        log = _new_log()
        log.write_text(output)
    last = (output.strip().splitlines() or ["it said nothing"])[-1]
    return f"{what}: {last[-SHOWN:]} (its whole output: {log})"


def _new_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="dam-vllm-serve-", suffix=".log")
    os.close(handle)
    return Path(name)


def rest() -> None:
    """Waits until all idle servers sleep, so that none disturbs a measurement of another."""
    time.sleep(POLLING)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
