import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import dam_vllm
from dam_vllm.masks.file import EARLIER, FORMAT, MaskFileError, load_mask_set, save_mask_set
from tests.mask_files import Parts, full_mask_set

SHIPPED = Path(dam_vllm.__file__).parent / "demo" / "model" / "dam" / "masks.safetensors"


@pytest.fixture
def full_masks(rng):
    return full_mask_set(rng)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "masks.safetensors"


def rewritten(masks, path, change):
    """Saves masks, then changes the file's parts and makes the digest right again."""
    save_mask_set(masks, path)
    parts = Parts.of(path)
    change(parts)
    parts.seal()
    path.write_bytes(parts.bytes())


def test_round_trip(full_masks, tmp_path):
    path = tmp_path / "new" / "masks.safetensors"
    save_mask_set(full_masks, path)
    back = load_mask_set(path)
    assert back.header == full_masks.header
    for made, found in ((full_masks, back), (full_masks.dynamic, back.dynamic)):
        for name, array in vars(made).items():
            if isinstance(array, np.ndarray):
                np.testing.assert_array_equal(getattr(found, name), array)
                assert getattr(found, name).dtype == array.dtype
                assert getattr(found, name).flags.writeable


def test_what_is_absent_stays_absent(random_masks, path):
    save_mask_set(random_masks(dense=True), path)
    back = load_mask_set(path)
    assert (
        back.dynamic is back.anchors is back.tails is back.coverage is back.density_lengths is None
    )


