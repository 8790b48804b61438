from dataclasses import replace

import numpy as np
import pytest
import torch

from dam_vllm.calibration import memory, pipeline
from dam_vllm.calibration.errors import CalibrationError, CalibrationStopped
from dam_vllm.calibration.model import ModelSource
from dam_vllm.calibration.pipeline import Job, calibrate
from dam_vllm.calibration.progress import Reporter, Work
from dam_vllm.calibration.settings import CalibrationConfig, FitConfig
from dam_vllm.calibration.static import passes
from dam_vllm.masks.file import load_mask_set
from tests.unit.calibration.conftest import build, save_tokenizer

CONFIG = CalibrationConfig(pcl=40, tau=0.1, texts=16, window=60, held_out=0.2, batch_size=3)
ARRAYS = ("columns", "diagonals", "true_bits", "modes", "coverage", "coverage_extended")
REACHING = CONFIG.model_copy(
    update={"pcl": 24, "window": 60, "reach": 84, "map_page": 4, "long_texts": 7, "tau": 0.05}
)
MAPS_GIB = 4 * 40 * 40 * 4 / 2**30  # of one layer


@pytest.fixture
def make(model_folder, texts_file, tmp_path):
    def make(name="masks", config=CONFIG, memory=1.0, model=model_folder):
        source = ModelSource(str(model), None, torch.device("cpu"), "auto")
        return Job(
            source, str(texts_file), "text", config, tmp_path / f"{name}.safetensors", memory
        )

    return make


def same(left, right):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def stop_after(batches):
    calls = []

    def stop():
        calls.append(1)
        return len(calls) == batches

    return Reporter(stop=stop)


def test_the_file_holds_what_was_made(make):
    job = make()
    masks = calibrate(job)
    same(load_mask_set(job.output), masks)
    assert not job.checkpoint.exists()
    parameters = masks.header.parameters
    assert (parameters["pcl"], parameters["min_support"], parameters["tau"]) == (40, 5, 0.1)
    assert parameters["amplification"] == {"name": "box-cox", "lambda": 0.5, "epsilon": 1e-8}
    assert masks.true_mask(0)[:, 0, 0].all()
    assert ((masks.coverage > 0) & (masks.coverage <= 1.0001)).all()
    assert np.isfinite(masks.coverage_extended).all()


def test_group_by_group_equals_all_at_once(make):
    progress, said = [], []
    all_at_once = calibrate(make("all"))
    reporter = Reporter(say=said.append, progress=lambda *work: progress.append(work))
    grouped = calibrate(make("grouped", memory=3 * MAPS_GIB), reporter)
    assert "3 pass(es)" in said[0]
    same(grouped, all_at_once)
    done, total = zip(*progress, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == total[-1]


@pytest.mark.parametrize("batches", [2, 7])
def test_interrupt_and_resume_equals_an_uninterrupted_run(make, batches):
    memory = 3 * MAPS_GIB  # a layer a pass, five batches each: stops inside passes 0 and 1
    whole = calibrate(make("whole", memory=memory))
    job = make("stopped", memory=memory)
    with pytest.raises(CalibrationStopped):
        calibrate(job, stop_after(batches))
    assert job.checkpoint.is_dir()
    assert not job.output.exists()
    progress = []
    same(calibrate(job, Reporter(progress=lambda *work: progress.append(work))), whole)
    assert len(progress) == 3 * 5 + 1 - batches
    assert not job.checkpoint.exists()


@pytest.mark.parametrize("batches", [2, 17, 30])
def test_resumed_maps_of_pages_equal_uninterrupted_ones(make, batches):
    """A layer a pass: 5 batches each of maps of tokens, then 7 each of maps of pages."""
    memory = 3 * MAPS_GIB * 24**2 / 40**2
    progress = []
    count = Reporter(progress=lambda *work: progress.append(work))
    whole = calibrate(make("whole", REACHING, memory), count)
    done, total = zip(*progress, strict=True)
    assert done[-1] == total[-1]
    batches_of_all, former = len(progress), list(progress)
    job = make("stopped", REACHING, memory)
    with pytest.raises(CalibrationStopped):
        calibrate(job, stop_after(batches))
    progress.clear()
    same(calibrate(job, count), whole)
    assert progress == former[batches:]
    assert len(progress) == batches_of_all - batches


def test_the_file_tells_the_reach_and_its_windows(make):
    said = []
    masks = calibrate(make(config=REACHING), Reporter(say=said.append))
    assert (masks.pcl, masks.reach, masks.header.reach) == (24, 84, 84)
    parameters = masks.header.parameters
    assert (parameters["reach"], parameters["map_page"], parameters["seed"]) == (84, 4, 0)
    lengths = parameters["long_windows"]
    assert len(lengths) == 7
    assert lengths[0] == 84
    assert f"7 of {lengths[-1]} to 84 tokens for maps of pages" in said[0]
    near = calibrate(make("near", REACHING.model_copy(update={"reach": None})))
    for name in ("columns", "diagonals"):
        np.testing.assert_array_equal(getattr(masks, name)[..., :24], getattr(near, name))
    assert masks.columns[..., 24:].any()


@pytest.mark.parametrize(
    ("reach", "memory", "message"),
    [
        (100, 1.0, r"reach is 100, must be at most \d\d for the texts' lengths \(--data\)"),
        (80, 4e-5, r"reach is 80, must be at most 58 for memory \(0.0 GiB, see --memory-gib\)"),
    ],
)
def test_a_reach_that_cannot_be_is_refused(make, reach, memory, message):
    config = REACHING.model_copy(update={"reach": reach, "pcl": 16, "map_page": 2})
    with pytest.raises(CalibrationError, match=message):
        calibrate(make(config=config, memory=memory))


def test_a_chosen_pcl_leaves_no_reach_below_it(make):
    config = REACHING.model_copy(update={"pcl": None, "reach": 40})
    with pytest.raises(CalibrationError, match=r"reach is 40, must be more than the PCL \(\d+\)"):
        calibrate(make(config=config))


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ({"lengths": [512]}, "fit.lengths holds 512, must be at most the model's 256 positions"),
        ({"lengths": [256], "channels": [4, 9]},
         "fit.channels holds 9, must be at most the model's 8 channels a head"),
        ({"page": 48}, "fit.page is 48, must be a multiple of 32 where fit.platform is cpu"),
    ],
)  # fmt: skip
def test_a_fit_beyond_the_model_is_refused(make, fit, message):
    fit = FitConfig(target_density=0.5, **fit)
    with pytest.raises(CalibrationError, match=message):
        calibrate(make(config=CONFIG.model_copy(update={"fit": fit})))


