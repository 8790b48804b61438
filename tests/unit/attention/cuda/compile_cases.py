"""Compiles the kernels that the tuning table can launch; prints what they need, as JSON.

Run as a program in a process without TRITON_INTERPRET: `compile_cases.py CAPABILITY ...`.
"""

import functools
import json
import sys
from unittest.mock import patch

import numpy as np
import torch

from dam_vllm.attention.cuda import paged, tail, tuning
from dam_vllm.attention.cuda.bundle import Part
from dam_vllm.attention.cuda.choices import Choices
from dam_vllm.attention.cuda.counts import DeviceCounts
from dam_vllm.attention.cuda.means import write_means
from dam_vllm.attention.cuda.places import Homes, Places
from dam_vllm.attention.cuda.plan import DevicePlan, plan_heads
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_slots
from dam_vllm.attention.cuda.rotation import DeviceRotation, quantise
from dam_vllm.attention.cuda.store import HeadStore
from dam_vllm.attention.cuda.token_bits import TokenBits
from dam_vllm.attention.span_means import SpanMeans
from dam_vllm.masks.page_tables import PageSelector, PageTables, query_block_size
from tests.unit.attention.cuda.compiling import choose_pages_of, compile_launches, resources

KV_HEADS, HEADS_PER_KV, WIDTH, FP8 = 2, 4, 1024, torch.float8_e4m3fn
# Head size, page, cache, queries a request, token masks.
CASES = (
    (128, 128, None, 999, False),
    (128, 16, None, 1, False),
    (256, 64, None, 999, False),
    (256, 16, None, 1, False),
    (128, 128, None, 999, True),
    (64, 32, None, 1, True),
    (96, 32, torch.float8_e4m3fn, 999, False),
)
# Head size, page, queries' dtype, cache, queries a request, whether pages are chosen.
TAILS = (
    (128, 128, torch.bfloat16, torch.bfloat16, 999, False),
    (128, 16, torch.bfloat16, torch.bfloat16, 1, True),
    (128, 128, torch.bfloat16, torch.bfloat16, 999, True),
    (256, 16, torch.bfloat16, torch.bfloat16, 999, True),
    (96, 48, FP8, FP8, 999, False),
    (256, 64, torch.bfloat16, FP8, 1, False),
)


def page_selector(page, query_block):
    """Page tables of all heads."""
    flags = np.zeros((KV_HEADS, 4, 4), dtype=bool)
    tables = PageTables(page, query_block, flags, flags[:, 0], flags[:, 0], flags[:, 0, 0])
    return PageSelector([tables])


def blocks_of(queries, query_block):
    """Two requests' queries."""
    request, offset = torch.from_numpy(query_block_slots(np.full(2, queries), query_block))
    ints = torch.zeros(3, dtype=torch.int32)
    most = min(queries, query_block)
    return DeviceQueryBlocks(request, offset, ints, ints[:2], query_block, most)


def serve(size, page, stored, queries, exact, capability):
    """Plans and attends on empty tensors, as a GPU of a capability would."""
    query_block = query_block_size(page)
    query_blocks, ints = blocks_of(queries, query_block), torch.zeros(3, dtype=torch.int32)
    plan = DevicePlan.empty(query_blocks, Places.by_head([KV_HEADS], ints.device), WIDTH, exact)
    heads = torch.arange(KV_HEADS, dtype=torch.int32)
    blocks = torch.zeros(2, WIDTH, dtype=torch.int32)
    counts = DeviceCounts([0], KV_HEADS, 0, ints.device)
    counts.close_step()
    plan_heads(
        plan, heads, page_selector(page, query_block), query_blocks, blocks, 2 * queries, KV_HEADS,
        tally=counts.tally([(0, head) for head in range(KV_HEADS)]),
    )  # fmt: skip
    query = torch.empty(2 * queries, KV_HEADS * HEADS_PER_KV, size, dtype=torch.bfloat16)
    cache = torch.empty(9, page, 2 * size, dtype=stored or query.dtype)
    bits = torch.zeros(KV_HEADS * HEADS_PER_KV, 128, dtype=torch.uint8)
    with patch.object(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10)):
        # The table is asked as if the tensors lay on a GPU.
        tuned = tuning.tuning(
            torch.device("cuda"), size, query_blocks.most_queries * HEADS_PER_KV, exact
        )
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    paged.attend_paged(
        query, *cache.split(size, dim=-1), torch.empty_like(query), plan, query_blocks, heads,
        KV_HEADS, paged.Softmax(0.1), TokenBits(bits, bits, bits, 40, 1024, 0) if exact else None,
        tuned, lse,
    )  # fmt: skip


