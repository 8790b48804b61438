"""Chunks of prompts end at pages where heads choose pages, whatever else a step computes."""

from types import SimpleNamespace

import pytest
import torch

from dam_vllm.demo import model_dir

pytestmark = pytest.mark.engine

DEMO, PAGE, TOKENS, REQUESTS = str(model_dir()), 32, 200, 6


def configure(masks=True, **arguments):
    """The engine's configuration for the demo model and its masks, which choose."""
    from vllm import EngineArgs

    backend = {"attention_backend": "dam"} if masks else {}
    limits = {"max_num_batched_tokens": TOKENS, "max_num_seqs": REQUESTS, "max_model_len": 1024}
    limits |= {"block_size": PAGE, "enable_prefix_caching": False}
    return EngineArgs(DEMO, **backend | limits | arguments).create_engine_config()


def schedule(config, pages=200):
    """The scheduler of a configuration over a pool of some pages."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.float32)
    config.cache_config.num_gpu_blocks = pages
    return config.scheduler_config.get_scheduler_cls()(
        config,
        KVCacheConfig(pages, [], [KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(config),
        block_size=PAGE,
    )


def chunks(scheduler, lengths, new):
    """Answers requests that come one each step: (tokens known, start, end) of what is computed."""
    from vllm import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    waiting = [
        Request(str(row), [5] * length, SamplingParams(max_tokens=new, ignore_eos=True), None)
        for row, length in enumerate(lengths)
    ]
    done, flying = [], []
    # Where it is asynchronous, a step is scheduled before the last one's tokens are known.
    ahead = int(scheduler.scheduler_config.async_scheduling)
    for _ in range(2000):
        if not waiting and not scheduler.has_unfinished_requests():
            return done
        if waiting:
            scheduler.add_request(waiting.pop(0))
        planned = scheduler.schedule()
        names, samples = list(planned.num_scheduled_tokens), []
        for name, tokens in planned.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            # Which counts what was scheduled just now.
            stop = request.num_computed_tokens
            done.append((request.num_tokens, stop - tokens, stop))
            samples.append([7] if stop >= request.num_tokens else [])
        order = {name: row for row, name in enumerate(names)}
        flying.append((planned, ModelRunnerOutput(names, order, samples)))
        if len(flying) > ahead:
            scheduler.update_from_output(*flying.pop(0))
    pytest.fail("some requests never end")


def split(done):
    """Chunks that end inside a page and before what is known of their request."""
    return [each for each in done if each[2] % PAGE and each[2] < each[0]]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("threshold", [0, 50])
def test_no_page_is_split_where_heads_choose(rng, asynchronous, threshold):
    lengths = rng.integers(1, 700, 20).tolist()
    config, stock = (
        configure(masks, long_prefill_token_threshold=threshold) for masks in (True, False)
    )
    for each in (config, stock):
        # vLLM has it off on CPU.
        each.scheduler_config.async_scheduling = asynchronous
    if asynchronous:
        name = "dam_vllm.engine.scheduler.AsyncPageScheduler"
        config.scheduler_config.scheduler_cls = name
    done = chunks(schedule(config), lengths, 12)
    assert split(done) == []
    assert split(chunks(schedule(stock), lengths, 12))


@pytest.mark.parametrize(
    ("start", "tokens", "images", "chunk"),
    [
        (64, 100, False, 96), (64, 31, False, 0), (64, 936, False, 936), (70, 20, False, 0),
        (64, 100, True, 96), (64, 31, True, 31), (70, 20, True, 20),
    ],
)  # fmt: skip
def test_only_text_waits_for_a_whole_page(start, tokens, images, chunk):
    """What ends before an image that no chunk may split could wait for ever."""
    from dam_vllm.engine.scheduler import PageScheduler

    request = SimpleNamespace(num_tokens=1000, has_encoder_inputs=images)
    scheduler = SimpleNamespace(page=PAGE)
    assert PageScheduler.chunk(scheduler, request, start, tokens) == chunk


def test_preempted_requests_are_computed_again_by_pages(rng):
    # Two prompts fit into the pool, but not with all of their answers.
    lengths = rng.integers(390, 440, 12).tolist()
    done = chunks(schedule(configure(), pages=30), lengths, 80)
    again = [each for each in done if each[1] == 0]
    assert len(again) > len(lengths)
    assert split(done) == []


def test_only_heads_that_choose_need_it(tmp_path):
    from dam_vllm.masks.baselines import streaming
    from dam_vllm.masks.file import save_mask_set

    save_mask_set(streaming(DEMO, 4, 64), tmp_path / "masks")
    static = configure(additional_config={"dam": {"masks": str(tmp_path / "masks")}})
    assert static.scheduler_config.scheduler_cls is None
    assert configure(masks=False).scheduler_config.scheduler_cls is None
    assert configure().scheduler_config.scheduler_cls == "dam_vllm.engine.scheduler.PageScheduler"


@pytest.fixture
def warnings(monkeypatch):
    """What the backend warns of."""
    from dam_vllm.engine import scheduler

    told = []
    log = SimpleNamespace(warning=lambda text, *values: told.append(text % values))
    monkeypatch.setattr(scheduler, "logger", log)
    return told


def test_a_scheduler_that_the_user_chose_stays(warnings):
    chosen = "vllm.v1.core.sched.scheduler.Scheduler"
    config = configure(scheduler_cls=chosen)
    assert config.scheduler_config.scheduler_cls == chosen
    assert len(warnings) == 1
    assert f"--scheduler-cls is {chosen}" in warnings[0]


def test_steps_that_leave_a_prompt_less_than_a_page(warnings, rng):
    """Prompts do not wait for as much as others' answers may never leave."""
    small = schedule(configure(max_num_batched_tokens=REQUESTS + PAGE - 1))
    assert len(warnings) == 1
    assert f"which leave {PAGE - 1} tokens to a prompt" in warnings[0]
    assert split(chunks(small, rng.integers(1, 700, 10).tolist(), 12))
    just_enough = schedule(configure(max_num_batched_tokens=REQUESTS + PAGE))
    assert split(chunks(just_enough, rng.integers(1, 700, 10).tolist(), 12)) == []
    assert len(warnings) == 1
