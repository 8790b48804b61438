"""README and docs: links lead somewhere, commands exist, the code map is the code."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from dam_vllm.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def slugs(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text())
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def broken(page):
    """Links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file() or (anchor and anchor not in slugs(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One two\n[a](page.md#one-two) [b](#three) [c](gone.md) [d](https://x.y)")
    assert broken(page) == ["#three", "gone.md"]


def test_the_readme_links_every_page():
    links = LINK.findall((ROOT / "README.md").read_text())
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= {link.split("#")[0] for link in links}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text().replace("\\\n", " ")
    targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
    for target in re.findall(r"(?m)(?:^    |`)make ([\w-]+)", text):
        assert target in targets
    blocks = re.findall(r"(?m)^    dam-vllm (.+)$", text)
    for line in [*blocks, *re.findall(r"`dam-vllm ([^`]+)`", text)]:
        command, words = get_command(app), line.split("#")[0].split()
        while words and hasattr(command, "commands"):
            assert words[0].split("|")[0] in command.commands, line
            command = command.commands[words.pop(0).split("|")[0]]
        options = {name for each in command.params for name in each.opts + each.secondary_opts}
        options.add("--help")
        assert {word.strip("[]") for word in words if re.match(r"\[?--", word)} <= options, line


def test_the_code_map_is_the_code():
    """Every room is named with its files, and no file that is gone."""
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"(?m)^\| `([\w/.`, ]+)` \| (.*) \|$", text.split("## One interface")[0])
    rooms = {room: re.findall(r"`(?:[\w/]*/)?(\w+\.py)`", held) for room, held in rows}
    package = ROOT / "dam_vllm"
    for room, files in rooms.items():
        for name in room.replace("`", "").split(", "):
            assert (package / name).exists(), name
        for file in files:
            assert (package / room / file).is_file(), f"{room}{file}"
    for room in (
        "masks/",
        "endpoint/",
        "attention/",
        "attention/cpu/",
        "attention/cuda/",
        "engine/",
        "engine/kv_free/",
        "calibration/",
        "calibration/fit/",
        "calibration/static/",
    ):
        present = {file.name for file in (package / room).glob("*.py")} - {"__init__.py"}
        assert present == set(rooms[room]), room
