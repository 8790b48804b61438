"""What running servers tell: two API servers and engines, keys, metrics, endpoint and viewer."""

import json
import os
from collections import Counter
from contextlib import contextmanager

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dam_vllm.demo import model_dir
from dam_vllm.masks.baselines import streaming
from dam_vllm.masks.file import save_mask_set
from dam_vllm.options import MASKS_IN_MODEL
from dam_vllm.server import Server
from tests.browser import browser, until
from tests.e2e.conftest import Setup, arguments, chosen, environment
from tests.e2e.test_equality import FP32_ROUNDING, assert_close

pytestmark = pytest.mark.e2e

MODEL, KEY, PAGE, DENSE_BELOW = str(model_dir()), "open-sesame", 32, 512
LONG, SHORT, NEW = 2200, 300, 40


def prompt(tokens, seed):
    """A random prompt."""
    return np.random.default_rng(seed).integers(300, 2300, tokens).tolist()


@contextmanager
def serve(options, *arguments, tensor_parallel=1):
    common = ["--attention-backend=dam", "--enforce-eager", "--max-model-len=4096"]
    common += [f"--block-size={PAGE}", "--kv-cache-memory-bytes=50000000", f"--api-key={KEY}"]
    common += ["--additional-config", json.dumps({"dam": {"dense_below": DENSE_BELOW, **options}})]
    cores = sorted(os.sched_getaffinity(0))
    ranks = (str(cores[rank % len(cores)]) for rank in range(tensor_parallel))
    environment = {"VLLM_PLUGINS": "dam", "HF_HUB_OFFLINE": "1"}
    if tensor_parallel > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(ranks)
    common.append(f"--tensor-parallel-size={tensor_parallel}")
    with Server(MODEL, [*common, *arguments], environment) as server:
        yield Asked(server)


class Asked:
    """A server and what is asked of it."""

    def __init__(self, server):
        self.server, self.base = server, server.url.removesuffix("/v1")

    def get(self, path, **given):
        given.setdefault("headers", {"Authorization": f"Bearer {KEY}"})
        # A connection each, so that any of several API servers may answer.
        return httpx.get(f"{self.base}{path}", timeout=60, **given)

    def complete(self, tokens, seed, engine=None):
        """Asks any engine, or one of them: an answer's tokens and their log-probabilities."""
        client = openai.OpenAI(base_url=self.server.url, api_key=KEY)
        done = client.completions.create(
            model=MODEL, prompt=prompt(tokens, seed), max_tokens=NEW, temperature=0, logprobs=1,
            extra_body={"ignore_eos": True, "return_token_ids": True},
            extra_headers={} if engine is None else {"X-data-parallel-rank": str(engine)},
        )  # fmt: skip
        return done.choices[0].token_ids, done.choices[0].logprobs.token_logprobs

    def metrics(self, *labels):
        """Sums of our metrics' values by name, phase or mode, and further labels."""
        text, found = self.get("/metrics").text, Counter()
        assert "vllm:num_requests_running" in text  # vLLM's own are still there
        for family in text_string_to_metric_families(text):
            for each in family.samples:
                ours = each.name.startswith("vllm:dam") and not each.name.endswith("_created")
                if ours and "le" not in each.labels:
                    wanted = [name for name in ("phase", "mode", *labels) if name in each.labels]
                    found[each.name, *(each.labels[name] for name in wanted)] += each.value
        return found


@pytest.fixture(scope="module")
def asked():
    """The demo model's own masks, by two API servers and two engines."""
    two = ("--api-server-count=2", "--data-parallel-size=2")
    with serve({}, *two, "--max-num-batched-tokens=4096", "--dtype=float32") as found:
        yield found


