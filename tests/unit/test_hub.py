"""Masks to the Hub and back, by the real client and a stand-in of the Hub."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from httpx import ConnectError, Request, Response
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from dam_vllm.hub import HubError, fetch, is_hub_id
from dam_vllm.masks.card import mask_card
from dam_vllm.masks.file import load_mask_set, save_mask_set
from tests.hub import TOKEN, Hub

# Commands of `dam-vllm`, and `find`, which finds masks as serving does; one process for many.
DRIVER = """
import json, os, sys
from typer.testing import CliRunner
from dam_vllm.cli.main import app
from dam_vllm.options import find_masks, parse_options

@app.command()
def find(masks: str, model: str, cache: str | None = None) -> None:
    options = parse_options({"dam": {"masks": masks} if masks != "-" else {}})
    print(find_masks(options, model, cache=cache))

for arguments, token in json.load(sys.stdin):
    os.environ["HF_TOKEN"] = token
    done = CliRunner().invoke(app, arguments)
    print(json.dumps([done.exit_code, done.stdout, done.stderr]), flush=True)
"""
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def hub():
    with Hub().running() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def ask(hub, home):
    """Runs commands as a user of the stand-in does: [exit code, stdout, stderr] of each."""

    def run(*commands, token=TOKEN, **environment):
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("HF_", "DAM_MASKS"))
        }
        mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", DRIVER], env=clean | mine | environment,
            input=json.dumps([([str(each) for each in command], token) for command in commands]),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


@pytest.fixture
def file(random_masks, tmp_path):
    save_mask_set(random_masks(), tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors"


def test_masks_go_to_the_hub_and_come_back(hub, ask, file):
    pushed, shown, served, beside, again = ask(
        ["push", file, "org/masks", "--private"],
        ["inspect", "org/masks", "--json"],
        ["find", "org/masks", "/no/model"],
        ["find", "-", "org/masks"],
        ["push", file, "org/masks"],
    )
    assert pushed[0] == again[0] == 0, pushed + again
    assert f"{hub.url}/org/masks/commit/" in pushed[1]
    stored = hub.repositories["org/masks"]
    assert stored["dam/masks.safetensors"] == file.read_bytes()
    assert hub.private["org/masks"] in (True, "private")
    assert stored["README.md"].decode() == mask_card(load_mask_set(file), "org/masks")
    assert json.loads(shown[1])["pcl"] == load_mask_set(file).pcl
    assert served[1].endswith("dam/masks.safetensors\n")
    assert beside == served

    # What is in the cache serves without a network.
    assert ask(["find", "org/masks", "/no/model"], **OFFLINE)[0][0] == 0


@pytest.mark.parametrize("place", [("org/kept", "/no/model"), ("-", "org/kept")])
def test_a_folder_for_downloads_is_the_cache(hub, home, ask, file, tmp_path, place):
    hub.repositories["org/kept"] = {"dam/masks.safetensors": file.read_bytes()}
    (found,) = ask(["find", *place, "--cache", tmp_path / "cache"])
    assert found[1].startswith(str(tmp_path / "cache")), found
    assert not list(home.rglob("*kept*"))


def refused(found, status=1):
    """The line of an error."""
    assert (found[0], found[1]) == (status, ""), found
    assert len(found[2].splitlines()) == 1
    return found[2]


def test_what_the_hub_refuses_is_one_line(hub, ask, file):
    hub.repositories["org/empty"] = {}
    hub.gated.add("org/gated")
    expected = {
        ("inspect", "org/none"): "'org/none' does not exist, or is private: check the name",
        ("inspect", "org/empty"): "'org/empty' holds no dam/masks.safetensors",
        ("inspect", "org/gated"): "'org/gated': no access; log in with `hf auth login`",
        ("eval", "org/none", "--masks", "org/empty"): "'org/empty' holds no",
    }
    for found, told in zip(ask(*expected), expected.values(), strict=True):
        assert told in refused(found)
    (found,) = ask(["push", file, "org/other"], token="hf_wrong")
    assert "'org/other': no access; log in" in refused(found)
    for found in ask(["inspect", "org/none"], ["push", file, "org/other"], **OFFLINE):
        assert "HF_HUB_OFFLINE is set: unset it, or give a file" in refused(found)
    assert "org/other" not in hub.repositories


def test_serving_says_what_the_hub_refused(hub, ask, file):
    hub.repositories["org/empty"] = {}
    named, beside, without = ask(
        ["find", "org/empty", "/no/model"], ["find", "-", "org/none"], ["push", file, "masks"]
    )
    assert "dam.masks is 'org/empty': Hub repository 'org/empty' holds no" in refused(named, 2)
    told = refused(beside, 2)
    assert "no mask file: set --additional-config" in told
    assert "Hub repository 'org/none' does not exist" in told
    assert "REPOSITORY is 'masks', must be a Hub id of the form" in refused(without, 2)


# What the Hub answers for a repository that is not there, where nobody is logged in.
UNKNOWN = Response(401, request=Request("GET", "https://huggingface.co/org/a"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LocalEntryNotFoundError("no file"), r"https://\S+ cannot be reached: check the network"),
        (ConnectError("refused"), r"https://\S+ cannot be reached: check the network"),
        (RepositoryNotFoundError("401", response=UNKNOWN), "does not exist, or is private"),
        (GatedRepoError("403", response=UNKNOWN), "no access; log in"),
        (HfHubHTTPError("why\nmore", response=Response(503, request=UNKNOWN.request)), "why$"),
    ],
)
def test_what_the_client_raises_is_told(monkeypatch, error, told):
    """In this process: the client itself would wait and try again, or wants https."""

    def fails(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fails)
    with pytest.raises(HubError, match=f"'org/a'.*{told}"):
        fetch("org/a")


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
