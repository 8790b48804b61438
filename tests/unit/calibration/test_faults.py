"""What goes wrong around a calibration: kills, full disks, folders of others."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dam_vllm.calibration import lock
from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.pipeline import calibrate
from dam_vllm.calibration.progress import Reporter
from dam_vllm.calibration.state_files import read_arrays, read_json
from dam_vllm.calibration.static import passes
from dam_vllm.cli.main import app
from tests.conftest import fresh_seed
from tests.unit.calibration.test_pipeline import make  # noqa: F401 - a fixture

KILLS = 5


@pytest.mark.slow
def test_a_killed_calibration_goes_on_to_the_same_file():
    arguments = ["--kills", str(KILLS), "--seed", str(fresh_seed())]
    run = subprocess.run(
        [sys.executable, "-m", "tests.kills", *arguments],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout)["kills"] >= KILLS


@contextmanager
def largest_file(size):
    """Lets this process write no file beyond a size, as if the disk were full."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize(("size", "file"), [(50, "state.json"), (2000, "tokens-0000.safetensors")])
def test_a_full_disk_is_one_error_and_the_run_goes_on(make, size, file):  # noqa: F811
    whole, job = make("whole"), make("full")
    calibrate(whole)
    with largest_file(size), pytest.raises(OSError, match=rf"full\S+partial/{file}"):
        calibrate(job)
    assert not job.output.exists()
    assert not job.checkpoint.exists() or not list(job.checkpoint.glob("*.tmp"))
    calibrate(job)
    assert job.output.read_bytes() == whole.output.read_bytes()


def test_a_disk_that_is_full_at_the_end_keeps_what_was_there(make):  # noqa: F811
    whole, job = make("whole"), make("full")
    calibrate(whole)
    job.output.write_bytes(b"former")
    limit = largest_file(2000)

    def fill(done, total):
        if done == total:
            limit.__enter__()

    try:
        with pytest.raises(OSError, match=r"File too large.*partial/masks") as error:
            calibrate(job, Reporter(progress=fill))
    finally:
        limit.__exit__(None, None, None)
    assert error.value.errno == errno.EFBIG
    assert job.output.read_bytes() == b"former"
    assert not list(job.checkpoint.glob("*.tmp"))
    calibrate(job)
    assert job.output.read_bytes() == whole.output.read_bytes()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(model_folder, texts_file):
    output = "/sys/masks.safetensors"  # not even root may write there
    arguments = [str(model_folder), "--data", str(texts_file), "--output", output]
    done = CliRunner().invoke(app, ["calibrate", *arguments, "--device", "cpu"])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("Error: [Errno ")
    assert f"'{output}.partial'" in done.output
    assert "PCL" not in done.output


def test_a_second_calibration_into_the_same_file_is_refused(make):  # noqa: F811
    first, whole, refused = make(), make("whole"), []

    def start_another(done, total):
        if not refused:
            with pytest.raises(
                CalibrationError, match=r"works in \S+masks.safetensors.partial: wait"
            ) as error:
                calibrate(make())
            refused.append(str(error.value))

    calibrate(first, Reporter(progress=start_another))
    calibrate(whole)
    assert f"process {os.getpid()} on " in refused[0]
    assert first.output.read_bytes() == whole.output.read_bytes()
    assert not first.checkpoint.exists()


def test_two_calibrations_into_one_folder_do_not_meet(make):  # noqa: F811
    first, second = make("first"), make("second")
    started = []

    def start_another(done, total):
        if not started:
            started.append(1)
            calibrate(second)

    calibrate(first, Reporter(progress=start_another))
    assert first.output.read_bytes() == second.output.read_bytes()


def test_a_lock_that_its_holder_removed_is_taken_anew(tmp_path, monkeypatch):
    folder, flock, removed = tmp_path / "a.partial", fcntl.flock, []

    def remove_first(file, operation):
        if not removed:
            removed.append(folder / lock.LOCK)
            removed[0].unlink()
            folder.rmdir()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with lock.alone_in(folder):
        assert removed
        with pytest.raises(CalibrationError, match="works in"), lock.alone_in(folder):
            pass
    assert not folder.exists()


def test_what_is_no_checkpoint_is_left_alone(make):  # noqa: F811
    job = make()
    job.checkpoint.mkdir()
    other = job.checkpoint / "thesis.tex"
    other.write_text("kept")
    with pytest.raises(CalibrationError, match="is in the way and no checkpoint: remove it"):
        calibrate(job)
    assert list(job.checkpoint.iterdir()) == [other]


def test_damaged_files_of_a_checkpoint_are_named(make, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(passes, "CHECKPOINT_SECONDS", 0)
    job, calls = make(), []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError
        return False

    with pytest.raises(RuntimeError):
        calibrate(job, Reporter(stop=stop))
    cut = job.checkpoint / "pass.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match=r"pass.safetensors is damaged .*partial to start"):
        calibrate(job)
    broken = tmp_path / "fit-texts.json"
    broken.write_text('[{"kind"')
    for read in (read_json, read_arrays):
        with pytest.raises(CalibrationError, match=r"fit-texts.json is damaged"):
            read(broken)
