"""`dam-vllm eval` as a user calls it, with pretended servers."""

import json
import re
import shutil
from contextlib import contextmanager

import pytest
import torch
from typer.testing import CliRunner

from dam_vllm import machine
from dam_vllm.cli import eval as cli
from dam_vllm.cli.eval import spread
from dam_vllm.cli.main import app
from dam_vllm.cli.program import plain_console
from dam_vllm.evaluation import subjects
from dam_vllm.evaluation.client import Reply
from dam_vllm.evaluation.settings import STOCK, Settings, Subject
from dam_vllm.masks.baselines import dense, streaming
from dam_vllm.masks.file import load_mask_set, save_mask_set
from tests.unit.evaluation.conftest import MODEL, Pretender, Servers

SMALL = ("--tasks", "lines,words", "--lengths", "768,512", "--samples", 3, "--seed", 5)


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(machine.__dict__, "_vllm", lambda: "0.32.0")


@pytest.fixture
def files(tmp_path):
    save_mask_set(dense(MODEL), tmp_path / "full")
    save_mask_set(streaming(MODEL, 4, 40), tmp_path / "half")
    return [tmp_path / "full", tmp_path / "half"]


@pytest.fixture
def servers(tokenizer, settings, monkeypatch):
    density = {"full": (1, 1), "half": (7, 10), "streaming": (71, 100)}
    pretended = Servers(tokenizer, settings(), density)
    monkeypatch.setattr(subjects, "starter", lambda settings, chat: pretended.start)
    return pretended


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("M --masks A B --seed 1", "M --masks A --masks B --seed 1"),
        ("M --masks A --masks B C", "M --masks A --masks B --masks C"),
        ("--masks A B -- M", "--masks A --masks B -- M"),
        ("M --masks=A --json B", "M --masks=A --json B"),
        ("M --json B C", "M --json B C"),
        ("M --masks", "M --masks"),
    ],
)
def test_masks_takes_several_values(given, expected):
    assert spread(given.split(), "--masks") == expected.split()


def test_results(servers, files, tmp_path):
    output, image = tmp_path / "a.json", tmp_path / "new" / "a.png"
    done = run(MODEL, "--masks", *files, *SMALL, "--json", output, "--plot", image)
    assert done.exit_code == 0, done.output
    assert servers.started == ["dense", "full", "half", *["streaming@half"] * 2]
    results = json.loads(output.read_text())
    rows = results["rows"]
    assert {(row["masks"], row["task"], row["length"]) for row in rows} == {
        (masks, task, length)
        for masks in ("dense", "full", "half", "streaming@half")
        for task in ("lines", "words")
        for length in (512, 768)
    }
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert row["density"] == {"half": 0.7, "streaming@half": 0.71}.get(row["masks"], 1.0)
        assert row["seconds"] == 0.5
    assert results["agreement"] == []
    assert [row["masks"] for row in results["worst"]] == ["full", "half"]
    assert results["settings"]["lengths"] == [512, 768]
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "half: worst task lines at 768 tokens" in done.output


def test_names_in_brackets_are_shown_as_they_are(servers, files, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "PROGRESS", plain_console(stderr=True, force_terminal=True))
    odd = files[1].rename(tmp_path / "[v2]half:key:")
    servers.density[odd.name] = (7, 10)
    done = run(MODEL, "--masks", odd, *SMALL, "--no-streaming")
    assert done.exit_code == 0, done.output
    assert odd.name in done.stderr
    assert f"{odd.name}: worst task" in done.stdout
    assert done.stdout.count(odd.name) == 2


def test_same_command_goes_on_and_fresh_starts_anew(servers, files):
    arguments = (MODEL, "--masks", *files, *SMALL, "--no-streaming")
    servers.limit = 20
    stopped = run(*arguments)
    assert stopped.exit_code == 130
    assert "The same command goes on" in stopped.output
    servers.limit = None
    servers.started.clear()
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert servers.started == ["full", "half"]
    servers.started.clear()
    assert run(*arguments).output == done.output
    assert servers.started == []
    run(*arguments, "--fresh")
    assert servers.started == ["dense", "full", "half"]


@pytest.mark.parametrize(
    "changed",
    [("--page", 64), ("--dense-below", 512), ("--serve-args", "--dtype float32")],
)
def test_other_settings_are_asked_anew(servers, files, changed):
    arguments = (MODEL, "--masks", files[0], *SMALL, "--no-streaming")
    run(*arguments)
    servers.started.clear()
    assert run(*arguments, *changed).exit_code == 0
    assert servers.started == ["dense", "full"]


