"""What `dam-vllm inspect` tells of fitted heads."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from dam_vllm.cli.main import app
from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.file import save_mask_set

FIT = {
    "target_error": None,
    "target_density": 0.15,
    "page": 32,
    "lengths": [2048, 8192],
    "seed": 7,
    "texts": [["plain", 20, 20]],
    "heads": [["dense"]],
    "chosen": {"density": 0.1234, "loss": 0.5678, "cost": 0.1357},
    "proven": [
        {"density": 0.1234, "loss": 0.5678, "cost": 0.1357},
        {"density": 0.1111, "loss": 0.6789, "cost": 0.1246},
    ],
    "curves": {
        "0.5": [
            {"density": 1.0, "loss": 0.0, "cost": 1.0},
            {"density": 0.1234, "loss": 0.4, "cost": 0.1357},
        ]
    },
    "check": {"kv/reply": {"kl": 0.01234, "top1": 0.9876}},
}
KINDS = (
    (BudgetKind.TOP_K, 64, "64 tokens, 32 to 96 tokens"),
    (BudgetKind.SHARE, 0.05, "0.05 of the context, 32 to 96 tokens"),
    (BudgetKind.TOP_P, 0.9, "up to 0.9 of the mass, 32 to 96 tokens"),
)


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture
def fitted(random_masks, tmp_path):
    """Writes a mask file whose second KV heads are dynamic, a kind of budget each layer."""
    masks = random_masks(layers=len(KINDS), dynamic=True)
    dynamic = masks.dynamic
    for layer, (kind, budget, _) in enumerate(KINDS):
        at = (layer, 1)
        dynamic.channels[at], dynamic.kinds[at], dynamic.budgets[at] = 5, kind, budget
        dynamic.floors[at], dynamic.caps[at] = 32, 96
    header = masks.header.model_copy(update={"parameters": {"tau": 0.1, "fit": FIT}})
    file = tmp_path / "masks.safetensors"
    save_mask_set(dataclasses.replace(masks, header=header), file)
    return file


def test_budgets_target_and_check_are_shown(fitted):
    shown = run(fitted)
    assert shown.exit_code == 0, shown.output
    for words in (
        "1 static",
        "1 dynamic",
        *(words for *_, words in KINDS),
        "density 0.1234, loss 0.5678, cost 0.1357",
        "target_density",
        "0.1234 0.5678, 0.1111 0.6789",
        "kv/reply",
        "0.01234",
        "0.9876",
    ):
        assert words in shown.output
    for words in ("target_error", '"curves"'):
        assert words not in shown.output


def test_json_tells_the_same(fitted):
    report = json.loads(run(fitted, "--json").output)
    assert report["page"] == FIT["page"]
    assert report["parameters"]["fit"] == FIT
    for layer, (kind, budget, _) in zip(report["layers"], KINDS, strict=True):
        assert layer["dynamic"] == [
            {"head": 1, "channels": 5, "kind": kind.name.lower(), "budget": budget,
             "floor": 32, "cap": 96}
        ]  # fmt: skip
    assert json.loads(run(fitted, "--json", "--page", 16).output)["page"] == 16


def test_the_curve_is_drawn_beside_the_masks(fitted, tmp_path):
    shown = run(fitted, "--plot", tmp_path / "masks.png")
    assert shown.exit_code == 0, shown.output
    for name in ("masks.png", "masks-curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def without(*path):
    """FIT with an entry taken out."""
    found = json.loads(json.dumps(FIT))
    *way, last = path
    place = found
    for each in way:
        place = place[each]
    del place[last]
    return found


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ({"page": 32}, "parameter 'fit.target_error' is missing"),
        (without("chosen", "loss"), "parameter 'fit.chosen.loss' is missing"),
        (without("proven", 1, "density"), "parameter 'fit.proven.1.density' is missing"),
        (without("curves", "0.5", 0, "loss"), "parameter 'fit.curves.0.5.0.loss' is missing"),
        (without("lengths", slice(None)), "parameter 'fit.lengths' is []: List should have"),
        (FIT | {"chosen": "x"}, "parameter 'fit.chosen' is 'x': Input should be"),
        (FIT | {"check": {"a": 1}}, "parameter 'fit.check.a' is 1: Input should be"),
        (FIT | {"target_density": "<b>"}, "parameter 'fit.target_density' is '<b>': Input"),
    ],
)
def test_a_report_that_cannot_be_shown_is_refused(random_masks, tmp_path, fit, message):
    masks = random_masks()
    header = masks.header.model_copy(update={"parameters": {"fit": fit}})
    file = tmp_path / "masks.safetensors"
    save_mask_set(dataclasses.replace(masks, header=header), file)
    for arguments in ((), ("--json",), ("--plot", tmp_path / "masks.png")):
        shown = run(file, *arguments)
        assert shown.exit_code == 1
        assert shown.output.startswith(f"Error: mask file {file}: {message}")
        assert len(shown.output.splitlines()) == 1


def test_static_masks_have_no_fit_to_show(random_masks, tmp_path):
    file = tmp_path / "static.safetensors"
    save_mask_set(random_masks(), file)
    shown = run(file, "--plot", tmp_path / "masks.png")
    assert shown.exit_code == 0, shown.output
    assert "2 static" in shown.output
    assert "fit" not in shown.output
    assert "dynamic heads" not in shown.output
    assert "reuse" not in shown.output
    assert not list(tmp_path.glob("masks-*.png"))
    layers = json.loads(run(file, "--json").output)["layers"]
    assert [layer["dynamic"] for layer in layers] == [[], []]


def test_who_follows_whom_is_told_and_drawn(random_masks, tmp_path):
    masks = random_masks(layers=3, heads=8, kv_heads=4, dynamic=True, reuse=True)
    masks.anchors[1, 0] = masks.anchors[1, 2] = (0, 3)
    file = tmp_path / "masks.safetensors"
    save_mask_set(masks, file)
    shown = run(file, "--plot", tmp_path / "masks.png")
    assert shown.exit_code == 0, shown.output
    assert "2 reuse" in shown.output
    table = shown.output.split("heads that reuse the pages another chose")[1]
    rows = [line.replace("│", " ").split() for line in table.splitlines()]
    assert ["0", "3", "1", "0,", "2"] in rows
    assert (tmp_path / "masks-reuse.png").read_bytes().startswith(b"\x89PNG")
    layers = json.loads(run(file, "--json").output)["layers"]
    assert layers[1]["reuse"] == [
        {"head": 0, "anchor_layer": 0, "anchor_head": 3},
        {"head": 2, "anchor_layer": 0, "anchor_head": 3},
    ]
    assert [each["modes"].count("reuse") for each in layers] == [1, 2, 1]


def test_tails_are_told(random_masks, tmp_path):
    masks = random_masks(layers=3, heads=8, kv_heads=4, tails=True)
    masks.tails[1] = [0, 1, 1, 0]
    file = tmp_path / "masks.safetensors"
    save_mask_set(masks, file)
    assert "2 tailed" in run(file).output
    layers = json.loads(run(file, "--json").output)["layers"]
    assert [each["tails"] for each in layers] == [row.nonzero()[0].tolist() for row in masks.tails]
    save_mask_set(dataclasses.replace(masks, tails=None), file)
    assert "tail" not in run(file).output


NAME = "/models/[v2]/x[/b]:key:"


def test_names_in_brackets_are_shown_as_they_are(random_masks, tmp_path):
    masks = random_masks(dynamic=True)
    parameters = {"data": NAME, "fit": FIT | {"note": NAME}}
    header = masks.header.model_copy(
        update={"model": NAME, "parameters": parameters, "quality": {"model": NAME}}
    )
    file = tmp_path / "masks.safetensors"
    save_mask_set(dataclasses.replace(masks, header=header), file)
    shown = run(file)
    assert shown.exit_code == 0, shown.output
    assert shown.output.count(NAME) == 4
