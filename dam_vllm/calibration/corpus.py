"""Documents to calibrate on: a file, a folder, a JSONL file or a data set's name."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from dam_vllm.calibration.errors import CalibrationError

SUFFIXES = (".txt", ".md", ".py")


def read_documents(data: str, field: str, limit: int) -> list[str]:
    """Reads different documents that are not blank.

    Args:
        data: a text file, a folder of .txt, .md and .py files, a .jsonl file, or, where no
            such path exists, a name for `datasets.load_dataset` (its "train" split).
        field: key of the text in JSONL lines and data set rows.
        limit: largest number of documents.

    Returns:
        At least one document, in the order of the source.

    Raises:
        CalibrationError: if there is nothing to read.
    """
    path = Path(data)
    if path.is_dir():
        documents = _folder(path)
    elif path.suffix == ".jsonl" and path.is_file():
        documents = _jsonl(path, field)
    elif path.is_file():
        documents = iter([_text(path)])
    else:
        documents = _dataset(data, field)
    found = list(islice(_different(documents), limit))
    if not found:
        raise CalibrationError(f"--data {data!r} holds no text")
    return found


def _different(documents: Iterator[str]) -> Iterator[str]:
    """Leaves out blank documents and repetitions, which would sit on both sides of the split."""
    seen: set[str] = set()
    for document in documents:
        if document.strip() and document not in seen:
            seen.add(document)
            yield document


def _folder(path: Path) -> Iterator[str]:
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise CalibrationError(f"--data folder {path} holds no {', '.join(SUFFIXES)} file")
    return (_text(file) for file in files)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"--data {file} is no UTF-8 text: {error}") from error


def _jsonl(path: Path, field: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CalibrationError(f"--data {path}:{number} is no JSON: {error}") from error
            yield _field(row, field, f"{path}:{number}")


def _dataset(name: str, field: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"--data {name!r} is no file or folder; for a data set of that name install "
            "dam-vllm[data]"
        ) from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        for row in rows:
            yield _field(row, field, f"data set {name!r}")
    except CalibrationError:
        raise
    except Exception as error:  # whatever the library raises: no such name, no network, no split
        raise CalibrationError(
            f"--data {name!r} is no file or folder, and no data set that can be loaded: {error}"
        ) from error


def _field(row: object, field: str, place: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise CalibrationError(f"--field {field!r} is no text in {place}, which holds: {keys}")
    return value
