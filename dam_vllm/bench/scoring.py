"""What it costs to choose pages: scoring against the dense attention that it replaces."""

import statistics
from collections.abc import Sequence

from dam_vllm.bench.masks import dynamic_masks
from dam_vllm.bench.report import Row
from dam_vllm.bench.timing import Advance, alternate, ratio

TARGETS = "target: select / dense <= 0.15 at 16384 with head size 128"
CHOSEN = 256
KV_HEADS = 2


def measure(
    head_sizes: Sequence[int],
    lengths: Sequence[int],
    pages: Sequence[int],
    channels: Sequence[int],
    group: int,
    rounds: int,
    advance: Advance,
) -> list[Row]:
    """Times a prompt's prefill of one layer in bf16 whose heads are all dynamic.

    Args:
        head_sizes: channels a head.
        lengths: prompt lengths in tokens.
        pages: page sizes in tokens.
        channels: leading channels that score.
        group: query heads a KV head.
        rounds: measurements of each peer.
        advance: called once a case.

    Returns:
        A row a case; times in milliseconds, medians. "select" is scoring and choosing, "rotate"
        turns queries and keys, "dam" is everything, attention over the pages included.
    """
    from dam_vllm.bench.on_vllm.cpu_kernels import Shape, dense_step, dynamic_steps, random_prompt

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
        prompt = random_prompt(Shape(group * KV_HEADS, KV_HEADS, size, page), length)
        steps = dynamic_steps(prompt, dynamic_masks(KV_HEADS, group, size, count, CHOSEN))
        peers = {"dense": dense_step(prompt), "dam": steps.whole}
        peers |= {"select": steps.select, "rotate": steps.rotate}
        seconds = alternate(peers, rounds)
        times = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        rows.append(
            {
                "bench": "scoring",
                "head_size": size,
                "page": page,
                "tokens": length,
                "channels": count,
            }
            | {f"{name}_ms": value for name, value in times.items()}
            | {
                "select_over_dense": ratio(seconds["select"], seconds["dense"]),
                "rotate_over_dense": ratio(seconds["rotate"], seconds["dense"]),
                "speedup": ratio(seconds["dense"], seconds["dam"]),
            }
        )
        advance()
    return rows