def add_tail(size, page, asked, stored, queries, chooses):
    """Writes means and adds a tail, of heads that choose pages or not."""
    static, query_block = query_block_size(page), page if chooses else query_block_size(page)
    every, heads = blocks_of(queries, static), torch.arange(KV_HEADS, dtype=torch.int32)
    table = torch.zeros(3, 2, WIDTH, dtype=torch.int32)
    cache, homes = torch.empty(9, page, 2 * size, dtype=stored), Homes.unknown(2, 1, heads.device)
    (key, value), means = cache.split(size, dim=-1), SpanMeans()
    write_means(means.of(key, torch.bfloat16), key, value, homes, every, table)
    choices = Choices.of({(0, 0): 0}, 2 * queries, WIDTH, heads.device) if chooses else None
    made = tail.Tail(
        heads, heads, heads, page_selector(page, query_block), homes, paged.Softmax(0.1, 5.0),
        means, (choices, heads) if chooses else None,
    )  # fmt: skip
    query = torch.empty(KV_HEADS, 2 * queries, HEADS_PER_KV, size, dtype=asked)
    read = tail.Read(query, query.bfloat16(), query.new_empty(query.shape[:3]).float())
    blocks = {query_block: blocks_of(queries, query_block)}
    part = Part(blocks, table, slice(0, 2 * queries), WIDTH)
    made.add(read, key, part, gathered=True)


def launches(capability):
    """What to compile, by name."""
    for case in CASES:
        if case[2] is None or capability >= 89:
            yield str(case), functools.partial(serve, *case, capability)
    for case in TAILS:
        if FP8 not in case or capability >= 89:
            yield f"tail of {case}", functools.partial(add_tail, *case)
    dtypes = [torch.bfloat16] if capability < 89 else [torch.bfloat16, FP8]
    for dtype in dtypes:
        for queries in (1, 32):
            choice = functools.partial(choose_pages_of, dtype, dtype, 32, queries)
            yield f"choice of {queries}, {dtype}", choice
            few = functools.partial(choose_pages_of, dtype, dtype, 32, queries, channels=16)
            yield f"choice of {queries} by 16 channels, {dtype}", few
        for rotated in (False, True):
            yield f"store, {dtype}, {rotated}", functools.partial(store, dtype, rotated)
        yield f"rotation, {dtype}", functools.partial(rotate, dtype)
    yield "gathered rotation", functools.partial(gather, torch.bfloat16)


def store(dtype, rotated):
    """Stores keys of heads in several groups, turned or not."""
    key = torch.empty(5, KV_HEADS, 128, dtype=torch.bfloat16)
    keys, values = torch.empty(9, 64, 256, dtype=dtype).split(128, dim=-1)
    slots, one = torch.zeros(3, 5, dtype=torch.int64), torch.ones(())
    homes = Homes.unknown(KV_HEADS, 1, key.device)
    made = DeviceRotation(torch.tensor([1]), torch.empty(1, 128, 128)) if rotated else None
    HeadStore(homes, (one, one), made).write(key, key, keys, values, slots[0], slots)


def rotate(dtype):
    """Rotates queries, and quantises those of an fp8 cache."""
    made = DeviceRotation(torch.tensor([1]), torch.empty(1, 128, 128))
    query = torch.empty(5, KV_HEADS * HEADS_PER_KV, 128, dtype=torch.bfloat16)
    made.queries(query, KV_HEADS, torch.ones(()) if dtype == FP8 else None)
    if dtype == FP8:
        quantise(query, torch.ones(()))


def gather(dtype):
    """Lays queries head by head, turned."""
    made = DeviceRotation(torch.tensor([1]), torch.empty(1, 128, 128))
    query = torch.empty(5, KV_HEADS * HEADS_PER_KV, 128, dtype=dtype)
    heads = torch.tensor([1, 0], dtype=torch.int32)
    made.gather(query, heads, query.new_empty(2, 5, HEADS_PER_KV, 128))


def main():
    for capability in map(int, sys.argv[1:]):
        for case, launch in launches(capability):
            for name, kernel in compile_launches(launch, capability).items():
                told = {"capability": capability, "case": case, "kernel": name}
                print(json.dumps(told | resources(kernel)), flush=True)


if __name__ == "__main__":
    main()
