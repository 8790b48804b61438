"""Calibrations that are killed and gone on with: `python -m tests.kills --kills 200 --seed 1`.

A tiny random model is calibrated, with and without a fit. Then the same job is killed (SIGKILL)
again and again, each time at another moment: before a random change of the file system, or after a
random part of the time. What is gone on with must end in the same file, byte for byte, with nothing
left beside it.
"""

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed
from transformers.utils.logging import disable_progress_bar

from dam_vllm.calibration.model import ModelSource
from dam_vllm.calibration.pipeline import Job, calibrate
from dam_vllm.calibration.settings import CalibrationConfig, FitConfig
from dam_vllm.calibration.static import passes
from dam_vllm.demo import model_dir
from tests.unit.calibration.conftest import SMALL

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
STATIC = CalibrationConfig(
    pcl=40, tau=0.1, texts=16, window=60, held_out=0.3, batch_size=3, reach=84, map_page=4,
    long_texts=4,
)  # fmt: skip
FIT = FitConfig(
    target_density=0.9, page=32, lengths=[400], questions=1, plain=2, check=3, channels=[4],
    query_blocks=1, taus=[0.2], mus=[0.8],
)  # fmt: skip
CONFIGS = (STATIC, STATIC.model_copy(update={"fit": FIT}))


def prepare(folder):
    """Writes a random model with the demo's tokenizer, whose attention is far from uniform."""
    set_seed(0)
    small = SMALL | {"num_hidden_layers": 2, "vocab_size": 2304, "max_position_embeddings": 1024}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**small))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "embed" in name:
                weight.normal_(std=0.6)
    model.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    words = tokenizer.convert_ids_to_tokens(range(300, 800))
    texts = [" ".join(rng.choice(words, 500)) for _ in range(20)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "texts.jsonl").write_text("".join(lines))


def job(folder, config, output):
    """A calibration of the model."""
    source = ModelSource(str(folder / "model"), None, torch.device("cpu"), "auto")
    return Job(source, str(folder / "texts.jsonl"), "text", config, output, memory_gib=0.05)


def on_change(act):
    """Calls a function with the number of each change of a file system, before it is made."""
    count = itertools.count(1)

    def hook(event, arguments):
        if event in CHANGES or (event == "open" and arguments[2] & os.O_CREAT):
            act(next(count))

    sys.addaudithook(hook)


def die():
    """Ends this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment):
    """Lets this process die before its n-th change of a file system, or after some seconds."""
    changes, seconds = moment
    if changes:
        on_change(lambda count: count == changes and die())
    else:
        threading.Timer(seconds, die).start()


def run(job, prepare_child):
    """Calibrates in a process of its own: its exit status, negative where it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        passes.CHECKPOINT_SECONDS = 0
        prepare_child()
        calibrate(job)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Kills:
    """An unbroken calibration, and others of the same model and settings that are killed."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        whole, start = folder / "whole", time.monotonic()
        with (folder / "changes").open("w+b", buffering=0) as file:
            counting = partial(on_change, lambda count: os.pwrite(file.fileno(), b"%d" % count, 0))
            assert run(job(folder, config, whole), counting) == 0
            self.changes = int(file.read())
        self.seconds, self.expected = time.monotonic() - start, whole.read_bytes()

    def moment(self, rng):
        """A random one of a run from its start: a number of changes, or seconds."""
        if rng.random() < 0.7:
            return int(rng.integers(1, self.changes + 1)), None
        return None, rng.uniform(0, self.seconds)

    def one(self, rng):
        """Kills one calibration until it ends, and compares: how often it was killed."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        output, kills = folder / "masks", 0
        calibration = job(self.folder, self.config, output)
        while status := run(calibration, partial(arm, self.moment(rng))):
            assert status == -signal.SIGKILL, status
            kills += 1
        assert output.read_bytes() == self.expected
        assert list(folder.iterdir()) == [output]
        return kills


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10, help="at least so many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    jobs = total = 0
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        both = [Kills(Path(folder), config) for config in CONFIGS]
        while total < options.kills or jobs < len(both):
            try:
                total += both[jobs % 2].one(np.random.default_rng([options.seed, jobs]))
            except AssertionError as error:
                error.add_note(f"calibration {jobs} of --seed {options.seed}")
                raise
            jobs += 1
    changes = [each.changes for each in both]
    report = {"calibrations": jobs, "kills": total, "changes of files in one": changes}
    print(json.dumps({"seed": options.seed} | report))


if __name__ == "__main__":
    main()