def test_a_run_that_goes_on_keeps_the_memory_and_platform_of_the_first(make, monkeypatch):
    """However much memory is free then."""
    seen, said = [], []

    def fit_modes(inputs, prompts):
        seen.append((inputs.memory, inputs.config.platform))
        raise CalibrationStopped

    monkeypatch.setattr(pipeline, "fit_modes", fit_modes)
    monkeypatch.setattr(pipeline, "fit_prompts", lambda *texts: [])
    fit = FitConfig(target_density=0.5, lengths=[256])
    job = make(config=CONFIG.model_copy(update={"fit": fit}), memory=None)
    for gib in (3, 2, 9):
        monkeypatch.setattr(memory, "free_bytes", lambda device, gib=gib: gib * 2**30)
        with pytest.raises(CalibrationStopped):
            calibrate(job, Reporter(say=said.append))
    assert seen == [(3 * 2**29, "cpu")] * 3
    assert all("1 pass(es) within 1.50 GiB" in each for each in said)
    with pytest.raises(CalibrationError, match="was made with other settings"):
        calibrate(replace(job, memory_gib=1.0))


def test_a_checkpoint_every_few_batches_survives_a_crash(make, monkeypatch):
    monkeypatch.setattr(passes, "CHECKPOINT_SECONDS", 0)
    job, calls = make("crash"), []

    def crash():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError
        return False

    with pytest.raises(RuntimeError):
        calibrate(job, Reporter(stop=crash))
    progress = []
    masks = calibrate(job, Reporter(progress=lambda *work: progress.append(work)))
    assert len(progress) == 5 + 1 - 2
    same(masks, calibrate(make("whole")))


def test_a_checkpoint_of_other_settings_is_refused(make):
    job = make()
    with pytest.raises(CalibrationStopped):
        calibrate(job, stop_after(1))
    other = make(config=CONFIG.model_copy(update={"seed": 1}))
    with pytest.raises(CalibrationError, match=r"masks.safetensors.partial was made with other"):
        calibrate(other)
    calibrate(job)


def test_what_an_older_version_left_is_refused(make, monkeypatch):
    """It may hold arrays of other shapes."""
    job = make()
    with monkeypatch.context() as older:
        older.setattr("dam_vllm.calibration.checkpoint.FORMAT", 1)
        with pytest.raises(CalibrationStopped):
            calibrate(job, stop_after(1))
    with pytest.raises(CalibrationError, match=r"was made with other .*versions"):
        calibrate(job)


def test_sliding_layers_are_left_out(make, tmp_path):
    folder = tmp_path / "gemma"
    build("gemma").save_pretrained(folder)
    save_tokenizer(folder)
    masks = calibrate(make(model=folder))
    assert masks.header.layer_types == ["sliding", "full", "sliding", "full"]
    assert not masks.columns[[0, 2]].any()
    assert not masks.true_bits[[0, 2]].any()
    assert np.isnan(masks.coverage[0]).all()
    assert np.isfinite(masks.coverage[[1, 3]]).all()


def test_a_model_of_sliding_layers_only_is_refused(make, tmp_path):
    folder = tmp_path / "mistral"
    build("sliding").save_pretrained(folder)
    with pytest.raises(CalibrationError, match="has no full-attention layer"):
        calibrate(make(model=folder))


def test_the_pcl_is_chosen_and_told(make):
    said = []
    config = CONFIG.model_copy(update={"pcl": None})
    masks = calibrate(make(config=config), Reporter(say=said.append))
    assert 16 <= masks.pcl <= 60
    assert said[0].startswith(f"PCL {masks.pcl} tokens (")


def test_work_that_was_needless_is_done_at_the_end():
    progress = []
    work = Work(Reporter(progress=lambda *told: progress.append(told)), 100)
    work.advance([[1, 2, 3]], [0, 4])
    work.end()
    work.end()
    assert progress == [(15, 100), (100, 100)]
