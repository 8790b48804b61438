"""What choosing pages and tails cost, step by step: against the dense attention they replace."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dam_vllm.bench.masks import dynamic_masks
from dam_vllm.bench.report import Row
from dam_vllm.bench.timing import Advance, alternate
from dam_vllm.masks.budget import BudgetKind
from dam_vllm.masks.mask_set import MaskSet

TARGETS = (
    "target at 16384: all steps / dense <= 0.08 with head size 128, 0.15 with 64, 0.25 with 32"
)
CHOSEN = 256
# Random keys spread the mass evenly, so that top-p adds up pages until its cap, the fit's.
TOP_P, CAP_PAGES = 0.9, 64
KV_HEADS = 2
STEPS = ("rotate", "gather", "product", "select", "whole", "tailed")
TIMES = {"dense": "dense", "dam": "whole"}


def measure(
    head_sizes: Sequence[int],
    lengths: Sequence[int],
    pages: Sequence[int],
    channels: Sequence[int],
    heads_per_kv: int,
    rounds: int,
    advance: Advance,
) -> list[Row]:
    """Times a prompt's prefill of one layer in bf16 whose heads are all dynamic.

    Args:
        head_sizes: channels a head.
        lengths: prompt lengths in tokens.
        pages: page sizes in tokens.
        channels: leading channels that score.
        heads_per_kv: query heads a KV head.
        rounds: measurements of each peer.
        advance: called once a case.

    Returns:
        Two rows a case, for a budget of top-k and of top-p: processor time in milliseconds
        (medians), which other work on the machine does not add to, and shares of the dense
        attention's. "rotate" turns queries and keys, "gather" takes the keys' leading channels from
        the cache, "product" is the largest score of each page, "choose" the rest of the selection
        (own pages, mass and budget), "all" their sum, "tail" is what tails take beside all that.
        "speedup" is that of everything but tails, attention over the pages included.
    """
    rows = []
    cases = [
        (size, page, length, count)
        for size in head_sizes
        for page in pages
        for length in lengths
        for count in channels
        if count <= size
    ]
    for size, page, length, count in cases:
        case = {"head_size": size, "page": page, "tokens": length, "channels": count}
        seconds = _seconds(size, page, length, count, heads_per_kv, rounds)
        for budget, mine in seconds.items():
            rows.append({"bench": "scoring"} | case | {"budget": budget} | shares(mine))
        advance()
    return rows


def _seconds(
    size: int, page: int, length: int, channels: int, heads_per_kv: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Each round's seconds by budget and step, of one case of `measure`."""
    from dam_vllm.bench.on_vllm.cpu_kernels import (
        Call,
        Shape,
        dense_step,
        dynamic_steps,
        random_prompt,
    )

    prompt = random_prompt(Shape(heads_per_kv * KV_HEADS, KV_HEADS, size, page), length)
    top_k = dynamic_masks(KV_HEADS, heads_per_kv, size, channels, CHOSEN)
    budgets = {"top-k": top_k, "top-p": with_top_p(top_k, page)}
    peers: dict[tuple[str, str], Call] = {("", "dense"): dense_step(prompt)}
    for budget, masks in budgets.items():
        steps = dynamic_steps(prompt, masks)
        peers |= {(budget, name): getattr(steps, name) for name in STEPS}
    found = alternate(peers, rounds, clock=processor_time)
    return {
        budget: {name: found[budget if name in STEPS else "", name] for name in ("dense", *STEPS)}
        for budget in budgets
    }


def processor_time(call: Callable[[], object]) -> float:
    """Seconds that a call takes of all processors together."""
    start = time.process_time()
    call()
    return time.process_time() - start


def shares(seconds: Mapping[str, Sequence[float]]) -> Row:
    """A row's figures.

    Args:
        seconds: of each round, for "dense" and all of STEPS.

    Returns:
        Medians in milliseconds, and ratios.
    """
    each = {name: np.array(values) for name, values in seconds.items()}
    each["choose"] = each["select"] - each["gather"] - each["product"]
    each["all"] = each["select"] + each["rotate"]
    each["tail"] = each["tailed"] - each["whole"]
    parts = ("rotate", "gather", "product", "choose", "all", "tail")
    return (
        {f"{name}_ms": 1e3 * float(np.median(each[of])) for name, of in TIMES.items()}
        | {f"{name}_over_dense": float(np.median(each[name] / each["dense"])) for name in parts}
        | {"speedup": float(np.median(each["dense"] / each["whole"]))}
    )


def with_top_p(masks: MaskSet, page: int) -> MaskSet:
    """The same heads with a budget of mass; the cap is what the fit allows."""
    assert masks.dynamic is not None
    shape = masks.modes.shape
    dynamic = replace(
        masks.dynamic,
        kinds=np.full(shape, BudgetKind.TOP_P, dtype=np.uint8),
        budgets=np.full(shape, TOP_P, dtype=np.float32),
        caps=np.full(shape, CAP_PAGES * page, dtype=np.int32),
    )
    return replace(masks, dynamic=dynamic)
