"""`dam-vllm inspect --html`: the viewer without a server, in a browser without a network."""

import json

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from typer.testing import CliRunner

from dam_vllm.cli.main import app
from dam_vllm.masks.density import density
from dam_vllm.masks.file import save_mask_set
from dam_vllm.masks.mask_set import HeadMode
from tests.browser import browser, until


@pytest.fixture
def masks(random_masks):
    made = random_masks(
        layers=4, heads=6, kv_heads=3, pcl=40, share=0.05, dense=True, dynamic=True, reuse=True
    )
    made.header.layer_types[1] = "sliding"
    for bits in (made.columns, made.diagonals, made.true_bits):
        bits[1] = 0
    made.modes[1] = HeadMode.STATIC
    made.anchors[1] = -1
    # A follower of a layer that is left to vLLM would be none.
    lost = (made.modes == HeadMode.REUSE) & (made.anchors[..., 0] == 1)
    made.modes[lost] = HeadMode.STATIC
    made.anchors[lost] = -1
    return made


@pytest.fixture
def page(masks, tmp_path):
    save_mask_set(masks, tmp_path / "a<b>.safetensors")
    arguments = ["inspect", str(tmp_path / "a<b>.safetensors"), "--length", "999"]
    arguments += ["--html", str(tmp_path / "page.html")]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    return tmp_path / "page.html"


def test_the_page_holds_all_it_shows(page, masks):
    (line,) = (line for line in page.read_text().splitlines() if line.startswith("const DATA"))
    data = json.loads(line.removeprefix("const DATA = ").removesuffix(";"))
    assert data["served"]["masks"] == "a<b>.safetensors"
    assert "<" not in line
    assert sorted(data["masks"]) == [f"{layer}/{head}" for layer in (0, 2, 3) for head in range(3)]
    _, expected = density(masks, [999], data["served"]["page"])
    for each in data["density"]:
        wanted = expected[0, each["layer"], each["head"]]
        assert each["density"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("dark", [False, True])
def test_heads_are_shown_by_click_and_by_key(page, masks, dark):
    with browser(dark) as driver:
        driver.get(page.as_uri())
        cells = driver.find_elements(By.CSS_SELECTOR, "[role=gridcell]")
        assert len(cells) == 9
        back = driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        red = int(back.split("(")[1].split(",")[0])
        assert red < 50 if dark else red > 200
        canvas, title = (driver.find_element(By.ID, name) for name in ("mask", "title"))
        drawn = (
            "const c = arguments[0]; return [...c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data]"
        )
        cells[1].click()
        until(canvas.is_displayed)
        assert title.text == "Layer 0, KV head 1"
        seen = driver.execute_script(drawn, canvas)
        assert len(seen) == 4 * 80 * 80
        kept = [tuple(seen[4 * (80 * row + row) :][:3]) for row in range(80)]
        assert len({*kept}) == 1  # every query sees itself
        corner = tuple(seen[4 * 79 :][:3])
        assert corner != kept[0]  # and none sees what comes later
        driver.switch_to.active_element.send_keys(Keys.DOWN)  # over the layer without masks
        driver.switch_to.active_element.send_keys(Keys.ENTER)
        until(lambda: title.text == "Layer 2, KV head 1")
        mode = HeadMode(int(masks.modes[2, 1])).name.lower()
        assert mode in driver.find_element(By.ID, "facts").text
        driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        until(lambda: not canvas.is_displayed())
        focused = driver.switch_to.active_element.get_attribute("aria-label")
        assert focused.startswith(f"layer 2, KV head 1, {mode}, density ")
        assert not [each for each in driver.get_log("browser") if each["level"] == "SEVERE"]