def test_other_keys_and_completions(tokenizer, monkeypatch):
    asked, chats = [], []

    class Mute(Pretender):
        def ask(self, prompt, tokens):
            asked.append(prompt)
            return Reply("?", 0.5)

    @contextmanager
    def start(subject):
        yield Mute(None, subject)

    monkeypatch.setattr(subjects, "starter", lambda settings, chat: chats.append(chat) or start)
    changed = ("--tasks", "kv", "--lengths", 512, "--keys", "number", "--completion")
    assert run(MODEL, *SMALL, *changed).exit_code == 0
    assert chats == [False]
    assert len(asked) == 4
    for prompt in asked:
        assert re.fullmatch(r'("\d{4}": \d+,\n){5,}"\d{4}":', prompt)
        assert 400 < len(tokenizer(prompt).input_ids) <= 512


def test_write_stores_the_report_and_keeps_the_answers(servers, files):
    arguments = (MODEL, "--masks", *files, *SMALL, "--no-streaming")
    done = run(*arguments, "--write")
    assert done.exit_code == 0, done.output
    for file, worst in zip(files, (0.0, -1.0), strict=True):
        masks = load_mask_set(file)
        assert masks.header.quality["worst"]["difference"] == worst
        assert masks.header.quality["tasks"]["lines"]["768"]["accuracy"] == 1.0 + worst
    assert masks.columns.any()
    shown = CliRunner().invoke(app, ["inspect", str(files[1]), "--json"])
    assert json.loads(shown.output)["quality"] == masks.header.quality
    servers.started.clear()
    assert run(*arguments).exit_code == 0
    assert servers.started == []


def test_agreement_on_a_text(servers, files, tmp_path):
    text, output = tmp_path / "text.jsonl", tmp_path / "a.json"
    lines = [json.dumps({"text": "def add(a, b):\n    return a + b\n" * 40})] * 9
    text.write_text("\n".join(lines))
    done = run(MODEL, "--masks", files[1], *SMALL, "--no-streaming", "--text", text,
               "--windows", 2, "--json", output)  # fmt: skip
    assert done.exit_code == 0, done.output
    agreed = json.loads(output.read_text())["agreement"]
    assert [(row["masks"], row["length"], row["windows"]) for row in agreed] == [
        ("dense", 512, 2), ("dense", 768, 2), ("half", 512, 2), ("half", 768, 2),
    ]  # fmt: skip
    assert agreed[0]["kl"] == 0 < agreed[2]["kl"]
    assert "agreement with full attention" in done.output


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--tasks", "lines,poems"), "--tasks is 'lines,poems', must be names among lines,kv"),
        (("--tasks", ""), "--tasks is '', must be names among"),
        (("--lengths", "4k"), "--lengths is '4k', must be numbers from 256 to 8800"),
        (("--lengths", "512,9000"), "must be numbers from 256 to 8800 (the model's 8960"),
        (("--lengths", "256", "--tasks", "words"), "--lengths has 256, too few tokens for one"),
        (("--keys", "emoji"), "--keys is 'emoji', must be one of pair, code, number, syllables"),
        (("--page", 20), "--page is 20, must be a multiple of"),
        (("--page", 0), "--page is 0, must be a multiple of"),
        pytest.param(
            ("--page", 16),
            "--page is 16, must be a multiple of 32",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="16 is served on CUDA"),
        ),
        (("--json", "."), "--json is '.', a folder; must be a file"),
        (("--plot", "a.txt"), "--plot is 'a.txt', must end in .png"),
        (("--write",), "--write stores a report in mask files; name them with --masks"),
        (("--masks", "none"), "mask file none does not exist"),
        (("--masks", "FULL", "FULL"), "twice, must be different files"),
        (("--masks", "OTHER"), "whose config is not the model's"),
        (("--text", "none.txt"), "--text is 'none.txt', must be a UTF-8 text file"),
        (("--text", "SHORT"), "tokens, must have at least 32768 for --windows 4 of 8192 tokens"),
        (("--text", "BROKEN"), 'whose line 1 must be JSON with a "text"'),
        (("--windows", 4), "--windows is 4, must be left away without --text"),
        (("--serve-args", "--block-size 64"), "must be without --block-size: use --page"),
        (("--serve-args", "-q --block_size=64"), "must be without --block-size: use --page"),
        (("--serve-args", "'a"), '--serve-args is "\'a", must be shell words'),
    ],
)
def test_bad_options_are_refused_before_a_server_starts(
    servers, files, tmp_path, random_masks, changed, message
):
    save_mask_set(random_masks(), tmp_path / "OTHER")
    (tmp_path / "SHORT").write_text("few words")
    (tmp_path / "BROKEN.jsonl").write_text('{"words": 1}\n')
    places = {"FULL": files[0], "OTHER": tmp_path / "OTHER", "SHORT": tmp_path / "SHORT",
              "BROKEN": tmp_path / "BROKEN.jsonl"}  # fmt: skip
    done = run(MODEL, *(places.get(value, value) for value in changed))
    assert done.exit_code == (1 if message.startswith("mask file") else 2)
    assert done.output.startswith("Error: ")
    assert message in done.output
    assert len(done.output.splitlines()) == 1
    assert servers.started == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("pages", [(48,), (128, 32)])
