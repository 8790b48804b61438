"""A short run of the fuzzer in a process of its own, and what it is to find."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dam_vllm.masks import tensor_file
from dam_vllm.masks.file import MaskFileError, load_mask_set, save_mask_set
from dam_vllm.masks.tensor_file import MAX_JSON_BYTES
from tests.conftest import fresh_seed
from tests.mask_files import Parts, full_mask_set
from tests.mutations import BYTES, PLACES, SEALED, mutated

ROOT = Path(__file__).parents[3]
MUTATIONS = 250


def test_mutated_files_are_refused_or_provably_read():
    command = ["--mutations", str(MUTATIONS), "--seed", str(fresh_seed())]
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_masks", *command],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["failures"] == 0
    assert report["refused"] > MUTATIONS // 2


def test_every_mutation_is_made_and_repeats(rng, tmp_path):
    path = tmp_path / "masks.safetensors"
    save_mask_set(full_mask_set(rng), path)
    data, parts = path.read_bytes(), Parts.of(path)
    names = set()
    for index in range(1000):
        name, made, _ = mutated(np.random.default_rng(index), data, parts)
        names.add(name)
        if index < 100:
            assert mutated(np.random.default_rng(index), data, parts)[1] == made
    assert names == {each.__name__ for each in BYTES + PLACES + SEALED}
    assert parts.bytes() == Parts.of(path).bytes()


def dense_json(size):
    """JSON of about so many bytes whose values take much memory or time."""
    return {
        "lists": '{"a":[' + "[]," * (size // 3) + "[]]}",
        "names": "{" + ",".join(f'"{n}":0' for n in range(size // 11)) + "}",
        "layers": '{"layer_types":[' + '"x",' * (size // 4) + '"x"]}',
        "depth": '{"a":' + "[" * size,
        "digits": '{"a":' + "9" * size + "}",
    }


def absurd(parts):
    """Files that say that they hold more than they do, or that take much memory to parse."""
    entries, data = parts.entries(), parts.bytes()
    lengths = [2**20, MAX_JSON_BYTES, MAX_JSON_BYTES + 1, 2**31, 2**40, 2**63, 2**64 - 1]
    yield from ((f"length {each}", struct.pack("<Q", each) + data[8:]) for each in lengths)
    for change in (
        {"shape": [2**31 - 1] * 4, "data_offsets": [0, (2**31 - 1) ** 4]},
        {"shape": [1, 1, 2**62], "data_offsets": [0, 2**62]},
        {"shape": [10**4000, 1, 1]},
        {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
    ):
        told = entries | {"columns": entries["columns"] | change}
        yield f"entry {change['shape'][-1]} {len(change['shape'])}", parts.bytes(told)
    for name, text in dense_json(MAX_JSON_BYTES - 1000).items():
        yield f"json {name}", struct.pack("<Q", len(text)) + text.encode() + data
    header = parts.metadata["header"]
    for name, text in dense_json(MAX_JSON_BYTES // 2).items():
        parts.metadata["header"] = text
        parts.seal()
        yield f"header {name}", parts.bytes()
    parts.metadata["header"] = header[:-1] + ',"parameters":' + dense_json(2**22)["lists"] + "}"
    parts.seal()
    yield "allowed", parts.bytes()


LOADER = """
import sys
from pathlib import Path
from dam_vllm.masks.file import MaskFileError, load_mask_set
from tests.fuzz_masks import limit_memory
limit_memory()
for path in Path(sys.argv[1]).iterdir():
    try:
        print(path.name, "is", load_mask_set(path).pcl, sep="|")
    except MaskFileError as error:
        print(path.name, "error", len(str(error)), sep="|")
"""


def test_absurd_sizes_take_little_memory(rng, tmp_path):
    """In a process that may take 1 GiB beside what it has."""
    path = tmp_path / "masks.safetensors"
    save_mask_set(full_mask_set(rng), path)
    parts = Parts.of(path)
    path.unlink()
    for name, data in absurd(parts):
        (tmp_path / name).write_bytes(data)
    run = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    found = {line.split("|")[0]: line.split("|")[1:] for line in run.stdout.splitlines()}
    assert found.keys() == {each.name for each in tmp_path.iterdir()}
    assert found.pop("allowed") == ["is", "77"]
    for kind, value in found.values():
        assert kind == "error"
        assert int(value) < 1000


def test_a_file_that_shrinks_while_it_is_read_is_damaged(rng, tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    save_mask_set(full_mask_set(rng), path)
    size = path.stat().st_size

    def read_index(stream):
        index = tensor_file.read_index(stream)
        path.write_bytes(path.read_bytes()[: size - 1000])
        return index

    monkeypatch.setattr("dam_vllm.masks.file.read_index", read_index)
    with pytest.raises(MaskFileError, match=r"is damaged: array .* ends after"):
        load_mask_set(path)
