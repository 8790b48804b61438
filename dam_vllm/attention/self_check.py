"""A platform's sparse attention beside the oracle, on random input, for `dam-vllm doctor`."""

from collections.abc import Callable

import numpy as np
import torch

from dam_vllm.attention.chosen_pages import ChosenPages
from dam_vllm.attention.interface import SparseAttention, Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle_attention import OracleAttention, OracleLayer
from dam_vllm.masks.fingerprint import Fingerprint
from dam_vllm.masks.mask_set import Header, HeadMode, MaskSet, pack_lower
from dam_vllm.masks.sharding import Shard

LAYER, HEADS, KV_HEADS, SIZE, PAGE, SCALE = "layer", 4, 2, 64, 32, 0.125
PCL, KEPT = 200, 0.01
# Tokens up to the last query, and queries: one that decodes, then a prompt's end and a whole one.
REQUESTS = ((389, 1), (300, 77), (150, 150))


def difference(
    make: Callable[[MaskSet], SparseAttention],
    layout: KVLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Compares attention of a random step under random masks.

    Args:
        make: gives the platform's attention, of one layer named LAYER.
        layout: of the cache that it reads.
        dtype: of queries and cache.
        device: where they are.

    Returns:
        The largest difference from the oracle; the largest float32 where an output was not written
        or is no number.
    """
    masks, generator = _masks(), torch.Generator().manual_seed(0)
    step, blocks = _step(device)
    cache = torch.randn(blocks, KV_HEADS, PAGE, 2 * SIZE, generator=generator).to(device, dtype)
    query = torch.randn(step.tokens, HEADS, SIZE, generator=generator).to(device, dtype)
    oracle = OracleAttention(
        served={LAYER: OracleLayer(0, SCALE, 0.0)},
        masks=masks,
        shard=Shard(0, KV_HEADS),
        layout=layout,
        exact=False,
        dense_below=0,
        chosen=ChosenPages(),
    )
    outputs = []
    for attention in (make(masks), oracle):
        output = torch.full_like(query, torch.nan)
        attention.run(attention.plan(step), LAYER, query, cache, output)
        outputs.append(output.float().cpu())
    found = (outputs[0] - outputs[1]).abs().max()
    return float(found.nan_to_num(torch.finfo(found.dtype).max))


def _masks() -> MaskSet:
    rng = np.random.default_rng(0)
    return MaskSet(
        columns=rng.random((1, HEADS, PCL)) < KEPT,
        diagonals=rng.random((1, HEADS, PCL)) < KEPT,
        true_bits=pack_lower(rng.random((1, HEADS, PCL, PCL)) < KEPT**2),
        modes=np.full((1, KV_HEADS), HeadMode.STATIC, dtype=np.uint8),
        header=Header(
            kind="calibrated",
            model="random",
            fingerprint=Fingerprint(config="0"),
            layer_types=["full"],
            pcl=PCL,
        ),
    )


def _step(device: torch.device) -> tuple[Step, int]:
    """A step whose requests hold pages in a random order, and how many pages there are."""
    counts = [-(-stop // PAGE) for stop, _ in REQUESTS]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).int()
    table = torch.zeros(len(REQUESTS), max(counts), dtype=torch.int32)
    for row, pages in enumerate(order.split(counts)):
        table[row, : counts[row]] = pages
    new = [count for _, count in REQUESTS]
    starts = torch.tensor([0, *np.cumsum(new)], dtype=torch.int32)
    lens = torch.tensor([stop for stop, _ in REQUESTS], dtype=torch.int32)
    step = Step(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lens.to(device),
        block_table=table.to(device),
        tokens=sum(new),
        max_query_len=max(new),
        max_seq_len=int(lens.max()),
    )
    return step, sum(counts)
