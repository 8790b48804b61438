"""Masks to the Hub and back, by the real client and a stand-in of the Hub."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from httpx import ConnectError
from huggingface_hub.errors import LocalEntryNotFoundError

from dam_vllm.hub import HubError, fetch, is_hub_id
from dam_vllm.masks.card import mask_card
from dam_vllm.masks.file import load_mask_set, save_mask_set
from tests.hub import TOKEN, Hub

FIND = """
import sys
from dam_vllm.options import OptionError, find_masks, parse_options
masks = [{"dam": {"masks": sys.argv[1]}}, {}][sys.argv[1] == "-"]
try:
    print(find_masks(parse_options(masks), sys.argv[2]))
except OptionError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.fixture(scope="module")
def hub():
    with Hub().running() as running:
        yield running


@pytest.fixture
def ask(hub, tmp_path):
    """Runs a command of Python's as a user of the stand-in does."""

    def run(*arguments, **environment):
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "DAM_MASKS"))
        }
        mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN,
                "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=clean | mine | environment, capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.fixture
def file(random_masks, tmp_path):
    save_mask_set(random_masks(), tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors"


def test_masks_go_to_the_hub_and_come_back(hub, ask, file):
    command = ("-m", "dam_vllm")
    done = ask(*command, "push", file, "org/masks", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/org/masks/commit/" in done.stdout
    stored = hub.repositories["org/masks"]
    assert stored["dam/masks.safetensors"] == file.read_bytes()
    assert hub.private["org/masks"] in (True, "private")
    assert stored["README.md"].decode() == mask_card(load_mask_set(file), "org/masks")

    shown = ask(*command, "inspect", "org/masks", "--json")
    assert json.loads(shown.stdout)["pcl"] == load_mask_set(file).pcl, shown.stderr
    served = ask("-c", FIND, "org/masks", "/no/model")
    assert served.stdout.strip().endswith("dam/masks.safetensors"), served.stderr
    beside = ask("-c", FIND, "-", "org/masks")
    assert beside.stdout == served.stdout
    # What is in the cache serves without a network.
    offline = ask("-c", FIND, "org/masks", "/no/model", HF_HUB_OFFLINE="1")
    assert offline.stdout == served.stdout

    again = ask(*command, "push", file, "org/masks")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["inspect", "org/none"], {}, "'org/none' does not exist, or is private: check the name"),
        (["inspect", "org/empty"], {}, "'org/empty' holds no dam/masks.safetensors"),
        (["inspect", "org/gated"], {}, "'org/gated': no access; log in with `hf auth login`"),
        (["inspect", "org/none"], {"HF_HUB_OFFLINE": "1"},
         "is not in the cache, and HF_HUB_OFFLINE is set: unset it, or give a file"),
        (["eval", "org/none", "--masks", "org/empty"], {}, "'org/empty' holds no"),
        (["push", "FILE", "org/masks"], {"HF_TOKEN": "hf_wrong"}, "'org/masks': no access; log in"),
        (["push", "FILE", "org/masks"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(hub, ask, file, arguments, environment, told):
    hub.repositories["org/empty"] = {}
    hub.gated.add("org/gated")
    given = [str(file) if each == "FILE" else each for each in arguments]
    done = ask("-m", "dam_vllm", *given, **environment)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: Hub repository 'org/")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no file"), ConnectError("refused")])
def test_a_hub_that_cannot_be_reached_is_named(monkeypatch, error):
    """In this process: the client would wait and try again."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(
        HubError, match=r"'org/a': https://\S+ cannot be reached: check the network"
    ):
        fetch("org/a")


@pytest.mark.parametrize(
    ("masks", "model", "told"),
    [
        ("org/empty", "/no/model", "dam.masks is 'org/empty': Hub repository 'org/empty' holds no"),
        ("-", "org/none", "no mask file: set --additional-config"),
    ],
)
def test_serving_says_what_the_hub_refused(hub, ask, masks, model, told):
    hub.repositories["org/empty"] = {}
    done = ask("-c", FIND, masks, model)
    assert done.stderr.startswith(f"refused: {told}" if masks != "-" else "refused: no mask file")
    assert "Hub repository 'org/" in done.stderr
    assert told in done.stderr


def test_an_id_without_organisation_is_refused_before_anything(ask, file):
    done = ask("-m", "dam_vllm", "push", file, "masks")
    assert done.returncode == 2
    assert "REPOSITORY is 'masks', must be a Hub id of the form" in done.stderr


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("org/name", True), ("my-org/Llama-3.1_8B", True), ("name", False), ("a/b/c", False),
        ("/a/b", False), ("../a", False), ("out/masks.safetensors", False), ("org/na me", False),
    ],
)  # fmt: skip
def test_what_looks_like_an_id(place, expected):
    assert is_hub_id(place) == expected


def test_the_card_tells_what_the_masks_are(random_masks):
    masks = random_masks(dynamic=True)
    header = masks.header.model_copy(
        update={
            "model": "org/model",
            "parameters": {"tau": 0.1},
            "quality": {"worst": {"task": "kv", "accuracy": 0.75}},
        }
    )
    object.__setattr__(masks, "header", header)
    card = mask_card(masks, "org/masks")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/model"
    assert front["library_name"] == "dam-vllm"
    for words in ("vllm serve org/model", '"masks": "org/masks"', "| `tau` | `0.1` |",
                  "| `dynamic KV heads` | `2` |", '"accuracy": 0.75'):  # fmt: skip
        assert words in card


def test_a_header_cannot_break_out_of_the_card(random_masks):
    masks = random_masks()
    bad = {"parameters": {"x`|<script>": "`<b>"}, "model": "/home/me/`$(rm)`; x"}
    object.__setattr__(masks, "header", masks.header.model_copy(update=bad))
    card = mask_card(masks, "org/masks")
    assert "/home/me" not in card
    assert "$(rm)" not in next(line for line in card.splitlines() if "vllm serve" in line)
    assert "| `x  <script>` |" in card
