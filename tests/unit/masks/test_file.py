import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dam_vllm.masks.file import FORMAT, MaskFileError, load_mask_set, save_mask_set


def test_round_trip(random_masks, tmp_path):
    masks = replace(
        random_masks(pcl=77, dense=True),
        coverage=np.full((2, 4), np.nan, np.float32),
        density_lengths=np.array([4096], np.int32),
        density_kv=np.ones((1, 2, 2), np.float32),
    )
    save_mask_set(masks, tmp_path / "new" / "masks.safetensors")
    back = load_mask_set(tmp_path / "new" / "masks.safetensors")
    assert back.header == masks.header
    assert back.density_heads is None
    for name in ("columns", "diagonals", "true_bits", "modes", "coverage", "density_kv"):
        np.testing.assert_array_equal(getattr(back, name), getattr(masks, name))
        assert getattr(back, name).dtype == getattr(masks, name).dtype


def test_failed_write_leaves_the_old_file(random_masks, tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    save_mask_set(random_masks(), path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_mask_set(random_masks(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file(tmp_path):
    with pytest.raises(MaskFileError, match=r"none\.safetensors does not exist"):
        load_mask_set(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_cut_file_is_damaged(random_masks, tmp_path, keep):
    path = tmp_path / "masks.safetensors"
    save_mask_set(random_masks(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MaskFileError, match="is damaged"):
        load_mask_set(path)


def test_other_safetensors_file_is_no_mask_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"weight": np.ones(3)}, path)
    with pytest.raises(MaskFileError, match="is no mask file"):
        load_mask_set(path)


def rewrite(path, change, header=None):
    """Saves the file's arrays again after a change."""
    arrays = load_file(path)
    change(arrays)
    masks = load_mask_set(path)
    metadata = {"format": FORMAT, "header": header or masks.header.model_dump_json()}
    save_file(arrays, path, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("modes"), "'modes' is missing"),
        (lambda a: a.update(more=np.ones(3)), "'more' is unknown"),
        (lambda a: a.update(modes=a["modes"].astype(np.int64)), "'modes' is int64"),
        (lambda a: a.update(columns=a["columns"][..., 1:].copy()), "does not hold"),
        (lambda a: a.update(true_bits=a["true_bits"][..., 1:].copy()), "true_bits has shape"),
    ],
)
def test_arrays_are_checked(random_masks, tmp_path, change, message):
    path = tmp_path / "masks.safetensors"
    save_mask_set(random_masks(), path)
    rewrite(path, change)
    with pytest.raises(MaskFileError, match=message):
        load_mask_set(path)


def test_header_is_checked(random_masks, tmp_path):
    path = tmp_path / "masks.safetensors"
    masks = random_masks()
    save_mask_set(masks, path)
    header = json.loads(masks.header.model_dump_json()) | {"extra": 1}
    rewrite(path, lambda a: None, json.dumps(header))
    with pytest.raises(MaskFileError, match="extra"):
        load_mask_set(path)
