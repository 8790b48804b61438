"""Time of a step's plan as a share of the step: a long prefill, and decode of a batch."""

import statistics
from collections.abc import Sequence

from dam_vllm.bench.client import Load, ask
from dam_vllm.bench.model import DEMO, LONG, Model
from dam_vllm.bench.report import Row
from dam_vllm.bench.servers import Setup, serve
from dam_vllm.bench.timing import Advance, alternate
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.server import rest

TARGETS = "targets: share <= 0.02 of the prefill step, <= 0.10 of the demo shape's decode step"
PREFILL, REQUESTS, CONTEXT, DECODED = 16384, 8, 4096, 64


def measure(
    page: int, window: int, rounds: int, arguments: Sequence[str], advance: Advance
) -> list[Row]:
    """Times steps through a server, and their plans by themselves on the same shapes.

    Args:
        page: tokens a page.
        window: latest tokens that every head reads, beside the first one.
        rounds: measurements of each step; plans are timed ten times as often.
        arguments: further arguments of `vllm serve`.
        advance: called once a model.

    Returns:
        A row a step; times in milliseconds, medians.
    """
    rows: list[Row] = []
    for name, shape, prefill in (("long", LONG, True), ("demo", DEMO, False)):
        length = PREFILL + 128
        whole = (*arguments, f"--max-num-batched-tokens={PREFILL}")
        setup = Setup(shape, length, page, window, arguments=whole)
        with serve(setup, {"dam": {"dense_below": 0}}) as (servers, masks):
            cases = [(f"{name}: decode {REQUESTS} x {CONTEXT}", REQUESTS, CONTEXT, 1)]
            # Most gaps between two tokens are a step in which all requests decode.
            decode = Load(CONTEXT, DECODED, rounds * REQUESTS, REQUESTS)
            steps = [ask(servers["dam"], decode, 0).gap / 1e3]
            if prefill:
                cases.append((f"{name}: prefill {PREFILL}", 1, PREFILL, PREFILL))
                steps.append(ask(servers["dam"], Load(PREFILL, 1, rounds), 0).ttft / 1e3)
            rest()
            for (label, requests, tokens, new), step in zip(cases, steps, strict=True):
                plan = plan_seconds(shape, masks, page, requests, tokens, new, 10 * rounds)
                rows.append({"bench": "plan", "step": label, "page": page} | _share(plan, step))
        advance()
    return rows


def plan_seconds(
    shape: Model, masks: MaskSet, page: int, requests: int, tokens: int, new: int, rounds: int
) -> float:
    """Median time of the backend's own planning for all layers of a step.

    Args:
        shape: of the model.
        masks: its masks.
        page: tokens a page.
        requests: requests of the step.
        tokens: length of each up to its last query.
        new: query rows of each.
        rounds: measurements.

    Returns:
        Seconds.
    """
    from dam_vllm.bench.on_vllm.cpu_kernels import Shape, random_step
    from dam_vllm.masks.page_tables import PageSelector, page_tables

    selector = PageSelector([page_tables(masks, layer, page) for layer in range(masks.layers)])
    attention = Shape(shape.heads, shape.kv_heads, shape.head_size, page).attention(selector)
    step = random_step(requests, tokens, new, page)
    return statistics.median(alternate({"plan": lambda: attention.plan(step)}, rounds)["plan"])


def _share(plan: float, step: float) -> Row:
    return {"plan_ms": 1e3 * plan, "step_ms": 1e3 * step, "share": plan / step}