def test_the_same_masks_give_the_same_bytes(full_masks, path, tmp_path):
    save_mask_set(full_masks, path)
    save_mask_set(load_mask_set(path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_arrays_may_lie_in_any_order(full_masks, path):
    """Whoever wrote the file: it is read as safetensors says."""
    save_mask_set(full_masks, path)
    parts = Parts.of(path)
    save_file(parts.arrays, path, parts.metadata)
    np.testing.assert_array_equal(load_mask_set(path).columns, full_masks.columns)


def test_failed_write_leaves_the_old_file(random_masks, path, tmp_path, monkeypatch):
    save_mask_set(random_masks(), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_mask_set(random_masks(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_read_is_not_written(random_masks, path):
    masks = random_masks(dynamic=True)
    masks.dynamic.rotations[0, 0, 0] *= 0.5
    with pytest.raises(MaskFileError, match=r"not written: dynamic.rotations\[0, 0\]"):
        save_mask_set(masks, path)
    masks = random_masks()
    masks.header.parameters["fit"] = {}
    with pytest.raises(MaskFileError, match="not written: header entry 'parameters'"):
        save_mask_set(masks, path)
    masks = random_masks()
    masks.header.parameters["more"] = "x" * 2**23
    with pytest.raises(MaskFileError, match="not written: its JSON takes"):
        save_mask_set(masks, path)
    assert not path.exists()


def test_missing_file(tmp_path):
    with pytest.raises(MaskFileError, match=r"none\.safetensors does not exist"):
        load_mask_set(tmp_path / "none.safetensors")
    with pytest.raises(MaskFileError, match="does not exist"):
        load_mask_set(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_cut_file_is_damaged(random_masks, path, keep):
    save_mask_set(random_masks(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MaskFileError, match="is damaged"):
        load_mask_set(path)


def test_other_safetensors_file_is_no_mask_file(path):
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(MaskFileError, match="is no mask file"):
        load_mask_set(path)


@pytest.mark.parametrize("earlier", EARLIER)
def test_files_of_earlier_versions_are_told(random_masks, path, earlier):
    rewritten(random_masks(), path, lambda parts: parts.metadata.update(format=earlier))
    with pytest.raises(MaskFileError, match=r"earlier version.*calibrate again"):
        load_mask_set(path)


@pytest.mark.parametrize("name", ["true_bits", "coverage", "dynamic.budgets", "header"])
def test_a_changed_file_is_refused_as_changed(full_masks, path, name):
    save_mask_set(full_masks, path)
    parts = Parts.of(path)
    if name == "header":
        parts.metadata["header"] = parts.metadata["header"].replace("random", "rendom")
    else:
        parts.arrays[name].reshape(-1).view(np.uint8)[-1] ^= 64
    path.write_bytes(parts.bytes())
    with pytest.raises(MaskFileError, match="was changed after it was made"):
        load_mask_set(path)


def test_the_digest_knows_names_and_shapes(full_masks, path):
    """Bytes that move from one array to another are a change."""
    save_mask_set(full_masks, path)
    parts = Parts.of(path)
    arrays = parts.arrays
    arrays["columns"], arrays["diagonals"] = arrays["diagonals"], arrays["columns"]
    path.write_bytes(parts.bytes())
    with pytest.raises(MaskFileError, match="was changed"):
        load_mask_set(path)
    parts = Parts.of(path)
    parts.arrays["modes"] = parts.arrays["modes"].reshape(2, 3)
    path.write_bytes(parts.bytes())
    with pytest.raises(MaskFileError, match="was changed"):
        load_mask_set(path)


def put(name, place, value):
    """A change of one value."""

    def change(parts):
        parts.arrays[name][place] = value

    return change


def swapped(one, other):
    def change(parts):
        parts.arrays[one], parts.arrays[other] = parts.arrays[other], parts.arrays[one]

    return change


def put_true_bit(place):
    """A change of a byte of the true masks, which lie deflated."""

    def change(parts):
        bits = np.frombuffer(zlib.decompress(parts.arrays["true_bits"].tobytes()), np.uint8)
        bits = bits.reshape(3, 4, -1).copy()
        bits[place] = 1
        parts.arrays["true_bits"] = np.frombuffer(zlib.compress(bits.tobytes()), np.uint8)

    return change


def every(name, function):
    """A change of a whole array."""
    return lambda parts: parts.arrays.update({name: np.ascontiguousarray(function(parts.arrays))})


MEANINGLESS = [
    (lambda p: p.arrays.pop("modes"), "array 'modes' is missing"),
    (lambda p: p.arrays.pop("dynamic.caps"), "array 'dynamic.caps' is missing"),
    (lambda p: p.arrays.update(more=np.ones(3, np.uint8)), "array 'more' is unknown"),
    (every("modes", lambda a: a["modes"].astype(np.int32)), "'modes' is I32, must be U8"),
    (every("modes", lambda a: a["modes"].astype(np.int64)), "'modes' has dtype 'I64'"),
    (every("columns", lambda a: a["columns"][..., 1:]), "does not hold 77 bits"),
    (every("true_bits", lambda a: a["true_bits"][1:]), "'true_bits' cannot be inflated"),
    (every("true_bits", lambda a: a["true_bits"][:-5]), "'true_bits' holds another number"),
    (every("true_bits", lambda a: np.frombuffer(zlib.compress(bytes(10**6)), np.uint8)),
     "'true_bits' holds another number of bytes than 4512"),
    (every("columns", lambda a: a["columns"][0]), "columns has shape"),
    (every("modes", lambda a: a["modes"][0]), "modes has shape"),
    (every("modes", lambda a: a["modes"].repeat(2, 1)[:, :3]), "4 query heads"),
    (every("coverage", lambda a: a["coverage"].T), r"coverage has shape \(4, 3\)"),
    (every("density_kv", lambda a: a["density_kv"][:1]), r"density_kv has shape \(1, 3, 2\)"),
    (lambda p: p.arrays.pop("density_lengths"), "density_heads has shape"),
    (every("anchors", lambda a: a["anchors"][:2]), "anchors has shape"),
    (every("dynamic.rotations", lambda a: a["dynamic.rotations"][..., 1:]), "rotations has shape"),
    (put("columns", (0, 0, -1), 0b111), r"columns\[0, 0\] ends in byte 7"),
    (put("diagonals", (2, 1, -1), 1), r"diagonals\[2, 1\] ends in byte 1"),
    (put_true_bit((0, 3, -1)), r"true_bits\[0, 3\] ends in byte 1"),
    (put("columns", (1, 0, 0), 1), r"columns\[1\] has bits, .* type 'sliding'"),
    (put_true_bit((1, 0, 0)), r"true_bits\[1\] has bits"),
    (put("modes", (0, 0), 4), r"modes\[0, 0\] is 4, must be from 0 to 3"),
    (put("anchors", (2, 0), (1, 1)), "layer 1, which is left to vLLM"),
    (put("anchors", (2, 0), (0, 0)), "is not dynamic"),
    (every("tails", lambda a: a["tails"][:, :1]), "tails has shape"),
    (put("tails", (0, 1), 2), r"tails\[0, 1\] is 2, must be from 0 to 1"),
    (put("tails", (1, 0), 1), "layer 1, KV head 0 has a tail, but reads every page"),
    (put("coverage", (2, 1), np.inf), r"coverage\[2, 1\] is inf, must be from 0 to 1.01 or NaN"),
    (put("coverage_extended", (0, 0), -0.5), r"coverage_extended\[0, 0\] is -0.5"),
    (put("density_lengths", 0, 0), r"density_lengths\[0\] is 0, must be from 1"),
    (put("density_lengths", 0, 4096), r"density_lengths\[1\] is 4096, must be from 4097"),
    (put("density_heads", (1, 0, 3), np.nan), r"density_heads\[1, 0, 3\] is nan"),
    (put("density_kv", (0, 0, 0), 1.5), r"density_kv\[0, 0, 0\] is 1.5"),
    (put("dynamic.rotations", (1, 1, 0, 5), np.nan), r"rotations\[1, 1, 0, 5\] is nan"),
    (put("dynamic.rotations", (1, 1, 0, 5), np.inf), r"rotations\[1, 1, 0, 5\] is inf"),
    (put("dynamic.rotations", (1, 1, 0), 0.5), r"rotations\[1, 1\] is not orthogonal"),
    (put("dynamic.rotations", (0, 1), 0), r"rotations\[0, 1\] is not orthogonal"),
    (put("dynamic.channels", (0, 1), 25), r"channels\[0, 1\] is 25, must be from 1 to 24"),
    (put("dynamic.channels", (0, 1), 0), r"channels\[0, 1\] is 0"),
    (put("dynamic.kinds", (0, 1), 3), r"kinds\[0, 1\] is 3, must be from 0 to 2"),
    (put("dynamic.budgets", (0, 1), np.nan), r"budgets\[0, 1\] is nan"),
    (put("dynamic.budgets", (0, 1), np.inf), r"budgets\[0, 1\] is inf"),
    (put("dynamic.budgets", (0, 1), -1), r"budgets\[0, 1\] is -1"),
    (lambda p: (put("dynamic.kinds", (0, 0), 2)(p), put("dynamic.budgets", (0, 0), 1.25)(p)),
     r"budgets\[0, 0\] is 1.25, must be from 0 to 1"),
    (put("dynamic.caps", (0, 1), -1), r"caps\[0, 1\] is -1"),
    (put("dynamic.floors", (0, 1), -1), r"floors\[0, 1\] is -1"),
    (put("dynamic.floors", (0, 1), 9999), r"floors\[0, 1\] is 9999, must be from 0 to"),
    (put("dynamic.expected", (0, 1), np.nan), r"expected\[0, 1\] is nan"),
    (swapped("dynamic.channels", "dynamic.kinds"), "'dynamic.channels' is U8, must be I32"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MEANINGLESS)
def test_arrays_are_checked_behind_a_right_digest(full_masks, path, change, message):
    rewritten(full_masks, path, change)
    with pytest.raises(MaskFileError, match=message) as caught:
        load_mask_set(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"extra": 1}, "header entry 'extra' is unknown"),
        ({"pcl": 0}, "header entry 'pcl' is 0"),
        ({"pcl": "77"}, "header entry 'pcl' is '77'"),
        ({"pcl": 60}, "does not hold 60 bits"),
        ({"pcl": 60, "reach": 77}, "'true_bits' holds another number of bytes"),
        ({"pcl": 10**9}, "header entry 'pcl' is 1000000000"),
        ({"reach": 76}, "the masks hold 76|ends in byte"),
        ({"reach": 0}, "header entry 'reach' is 0"),
        ({"layer_types": ["full"] * 2}, "layer_types names 2 layers"),
        ({"layer_types": ["full", "flat", "full"]}, "'layer_types.1' is 'flat'"),
        ({"layer_types": ["full"] * 5000}, "'layer_types' is"),
        ({"kind": "best"}, "header entry 'kind' is 'best'"),
        ({"model": "a\x1b[2Jb"}, "header entry 'model'"),
        ({"model": "\ud800"}, "header entry 'model'|surrogate"),
        ({"parameters": {"x": "\ud800"}}, "surrogates"),
        ({"parameters": {"fit": 3}}, r"'parameters' is .* fit.page must be"),
        ({"parameters": {"fit": {"page": 10**6}}}, r"fit.page must be .* from 1 to 4096"),
        ({"parameters": {"x": float("nan")}}, "'NaN' is no finite number"),
        ({"fingerprint": {"config": "0", "other": 1}}, "fingerprint entry 'other' is unknown"),
        ({"fingerprint": {"config": ""}}, "header entry 'fingerprint.config' is ''"),
        ({"fingerprint": 7}, "header entry 'fingerprint' is 7"),
    ],
)
def test_header_is_checked(full_masks, path, entries, message):
    def change(parts):
        parts.metadata["header"] = json.dumps(parts.header | entries)

    rewritten(full_masks, path, change)
    with pytest.raises(MaskFileError, match=message) as caught:
        load_mask_set(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["", "7", "[" * 10**5, '{"a":' + "9" * 5000 + "}", "\ud800"])
def test_header_must_be_an_object(full_masks, path, text):
    rewritten(full_masks, path, lambda parts: parts.metadata.update(header=text))
    with pytest.raises(MaskFileError, match="is damaged: header"):
        load_mask_set(path)


def test_metadata_must_be_whole(full_masks, path):
    save_mask_set(full_masks, path)
    parts = Parts.of(path)
    del parts.metadata["digest"]
    path.write_bytes(parts.bytes())
    with pytest.raises(MaskFileError, match=r"its metadata names \['format', 'header'\]"):
        load_mask_set(path)


def test_masks_too_large_are_refused_before_they_are_read(full_masks, path, monkeypatch):
    save_mask_set(full_masks, path)
    arrays = Parts.of(path).arrays
    total = sum(array.nbytes for array in arrays.values())
    total += 7 * (arrays["columns"].nbytes + arrays["diagonals"].nbytes)
    inflated = total + full_masks.true_bits.nbytes
    monkeypatch.setattr("dam_vllm.masks.file.MAX_BYTES", inflated)
    load_mask_set(path)
    save_mask_set(full_masks, path)
    monkeypatch.setattr("dam_vllm.masks.file.MAX_BYTES", inflated - 1)
    with pytest.raises(MaskFileError, match=f"not written: its masks take {inflated} bytes"):
        save_mask_set(full_masks, path)
    monkeypatch.delattr("dam_vllm.masks.file.inflate")
    with pytest.raises(MaskFileError, match=f"take {inflated} bytes of memory, must be at most"):
        load_mask_set(path)
    monkeypatch.setattr("dam_vllm.masks.file.MAX_BYTES", total - 1)
    monkeypatch.delattr("dam_vllm.masks.file.read_array")
    with pytest.raises(MaskFileError, match=f"take {total} bytes of memory, must be at most"):
        load_mask_set(path)


def test_the_shipped_file_is_as_it_was_made():
    masks = load_mask_set(SHIPPED)
    assert Parts.of(SHIPPED).metadata["format"] == FORMAT
    assert (masks.layers, masks.heads, masks.kv_heads, masks.pcl) == (4, 8, 4, 1024)
