"""One calibration at a time in a checkpoint folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dam_vllm.calibration.errors import CalibrationError

LOCK = "lock"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other calibrations out of a folder; removes it at the end if nothing else is left.

    The lock ends with the process, however that ends.

    Args:
        folder: the checkpoint folder; made if need be.

    Raises:
        CalibrationError: if another process works in it, or if it is no checkpoint folder.
        OSError: if it cannot be made.
    """
    lock = folder / LOCK
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not lock.exists())):
        raise CalibrationError(f"{folder} is in the way and no checkpoint: remove it")
    with _locked(lock):
        try:
            yield
        finally:
            if list(folder.iterdir()) == [lock]:
                lock.unlink()
                with suppress(OSError):  # another one has begun in it
                    folder.rmdir()


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise CalibrationError(
                    f"{file.read() or 'another calibration'} works in {lock.parent}: wait until it "
                    "ends, or give another --output"
                ) from None
            if not _still(lock, file):
                continue  # its last holder removed it before we got hold of it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
            return


def _still(path: Path, file: TextIO) -> bool:
    """Whether a path is still that of an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
