"""Files that are replaced whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file that takes a file's place at the end, unless an exception comes.

    Args:
        path: the file; its folder is made if need be.

    Raises:
        OSError: if it cannot be written; the error names a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.errno and not error.filename:
            error.filename = str(path)  # a full disk is told without the file
        raise


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file; one already there is replaced whole.

    Args:
        path: the file; its folder is made if need be.
        values: what to write.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
