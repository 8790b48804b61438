from typing import get_args

import pytest
import yaml

from dam_vllm.calibration.errors import CalibrationError
from dam_vllm.calibration.fit.costs import MEASURED
from dam_vllm.calibration.settings import (
    Amplification,
    CalibrationConfig,
    FitConfig,
    Platform,
    for_platform,
)
from dam_vllm.calibration.settings_file import described, load_config
from dam_vllm.options import PAGE_MULTIPLES


def test_defaults_are_the_papers():
    config = CalibrationConfig()
    assert (config.tau, config.mu, config.amplification.name) == (0.3, 0.8, "box-cox")
    assert (config.amplification.lambda_, config.amplification.epsilon) == (0.5, 1e-8)


def test_options_go_before_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("pcl: 64\nseed: 3\namplification: {lambda: 0.25}\n")
    config = load_config([file], {"pcl": 32, "seed": None})
    assert (config.pcl, config.seed, config.amplification.lambda_) == (32, 3, 0.25)


def test_targets_of_the_fit(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("held_out: 0.2\nfit: {target_error: 0.1, page: 64}\n")
    config = load_config([file], {"target_kv_memory": 0.5})
    assert (config.fit.target_error, config.fit.target_kv_memory) == (0.1, 0.5)
    config = load_config([file], {"target_density": 0.2})
    assert (config.fit.target_error, config.fit.target_density, config.fit.page) == (None, 0.2, 64)
    with pytest.raises(CalibrationError, match="exactly one of them must be given"):
        load_config([], {"held_out": 0.2, "target_kv_memory": 0.5})


def test_a_file_goes_before_those_named_earlier(tmp_path):
    low, high = tmp_path / "low.yaml", tmp_path / "high.yaml"
    low.write_text("pcl: 64\nseed: 3\nfit: {target_error: 0.1, page: 64}\n")
    high.write_text("seed: 4\nfit: {target_density: 0.2, plain: 7}\n")
    config = load_config([low, high], {})
    assert (config.pcl, config.seed, config.fit.page, config.fit.plain) == (64, 4, 64, 7)
    assert (config.fit.target_error, config.fit.target_density) == (None, 0.2)
    high.write_text("mu: 2")
    with pytest.raises(CalibrationError, match=r"low\.yaml, .*high\.yaml: mu is 2"):
        load_config([low, high], {})


def test_settings_are_written_with_what_they_mean_and_read_back(tmp_path):
    config = load_config([], {"pcl": 64, "target_density": 0.2})
    file = tmp_path / "written.yaml"
    file.write_text(described(config))
    assert load_config([file], {}) == config
    lines = file.read_text().splitlines()
    assert (
        lines.index("tau: 0.3")
        == lines.index("# Threshold of the true mask, on the amplified scale.") + 1
    )
    assert yaml.safe_load(described(load_config([], {})))["fit"] is None


def test_the_platform_of_a_fit_is_the_calibrations_unless_told():
    fit = {"target_density": 0.2, "page": 48}
    config = CalibrationConfig(fit=fit)
    assert for_platform(config, "cuda").fit.platform == "cuda"
    with pytest.raises(CalibrationError, match=r"fit.page is 48, .* 32 where fit.platform is cpu"):
        for_platform(config, "cpu")
    told = CalibrationConfig(fit=fit | {"platform": "cuda"})
    assert for_platform(told, "cpu") == told
    assert for_platform(CalibrationConfig(), "cpu") == CalibrationConfig()


def test_every_platform_has_pages_and_costs():
    assert set(get_args(Platform)) == set(PAGE_MULTIPLES) == set(MEASURED)


@pytest.mark.parametrize("schema", [CalibrationConfig, FitConfig, Amplification])
def test_every_setting_is_explained(schema):
    assert [name for name, field in schema.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tua: 0.3", "unknown key 'tua' (value 0.3); allowed are pcl, amplification, tau"),
        ("amplification: {lamda: 1}", "'amplification.lamda' (value 1); allowed are name, lambda"),
        ("amplification: {name: cube}", "amplification.name is 'cube': Input should be 'box-cox'"),
        ("mu: 1.5", "mu is 1.5: Input should be less than or equal to 1"),
        ("pcl: many", "pcl is 'many': Input should be a valid integer"),
        ("{pcl: 64, window: 32}", "window is 32, must be at least pcl (64)"),
        ("{pcl: 64, reach: 64}", "reach is 64, must be more than pcl (64)"),
        ("reach: 100", "reach is 100, must be a multiple of map_page (32)"),
        ("tau: .nan", "tau is nan: Input should be a finite number"),
        ("fit: {target_error: 0.1, lengths: [512, -5]}", "fit.lengths.1 is -5: Input should be gr"),
        ("fit: {target_error: 0.1, taus: [.inf]}", "fit.taus.0 is inf: Input should be a finite"),
        ("fit: {target_error: 0.1, platform: tpu}", "fit.platform is 'tpu': Input should be 'cpu'"),
        ("fit: {target_error: 0.1, mus: [0]}", "fit.mus.0 is 0: Input should be greater than 0"),
        ("fit: {target_error: 0.1, mus: [2.0]}", "fit.mus.0 is 2.0: Input should be less than or"),
        ("fit: {target_error: 0.1, channels: [0]}", "fit.channels.0 is 0: Input should be greater"),
        ("fit: {target_error: 0.1, channels: []}", "fit.channels is []: List should have at least"),
        ("[1, 2]", "holds a list, must hold keys and values"),
        ("a: [", "is no YAML file"),
    ],
)
def test_errors_name_key_value_and_what_is_allowed(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(CalibrationError) as error:
        load_config([file], {})
    assert message in str(error.value)
    assert str(file) in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(CalibrationError, match=r"--config is 'none\.yaml', must be a YAML file"):
        load_config(["none.yaml"], {})
