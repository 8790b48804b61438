from pathlib import Path

import pytest

from dam_vllm.options import OptionError, find_masks, masks_output_option, parse_options


def test_defaults_where_nothing_is_said():
    assert parse_options({}).kernel == "auto"
    assert parse_options({"dam": {"dense_below": 0}}).dense_below == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask": "x"}, r"unknown option 'dam.mask'; allowed are masks, target_density"),
        ({"dense_below": -1}, r"dam.dense_below is -1"),
        ({"kernel": "fast"}, r"dam.kernel is 'fast': .*'auto', 'flash', 'triton' or 'naive'"),
        ({"kv_free": "heads"}, r"dam.kv_free is 'heads': .*'auto', 'off', 'layer' or 'head'"),
        ({"target_density": 0}, r"dam.target_density is 0: .*greater than 0"),
        (
            {"target_density": 0.1, "target_error": 0.2},
            r"dam: target_density is 0\.1 and target_error is 0\.2: at most one",
        ),
        ("masks", r'"dam" is \'masks\', must be an object'),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(OptionError, match=message):
        parse_options({"dam": values})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"masks": "x"}, "'masks' is 'x'"),
        ({"dam": {}, "dense_below": 0}, "'dense_below' is 0"),
        ({"DAM": {"masks": "x"}}, "'DAM' is {'masks': 'x'}"),
    ],
)
def test_options_outside_of_their_level(config, named):
    with pytest.raises(OptionError) as error:
        parse_options(config)
    assert str(error.value).startswith(f"--additional-config: {named} at the top")
    assert 'must stand under "dam", as {"dam": {"masks": PATH}}' in str(error.value)


def test_other_plugins_keys_are_left_alone():
    assert parse_options({"ascend": {"masks": "x"}, "dam": {"masks": "y"}}).masks == "y"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A model folder with masks of its own, and two mask files elsewhere."""
    monkeypatch.delenv("DAM_MASKS", raising=False)
    files = {name: tmp_path / name for name in ("option", "variable")}
    files["model"] = tmp_path / "model" / "dam" / "masks.safetensors"
    files["model"].parent.mkdir(parents=True)
    for file in files.values():
        file.touch()
    return files


def test_option_comes_before_variable_before_model(places, monkeypatch, tmp_path):
    model = str(tmp_path / "model")
    assert find_masks(parse_options({}), model) == places["model"]
    monkeypatch.setenv("DAM_MASKS", "")
    assert find_masks(parse_options({}), model) == places["model"]
    monkeypatch.setenv("DAM_MASKS", str(places["variable"]))
    assert find_masks(parse_options({}), model) == places["variable"]
    options = parse_options({"dam": {"masks": str(places["option"])}})
    assert find_masks(options, model) == places["option"]
    assert find_masks(parse_options({"dam": {"masks": model}}), "other") == places["model"]


def test_masks_are_not_written_among_weights(tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.chdir(model)
    for place in (model / "masks.safetensors", Path("masks.safetensors")):
        with pytest.raises(OptionError, match=r"in the model's folder, .* as \S+/dam/masks.safet"):
            masks_output_option(place, str(model))
    with pytest.raises(OptionError, match=r"--output is '.*', a folder; must be a file"):
        masks_output_option(model, None)
    for place, name in (
        ("masks", str(model)),
        ("dam/masks.safetensors", str(model)),
        ("masks.safetensors", "org/model"),
        ("masks.safetensors", None),
    ):
        masks_output_option(Path(place), name)


def test_no_masks_anywhere(tmp_path):
    with pytest.raises(OptionError, match="no mask file: set --additional-config"):
        find_masks(parse_options({}), str(tmp_path))


def test_named_masks_do_not_exist(places, monkeypatch, tmp_path):
    options = parse_options({"dam": {"masks": "no/where"}})
    with pytest.raises(OptionError, match=r"dam\.masks is 'no/where'"):
        find_masks(options, str(tmp_path / "model"))
    monkeypatch.setenv("DAM_MASKS", "nowhere.safetensors")
    with pytest.raises(OptionError, match=r"DAM_MASKS is 'nowhere\.safetensors'"):
        find_masks(parse_options({}), str(tmp_path / "model"))