def test_pages_of_a_fit_that_cannot_be_served_are_told(servers, tmp_path, monkeypatch, pages):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = [tmp_path / f"{page}" for page in pages]
    for page, file in zip(pages, files, strict=True):
        masks = dense(MODEL)
        masks.header.parameters["fit"] = {"page": page}
        save_mask_set(masks, file)
    done = run(MODEL, "--masks", *files, *SMALL)
    sizes = ", ".join(map(str, sorted(pages)))
    assert done.exit_code == 2
    assert f"--masks were fitted for pages of {sizes} tokens, must be of one size" in done.output
    assert "multiple of 32 on cpu: give --page" in done.output
    assert servers.started == []
    servers.limit = 0
    assert run(MODEL, "--masks", *files, *SMALL, "--page", 64).exit_code == 130


def test_unknown_model_is_refused(servers):
    done = run("no/model", *SMALL)
    assert done.exit_code == 1
    assert done.output.startswith("Error: model 'no/model' is neither")


def test_default_lengths_are_those_that_fit(servers, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2100}))
    servers.limit = 0
    assert run(folder, "--tasks", "lines").exit_code == 130
    done = run(folder, "--tasks", "words")
    assert "--lengths is '2048,4096,8192', must be numbers from 256 to 1940" in done.output


def test_servers_are_stock_or_masked(monkeypatch):
    """What `vllm serve` is told for each subject."""
    started = []

    class Recorder:
        url = "http://127.0.0.1:1/v1"

        def __init__(self, model, arguments, environment, timeout):
            started.append((arguments, environment))
            if "--additional-config" in arguments:
                self.options = json.loads(arguments[arguments.index("--additional-config") + 1])
                assert load_mask_set(self.options["dam"]["masks"]).kv_heads == 4

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(subjects, "Server", Recorder)
    settings = Settings(MODEL, ("words",), (512,), 1, 0, 32, 64, True, ("--dtype=float32",))
    start = subjects.starter(settings, chat=True)
    for subject in (STOCK, Subject("made", "made", dense(MODEL))):
        with start(subject):
            pass
    (stock, nothing), (masked, environment) = started
    assert nothing == {}
    assert not any("dam" in argument for argument in stock)
    # 4 layers, 4 KV heads of 32 channels, keys and values in four bytes.
    assert f"--kv-cache-memory-bytes={4 * 4 * 32 * 2 * 4 * 32 * (21 + 64)}" in stock
    assert "--max-model-len=672" in stock
    assert "--no-enable-prefix-caching" in stock
    assert stock[-1] == masked[-1] == "--dtype=float32"
    assert masked[: len(stock) - 1] == stock[:-1]
    assert "--attention-backend=dam" in masked
    assert '"dense_below": 64' in masked[masked.index("--additional-config") + 1]
    assert "dam" in environment["VLLM_PLUGINS"].split(",")


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        ((), 2),
        (("--dtype", "float32"), 4),
        (("--dtype=float",), 4),
        (("--dtype=float32", "--dtype", "half"), 2),
        (("--dtype", "auto", "--kv-cache-dtype", "auto"), 2),
        (("--dtype",), 2),
    ],
)
def test_the_cache_holds_a_request_in_the_dtype_that_is_served(arguments, width):
    settings = Settings(MODEL, ("words",), (512,), 1, 0, 32, 64, True, arguments)
    size = 4 * 4 * 32 * 2 * width * 32 * (21 + 64)
    assert f"--kv-cache-memory-bytes={size}" in subjects.common_arguments(settings)


def test_plugins_stay_those_that_were_chosen(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    assert subjects.plugins() == "dam,mine"
