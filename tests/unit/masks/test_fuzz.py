"""A short run of the fuzzer in a process of its own, and what it is to find."""

import json
import struct
import subprocess
import sys
import zlib
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
    yield from ((f"bomb {pcl}", bomb(Parts(dict(parts.metadata), {}), pcl)) for pcl in BOMBS)


# PCLs of 128 layers and heads whose true masks take 2 GiB, more than the process may, and 8 GiB.
BOMBS = {16384: "cannot be read", 2**15: "bytes of memory, must be at most"}


def bomb(parts, pcl):
    """A file whose true masks take much more memory than it has bytes, as its header says."""
    header = {"kind": "dense", "model": "", "fingerprint": {"config": "0"}, "pcl": pcl}
    parts.metadata["header"] = json.dumps(header | {"layer_types": ["full"] * 64})
    parts.arrays["columns"] = parts.arrays["diagonals"] = np.zeros((64, 2, pcl // 8), np.uint8)
    parts.arrays["true_bits"] = deflated_zeros(128 * (pcl * (pcl + 1) // 16))
    parts.arrays["modes"] = np.zeros((64, 1), np.uint8)
    parts.seal()
    return parts.bytes()


def deflated_zeros(size):
    """So many zeros (a multiple of a MiB, and more) as zlib deflates them, without making them."""
    maker = zlib.compressobj()
    start = maker.compress(bytes(2**20)) + maker.flush(zlib.Z_FULL_FLUSH)
    again = maker.compress(bytes(2**20)) + maker.flush(zlib.Z_FULL_FLUSH)
    rest = maker.compress(bytes(size % 2**20)) + maker.flush()
    # The checksum at the end: 1, and as many ones added up as there are bytes.
    checksum = struct.pack(">HH", size % 65521, 1)
    whole = start + again * (size // 2**20 - 1) + rest[:-4] + checksum
    return np.frombuffer(whole, np.uint8)


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
        print(path.name, "error", error, sep="|")
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
    for pcl, message in BOMBS.items():
        assert message in found[f"bomb {pcl}"][1]
    for kind, value in found.values():
        assert kind == "error"
        assert len(value) < 1000


def test_a_bomb_is_what_zlib_makes():
    size = 3 * 2**20 + 12345
    assert zlib.decompress(deflated_zeros(size).tobytes()) == bytes(size)


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
