"""What servers under measurement take, and which masks they serve."""

from dataclasses import replace

import numpy as np
import pytest

from dam_vllm.bench.model import DEMO, MODELS, write_model
from dam_vllm.bench.servers import Setup, free_memory, in_turns, masks_of
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.masks.fingerprint import Fingerprint, fingerprint
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.options import OptionError

PEERS = {"dense": None, "dam": {}}
SETUP = Setup(MODELS["llama-3.2-1b"], length=16512, page=128, window=513, requests=4)


def test_servers_take_turns_where_they_do_not_fit_together():
    one = SETUP.server_bytes
    # 2.5 GB of weights; 129 pages for each of 4 requests, 32 KiB a token.
    assert SETUP.cache_bytes == (4 * 129 + 1) * 128 * 32768
    assert one > 2 * 1235814400 + SETUP.cache_bytes
    assert in_turns(SETUP, PEERS, 2 * one) == [PEERS]
    assert in_turns(SETUP, PEERS, 2 * one - 1) == [{"dense": None}, {"dam": {}}]
    with pytest.raises(OptionError, match="--concurrency ask for 4 x 16512 tokens: a server takes"):
        in_turns(SETUP, PEERS, one - 1)


def test_free_memory_is_told_in_bytes(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert 1e8 < free_memory() < 1e14
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (7, 9))
    assert free_memory() == 7


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", DEMO, 2048)


def test_a_window_or_a_density(model, tmp_path):
    setup = Setup(DEMO, length=2048, page=32, window=65, dynamic=1)
    masks = masks_of(setup, model)
    assert masks.reach == 65
    assert masks.diagonals.all()
    assert masks.dynamic.caps[0, 0] == 64
    scattered = masks_of(replace(setup, density=0.3), model)
    assert scattered.reach == 2048
    assert 0 < scattered.diagonals.mean() < 0.1
    for each in (masks, scattered):
        save_mask_set(each, tmp_path / "masks")
        np.testing.assert_array_equal(load_mask_set(tmp_path / "masks").diagonals, each.diagonals)
        assert (each.modes == HeadMode.DYNAMIC).tolist() == [[True, False, False, False]] * 4


def test_a_mask_file_holds_for_random_weights(model, tmp_path):
    masks = streaming(str(model), 3, 77)
    header = masks.header.model_copy(
        update={"fingerprint": Fingerprint(config=masks.header.fingerprint.config, weights="0f")}
    )
    file = tmp_path / "masks"
    save_mask_set(replace(masks, header=header), file)
    found = masks_of(Setup(DEMO, length=2048, page=32, window=1, masks=file), model)
    np.testing.assert_array_equal(found.diagonals, masks.diagonals)
    assert found.header.fingerprint == fingerprint(str(model), weights=False)


def test_masks_of_another_shape_are_refused(model, tmp_path):
    other = write_model(tmp_path / "other", replace(DEMO, head_size=64), 2048)
    file = tmp_path / "masks"
    save_mask_set(streaming(str(other), 3, 77), file)
    with pytest.raises(OptionError, match=r"--masks is '.*': was made for .*other"):
        masks_of(Setup(DEMO, length=2048, page=32, window=1, masks=file), model)