def test_metrics_and_density_tell_what_was_asked(asked):
    """First of all: a server that was asked nothing has counted nothing."""
    before = asked.metrics()
    assert all(value == 0 for value in before.values())
    for seed, tokens in enumerate((LONG, SHORT, LONG)):
        asked.complete(tokens, seed)
    told = asked.get("/dam/density").json()
    # Requests are told by the API servers' own statistics, which follow the answer.
    until(lambda: asked.metrics()["vllm:dam_requests_total", "sparse"] == 2)
    for _ in range(4):
        found = asked.metrics()
        assert found["vllm:dam_requests_total", "dense"] == 1
        assert found["vllm:dam_requests_total", "sparse"] == 2
        assert found["vllm:dam_plan_seconds_total",] > 0
        for phase in ("prefill", "decode"):
            for kind in ("read", "dense"):
                value = found[f"vllm:dam_pages_{kind}_total", phase]
                assert value == told[phase][kind]
                assert value == sum(head[phase][kind] for head in told["heads"])
            assert 0 < told[phase]["read"] < told[phase]["dense"]
        assert found["vllm:dam_step_density_count", "prefill"] == 3
        # The last token of an answer is no query, the first one is the prefill's.
        assert found["vllm:dam_step_density_count", "decode"] == 3 * (NEW - 1)
    # Every position decodes over the pages up to it, in 4 layers and KV heads.
    positions = np.concatenate([start + np.arange(NEW - 1) for start in (LONG, SHORT, LONG)])
    assert told["decode"]["dense"] == 16 * (positions // PAGE + 1).sum()


def test_engines_answer_alike(asked):
    """Data parallelism: each engine counts its own."""
    read = [("vllm:dam_pages_read_total", "prefill", str(engine)) for engine in range(2)]
    told, before = [], asked.metrics("engine")
    for engine in range(2):
        told.append(asked.complete(LONG, seed=5, engine=engine))
    after = asked.metrics("engine")
    assert told[0] == told[1]
    first, second = (after[each] - before[each] for each in read)
    assert first == second > 0


@pytest.mark.parametrize(("tokens", "kernel"), [(SHORT, None), (DENSE_BELOW + 90, "naive")])
def test_engines_answer_as_others_do(asked, run_engine, tokens, kernel):
    """As stock vLLM what is read whole, and as the oracle what is not."""
    given = arguments(Setup(None, chunk=4096, dtype="float32"), {})
    if kernel:
        options = {"masks": str(model_dir() / MASKS_IN_MODEL), "dense_below": DENSE_BELOW}
        dam = {"dam": options | {"kernel": kernel}}
        given |= {"attention_backend": "dam", "additional_config": dam}
    told, log = run_engine(
        {"arguments": given, "batches": [[prompt(tokens, 7)]], "new": 6},
        environment(Setup(dtype="float32")),
    )
    assert "failed" not in told, log[-6000:]
    other = [chosen(told["answers"][0][0])]
    for engine in range(2):
        assert_close([asked.complete(tokens, 7, engine)], other, FP32_ROUNDING)


def test_what_is_served(asked):
    answer = asked.get("/dam")
    told = answer.json()
    assert told["masks"] == "masks.safetensors"
    assert told["page"] == PAGE
    assert told["dense_until"] == DENSE_BELOW
    assert told["versions"].keys() == {"dam-vllm", "vllm"}
    assert len(told["layers"]) == 4
    for secret in (KEY, MODEL, "/root", "/tmp", "/home"):
        assert secret not in answer.text


def test_keys_are_wanted_as_for_the_api(asked):
    for path in ("/dam", "/dam/density", "/dam/masks/0/0"):
        for headers in ({}, {"Authorization": "Bearer guess"}):
            assert asked.get(path, headers=headers).status_code == 401
    assert asked.get("/v1/models", headers={}).status_code == 401
    assert asked.get("/dam/view", headers={}).status_code == 200


def test_masks_and_their_description(asked):
    png = asked.get("/dam/masks/2/1?format=png")
    assert png.headers["content-type"] == "image/png"
    wrong = asked.get("/dam/masks/4/0")
    assert wrong.status_code == 404
    assert "layer is 4: must be 0 to 3" in wrong.text
    assert asked.get("/dam/masks/x/0").is_client_error
    described = asked.get("/openapi.json").json()["paths"]
    assert {"/dam", "/dam/density", "/dam/masks/{layer}/{head}", "/dam/view"} <= described.keys()


def test_the_viewer_shows_masks_and_follows_the_load(asked):
    with browser() as driver:
        driver.get(f"{asked.base}/dam/view")
        key = until(lambda: driver.find_element(By.ID, "key"))
        until(key.is_displayed)
        key.send_keys(KEY, Keys.ENTER)

        def cells():
            return driver.find_elements(By.CSS_SELECTOR, "[role=gridcell]")

        until(lambda: len(cells()) == 16 and "." in cells()[0].text)
        cells()[5].click()
        canvas = driver.find_element(By.ID, "mask")
        until(canvas.is_displayed)
        assert driver.find_element(By.ID, "title").text == "Layer 1, KV head 1"
        drawn = "return arguments[0].getContext('2d').getImageData(0, 0, 128, 128).data.join()"
        first = driver.execute_script(drawn, canvas)
        assert len(set(first.split(","))) > 10
        for at in (Keys.DOWN, Keys.RIGHT, Keys.ENTER):
            driver.switch_to.active_element.send_keys(at)
        until(lambda: driver.find_element(By.ID, "title").text == "Layer 2, KV head 2")
        assert driver.execute_script(drawn, canvas) != first
        facts = driver.find_element(By.ID, "facts").text
        mask = asked.get("/dam/masks/2/2").json()
        assert mask["mode"] in facts
        assert mask["budget"] is None or mask["budget"]["words"] in facts
        pages = driver.find_element(By.ID, "pages")
        before = pages.text
        asked.complete(LONG, seed=9)
        until(lambda: pages.text != before)
        driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        until(lambda: not canvas.is_displayed())
        focused = driver.switch_to.active_element.get_attribute("aria-label")
        assert focused.startswith("layer 2, KV head 2")
        assert [each for each in driver.get_log("browser") if each["level"] == "SEVERE"
                and "401" not in each["message"]] == []  # fmt: skip


def test_ranks_and_freed_pages(tmp_path):
    """Under tensor parallelism; a window, whose density the masks tell, and which frees pages."""
    masks = streaming(MODEL, 16, 256)
    save_mask_set(masks, tmp_path / "window.safetensors")
    options = {"masks": str(tmp_path / "window.safetensors"), "dense_below": 0}
    with serve(options, "--max-num-batched-tokens=1024", tensor_parallel=2) as asked:
        asked.complete(LONG, seed=3)
        told, found = asked.get("/dam/density").json(), asked.metrics()
    assert len(told["heads"]) == 16
    assert len({head["prefill"]["dense"] for head in told["heads"]}) == 1
    # By query blocks of 128: pages up to their ends, the first one and those of the window.
    starts = np.arange(LONG) // 128 * 128
    ends = -(-np.minimum(starts + 128, LONG) // PAGE)
    window = np.maximum(starts - 255, 0) // PAGE
    assert told["prefill"]["dense"] == 16 * ends.sum()
    assert told["prefill"]["read"] == 16 * (ends - window + (window > 0)).sum()
    assert found["vllm:dam_step_density_count", "prefill"] == 3
    assert found["vllm:dam_freed_pages_total",] > 40
