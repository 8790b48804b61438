"""Dynamic heads on a GPU: pages are chosen without the host, in shapes that the host knows.

The same choice as `dam_vllm.attention.dynamic` makes, but for rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dam_vllm.attention.dynamic import DynamicHeads
from dam_vllm.attention.select import PageSelector
from dam_vllm.attention.triton_choose import DeviceBudgets, choose_pages
from dam_vllm.attention.triton_geometry import DeviceTiles
from dam_vllm.attention.triton_rank import rank_pages
from dam_vllm.attention.triton_score import PageBlocks, Peaks, Rows, score_pages

# float32 page peaks that are held at once: 256 MiB.
SCRATCH = 1 << 26
# Tensors cut at other slots would be aligned otherwise, and kernels compiled anew.
SLOT_STEP = 16


@dataclass(frozen=True)
class DeviceDynamic:
    """A layer's dynamic heads on one worker's device.

    Attributes:
        heads: int32 [n], KV heads among those of the worker.
        ranks: int32 [n], leading channels that score.
        max_rank: the largest of them.
        budgets: of these heads.
        static: page tables of these heads, one layer, tiles of one page.
        scale: factor of the scores, that of an fp8 cache's keys included.
        softcap: soft-capping of the scores, 0 for none.
    """

    heads: torch.Tensor
    ranks: torch.Tensor
    max_rank: int
    budgets: DeviceBudgets
    static: PageSelector
    scale: float
    softcap: float

    @classmethod
    def of(cls, dynamic: DynamicHeads, heads: Sequence[int]) -> "DeviceDynamic":
        """The same heads, on the device of their page tables."""
        device = dynamic.static.near.device
        return cls(
            heads=torch.tensor(heads, dtype=torch.int32, device=device),
            ranks=torch.tensor(dynamic.ranks, dtype=torch.int32, device=device),
            max_rank=max(dynamic.ranks),
            budgets=DeviceBudgets.of(dynamic.budgets, device),
            static=dynamic.static,
            scale=dynamic.scale,
            softcap=dynamic.softcap,
        )


def choose_on_device(
    dynamic: DeviceDynamic,
    query: torch.Tensor,
    keys: torch.Tensor,
    block_table: torch.Tensor,
    tiles: DeviceTiles,
    width: int,
) -> torch.Tensor:
    """Chooses pages for each tile from its queries and the cache; the host waits for nothing.

    Args:
        dynamic: the layer's dynamic heads.
        query: [tokens, kv_heads, group, head_size] of all the layer's KV heads, rotated; last
            dimension contiguous.
        keys: [virtual pages, page, head_size], float16, bfloat16, float32 or fp8; rotated keys of
            the cache, these queries' own included; last dimension contiguous, head size a
            multiple of 8. KV head h of block b is virtual page b * kv_heads + h.
        block_table: int32 [requests, at least width] blocks; what follows a request's last page
            is not read.
        tiles: the queries, cut at pages.
        width: pages of the longest request, or more.

    Returns:
        bool [heads, slots, width], pages beyond the static ones; none for empty slots.
    """
    heads, slots, page = len(dynamic.heads), len(tiles), keys.shape[1]
    chosen = torch.zeros(heads, slots, width, dtype=torch.uint8, device=query.device)
    blocks = PageBlocks(page)
    for queries in (1, page) if tiles.most_queries > 1 else (1,):
        rows = Rows(queries, query.shape[2])
        fitting = SCRATCH // (heads * width * rows.count) // SLOT_STEP * SLOT_STEP
        step = max(SLOT_STEP, fitting)
        for first in range(0, slots, step):
            part = replace(
                tiles,
                request=tiles.request[first : first + step],
                offset=tiles.offset[first : first + step],
            )
            peaks = Peaks.empty(heads, len(part), width, rows, blocks, query)
            score_pages(
                peaks, query, keys, block_table, part, dynamic.heads, dynamic.ranks,
                dynamic.max_rank, rows, dynamic.scale, dynamic.softcap,
            )  # fmt: skip
            ranking = rank_pages(peaks, part, dynamic.static, rows, blocks)
            target = chosen[:, first : first + step]
            choose_pages(target, peaks, ranking, part, dynamic.budgets, rows, page)
    return chosen.view(torch.bool)
