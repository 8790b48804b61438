"""Documents to calibrate on: a file, a folder, a JSONL file or a data set's name."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.settings import CalibrationConfig

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
        documents = iter(["".join(_lines(path))])
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
    return ("".join(_lines(file)) for file in files)


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise CalibrationError(f"--data {file} is no UTF-8 text: {error}") from error


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
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


Batch = list[list[int]]
"""Windows of one forward pass, longest first, as token ids."""


@dataclass(frozen=True)
class TokenisedTexts:
    """Documents as token ids without special tokens.

    Attributes:
        prefix: special tokens that the tokenizer starts a text with, such as BOS.
        calibration: documents to capture attention on.
        held_out: documents to measure coverage on; none is a calibration document.
    """

    prefix: list[int]
    calibration: list[list[int]]
    held_out: list[list[int]]

    def digest(self) -> str:
        """Identity of the texts and their split, hexadecimal."""
        parts = (str((self.prefix, part)).encode() for part in (self.calibration, self.held_out))
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]


@dataclass(frozen=True)
class Windows:
    """Token ids to capture and measure on.

    Attributes:
        short: for maps of tokens, up to the PCL.
        long: for maps of pages, up to the reach; none where that is the PCL.
        held_out: to measure coverage on.
    """

    short: list[list[int]]
    long: list[list[int]]
    held_out: list[list[int]]

    def report(self) -> str:
        """How many there are, in words for the user."""
        parts = [f"{len(self.short)} windows to calibrate on"]
        if self.long:
            lengths = f"{len(self.long[-1])} to {len(self.long[0])}"
            parts.append(f"{len(self.long)} of {lengths} tokens for maps of pages")
        return ", ".join([*parts, f"{len(self.held_out)} held out"])


def tokenise(documents: list[str], tokenizer: Any, held_out: float, seed: int) -> TokenisedTexts:
    """Tokenises and splits documents.

    A single document is cut in two, its end held out.

    Args:
        documents: different texts.
        tokenizer: of the model (transformers).
        held_out: share of the documents, or of the single document, to hold out.
        seed: of their order and the split.

    Returns:
        The tokenised texts.
    """
    prefix = special_prefix(tokenizer)
    tokens = [
        tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        for document in documents
    ]
    Random(seed).shuffle(tokens)
    if not held_out:
        return TokenisedTexts(prefix, tokens, [])
    if len(tokens) == 1:
        cut = round(len(tokens[0]) * (1 - held_out))
        return TokenisedTexts(prefix, [tokens[0][:cut]], [tokens[0][cut:]])
    count = max(1, round(len(tokens) * held_out))
    return TokenisedTexts(prefix, tokens[count:], tokens[:count])


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens before a text's own, for example [BOS]."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise CalibrationError(f"tokenizer {type(tokenizer).__name__} does not keep a text's tokens")


def count_full(documents: list[list[int]], prefix: int, length: int) -> int:
    """How many whole windows of `length` tokens, `prefix` included, the documents give."""
    return sum(len(document) // (length - prefix) for document in documents)


def cut(documents: list[list[int]], prefix: list[int], length: int, limit: int) -> list[list[int]]:
    """Cuts documents into windows.

    Longer windows come first. A document's last piece is kept if it is at least a quarter of a
    window, or all there is.

    Args:
        documents: token ids without special tokens.
        prefix: put before each window, which so starts as the tokenizer starts a text.
        length: tokens of a whole window, prefix included.
        limit: largest number of windows.

    Returns:
        At most `limit` windows, longest first.
    """
    size = length - len(prefix)
    pieces = [
        document[start : start + size]
        for document in documents
        for start in range(0, len(document), size)
        if start == 0 or len(document) - start >= size // 4
    ]
    pieces.sort(key=len, reverse=True)
    return [prefix + piece for piece in pieces[:limit]]


def split(config: CalibrationConfig) -> tuple[int, int]:
    """Largest numbers of calibration and held-out windows."""
    share = config.held_out
    held_out = max(1, round(config.texts * share)) if share else 0
    return config.texts - held_out, held_out


def make_windows(texts: TokenisedTexts, config: CalibrationConfig, pcl: int) -> Windows:
    """Cuts texts into all windows of a calibration.

    Args:
        texts: the tokenised texts.
        config: lengths and numbers of windows.
        pcl: the chosen Pattern Capture Length.

    Returns:
        The windows, each kind longest first.
    """
    calibration, held_out = split(config)
    longest = (
        cut(texts.calibration, texts.prefix, config.reach, config.long_texts)
        if config.reach
        else []
    )
    return Windows(
        short=cut(texts.calibration, texts.prefix, pcl, calibration),
        # Windows within the PCL show nothing beyond it.
        long=[window for window in longest if len(window) > pcl],
        held_out=cut(texts.held_out, texts.prefix, config.window or pcl, held_out),
    )


def batches(windows: list[list[int]], size: int) -> list[Batch]:
    """Windows in batches of at most `size`."""
    return [windows[start : start + size] for start in range(0, len(windows), size)]


def pad(windows: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
    """Pads a batch on the right: int64 [batch, longest], and the true lengths."""
    lengths = [len(window) for window in windows]
    ids = np.zeros((len(windows), max(lengths)), dtype=np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window
    return torch.from_numpy(ids), lengths
