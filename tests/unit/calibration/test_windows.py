import pytest
import torch

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.memory import choose_lengths, choose_pcl, layer_passes
from dam_vllm.calibration.settings import CalibrationConfig
from dam_vllm.calibration.texts import TokenisedTexts, cut, pad, special_prefix, tokenise
from dam_vllm.masks.mask_set import lower_bytes
from dam_vllm.masks.model_shape import ModelShape


def test_the_prefix_is_what_starts_a_text(tokenizer):
    assert special_prefix(tokenizer) == [1]  # BOS; EOS at the end is left out


def test_every_window_starts_with_the_prefix_and_none_overlap():
    documents = [list(range(10, 30)), list(range(30, 35))]
    windows = cut(documents, [1], 9, 10)
    assert [window[0] for window in windows] == [1] * 4
    assert [len(window) for window in windows] == [9, 9, 6, 5]
    tokens = [token for window in windows for token in window[1:]]
    assert sorted(tokens) == list(range(10, 35))
    assert cut(documents, [1], 9, 2) == windows[:2]


def test_short_last_pieces_are_dropped():
    assert cut([list(range(17))], [], 8, 9) == [list(range(8)), list(range(8, 16))]


def test_the_split_is_by_seed_and_never_overlaps(tokenizer):
    documents = [f"w{index} w{index + 1}" for index in range(20)]
    texts = tokenise(documents, tokenizer, 0.25, 0)
    assert (len(texts.calibration), len(texts.held_out)) == (15, 5)
    assert not [document for document in texts.held_out if document in texts.calibration]
    assert tokenise(documents, tokenizer, 0.25, 0) == texts
    assert tokenise(documents, tokenizer, 0.25, 1).held_out != texts.held_out


def test_a_single_document_is_cut_in_two(tokenizer):
    texts = tokenise([" ".join(f"w{index}" for index in range(40))], tokenizer, 0.25, 0)
    assert [len(part[0]) for part in (texts.calibration, texts.held_out)] == [30, 10]
    assert set(texts.calibration[0]).isdisjoint(texts.held_out[0])


def test_pad_on_the_right():
    ids, lengths = pad([[5, 6, 7], [8]])
    assert (ids.tolist(), lengths) == ([[5, 6, 7], [8, 0, 0]], [3, 1])
    assert ids.dtype == torch.int64


TEXTS = TokenisedTexts([1], [[0] * 799] * 10, [])


def test_the_pcl_is_bounded_by_texts_model_and_memory():
    plenty = 2**34
    assert choose_pcl(None, TEXTS, 10, 4, plenty, {}).pcl == 768  # 800, in steps of 64
    assert choose_pcl(None, TEXTS, 10, 4, plenty, {"the model's": 500}).pcl == 448
    chosen = choose_pcl(None, TEXTS, 10, 4, 3 * 4 * 4 * 200**2, {"the model's": 9999})
    assert chosen.pcl == 192
    assert "memory" in chosen.reason


def test_a_pcl_that_cannot_be_is_refused():
    with pytest.raises(CalibrationError, match="pcl is 600, must be at most 500 for the model's"):
        choose_pcl(600, TEXTS, 10, 4, 2**34, {"the model's": 500, "others": 501})


def test_a_pcl_that_no_mask_file_holds_is_refused_before_maps_are_captured(tmp_path, monkeypatch):
    shape = ModelShape(["full"] * 3, 4, 2, 9999, 8)
    monkeypatch.setattr("dam_vllm.masks.file.MAX_BYTES", 3 * 4 * (100**2 // 8 + 2 * 256))
    for reach, most in ((256, 100), (None, 110)):
        config = CalibrationConfig(pcl=128, reach=reach)
        message = f"pcl is 128, must be at most {most} for what a mask file may hold"
        with pytest.raises(CalibrationError, match=message):
            choose_lengths(config, shape, TEXTS, 2**34, tmp_path)
        bits = lower_bytes(most)
        assert 2 * bits + 2 * (reach or most) == pytest.approx(100**2 // 8 + 2 * 256, rel=0.03)


def test_layers_are_grouped_within_memory():
    one = 4 * 64 * 64 * 4
    assert layer_passes([0, 2, 3, 5], 4, 64, 4 * one) == [[0, 2], [3, 5]]
    assert layer_passes([0, 2, 3], 4, 64, 3 * one) == [[0], [2], [3]]
