"""Attention of a whole prompt's prefill: virtual pages against dense and against flex."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dam_vllm.bench.masks import streaming_masks, window_pages
from dam_vllm.bench.report import Row
from dam_vllm.bench.timing import Advance, alternate, ratio
from dam_vllm.masks.rounding import ceil_div

if TYPE_CHECKING:
    from dam_vllm.bench.on_vllm.cpu_kernels import Prompt

TARGETS = "targets: speed-up x density >= 0.95 at 16384, page 128, >= 0.90 page 32; flex >= 3"


def measure(
    heads: tuple[int, int, int],
    lengths: Sequence[int],
    pages: Sequence[int],
    densities: Sequence[float],
    flex_up_to: int,
    rounds: int,
    advance: Advance,
) -> list[Row]:
    """Times one layer's attention in bf16, peers in turn.

    Args:
        heads: query heads, KV heads and head size.
        lengths: prompt lengths in tokens.
        pages: page sizes in tokens.
        densities: wanted densities; the nearest that the page size allows is taken.
        flex_up_to: longest prompt that flex_attention is timed at.
        rounds: measurements of each peer.
        advance: called once a case.

    Returns:
        A row a case; times in milliseconds, medians.
    """
    from dam_vllm.bench.on_vllm.cpu_kernels import Shape, random_prompt

    rows = []
    for page in pages:
        shape = Shape(*heads, page)
        for length in lengths:
            prompt = random_prompt(shape, length)
            done = set()
            for density in densities:
                window = window_pages(length, page, density)
                if window not in done:
                    done.add(window)
                    rows.append(_case(prompt, window, length <= flex_up_to, rounds))
                advance()
    return rows


def _case(prompt: "Prompt", window: int, with_flex: bool, rounds: int) -> Row:
    import torch

    from dam_vllm.bench.flex import block_mask, flex_step
    from dam_vllm.bench.on_vllm.cpu_kernels import dense_step, virtual_step
    from dam_vllm.masks.density import density
    from dam_vllm.masks.page_tables import PageSelector, page_tables

    shape, tokens = prompt.shape, len(prompt.query)
    masks = streaming_masks(shape.kv_heads, window, shape.page)
    selector = PageSelector([page_tables(masks, 0, shape.page)])
    peers = {"dense": dense_step(prompt), "dam": virtual_step(prompt, selector)}
    if with_flex:
        query_blocks = torch.arange(ceil_div(tokens, selector.query_block))
        selected = selector.select(query_blocks, len(query_blocks) * selector.own)[0, :1]
        mask = block_mask(selected, tokens, tokens, shape.page)
        query, key, value = (
            part.transpose(0, 1)[None] for part in (prompt.query, prompt.key, prompt.value)
        )
        peers["flex"] = flex_step(query, key, value, mask, shape.scale)
    seconds = alternate(peers, rounds)
    read = float(density(masks, [tokens], shape.page)[1].mean())
    speedup = ratio(seconds["dense"], seconds["dam"])
    times = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    return {
        "bench": "kernel",
        "tokens": tokens,
        "page": shape.page,
        "pages_kept": f"1 + {window}",
        "density": read,
        "dense_ms": times["dense"],
        "dam_ms": times["dam"],
        "flex_ms": times.get("flex"),
        "speedup": speedup,
        "speedup_x_density": speedup * read,
        "flex_over_dam": ratio(seconds["flex"], seconds["dam"]) if with_flex else None,
    }
