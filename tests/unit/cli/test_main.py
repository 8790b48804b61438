"""How `dam-vllm` ends, completes words and says its version."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dam_vllm import __version__
from dam_vllm.bench.client import ClientError
from dam_vllm.cli import main
from dam_vllm.cli.program import PROGRESS, Program
from dam_vllm.masks.file import MaskFileError
from dam_vllm.options import OptionError
from dam_vllm.server import ServerError

COMMAND = Path(sys.executable).parent / "dam-vllm"


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(*arguments):
    return CliRunner().invoke(main.app, [*map(str, arguments)])


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (OptionError("why"), 2, "why"),
        (MaskFileError("why"), 1, "why"),
        (OSError("why"), 1, "why"),
        (ServerError("why"), 1, "why"),
        (ClientError("why"), 1, "why"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_errors_are_one_line_on_stderr_and_an_exit_code(error, status, told):
    app = typer.Typer(cls=Program)
    app.callback()(lambda: None)

    @app.command()
    def fails():
        raise error

    done = CliRunner().invoke(app, ["fails"])
    assert (done.exit_code, done.stdout) == (status, "")
    assert done.stderr == (f"Error: {told}\n" if told else "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nope"], "No such command 'nope'"),
        (["inspect", "--nope", "file"], "No such option: --nope"),
        (["inspect"], "Missing argument 'file'"),
        (["inspect", "file", "--length", "0"], "'--length': Input should be greater"),
        (["masks", "streaming", "model"], "Missing option '--output'"),
    ],
)
def test_a_wrong_command_line_is_one_line_too(arguments, told):
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert told in done.stderr
    assert "--help)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_a_command_help_is_shown():
    done = run()
    assert done.exit_code == 2
    assert "calibrate" in done.output
    assert "Error" not in done.output


def test_the_version():
    done = run("--version")
    assert (done.exit_code, done.output) == (0, f"{__version__}\n")


def test_quiet_silences_progress_alone():
    app = typer.Typer(cls=Program)
    app.callback()(lambda: None)

    @app.command()
    def works(quiet: main.calibrate.__annotations__["quiet"] = False):
        PROGRESS.print("under way")
        typer.echo("result")

    loud = CliRunner().invoke(app, ["works"])
    assert (loud.stdout, loud.stderr) == ("result\n", "under way\n")
    quiet = CliRunner().invoke(app, ["works", "--quiet"])
    assert (quiet.stdout, quiet.stderr) == ("result\n", "")
    again = CliRunner().invoke(app, ["works"])
    assert again.stderr == "under way\n"


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


def complete(line):
    """What bash offers for a line's last word, by the script that dam-vllm prints."""
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run(
        [COMMAND, "--show-completion", "bash"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    words = line.split(" ")
    asked = (
        f"{script}\nCOMP_WORDS=({' '.join(words[:-1])} '{words[-1]}')\n"
        f"COMP_CWORD={len(words) - 1}\n_dam_vllm_completion dam-vllm\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = os.pathsep.join([str(COMMAND.parent), os.environ["PATH"]])
    shell = subprocess.run(
        ["bash", "-c", asked], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    return shell.stdout.split()


def test_bash_completes_commands_and_options():
    assert complete("dam-vllm cal") == ["calibrate"]
    assert "--target-density" in complete("dam-vllm calibrate --target")
