"""Steps of several layers, their caches and what they must give."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from dam_vllm.attention.chosen_pages import ChosenPages
from dam_vllm.attention.cuda import attention as cuda
from dam_vllm.attention.cuda.choices import Choices, rows_of
from dam_vllm.attention.cuda.dynamic import DeviceChoosing
from dam_vllm.attention.cuda.flash import Flash
from dam_vllm.attention.cuda.layer import DeviceLayer
from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.cuda.rotation import DeviceRotation
from dam_vllm.attention.cuda.scratch import Scratch
from dam_vllm.attention.cuda.tail import TailHeads
from dam_vllm.attention.dynamic_heads import DynamicHeads, ReusingHeads
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle import chosen_mask, masked_attention, page_mask
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.sharding import Shard
from tests.unit.attention.cuda.varlen_oracle import varlen

HEADS, KV_HEADS, SIZE, PAGE, SCALE, BLOCKS = 6, 3, 32, 32, 0.2, 80
GROUP = HEADS // KV_HEADS
# Factors of an fp8 cache's keys and values.
SCALES = (0.5, 0.25)
STATIC, DYNAMIC, DENSE, REUSE = list(HeadMode)
MODES = [
    [STATIC, DYNAMIC, DENSE], [DYNAMIC] * 3, [STATIC] * 3, [DENSE, REUSE, DYNAMIC],
    [REUSE, STATIC, REUSE],
]  # fmt: skip
ANCHORS = {(3, 1): (1, 2), (4, 0): (0, 1), (4, 2): (3, 2)}
LIMITS = cuda.Limits(requests=7, tokens=600, length=1024)
# Tokens up to the last query, and queries.
MIXED = ((300, 1), (65, 1), (411, 250), (129, 129), (5, 5), (271, 2))
STEPS = {"mixed": MIXED, "decode": ((391, 1), (1, 1), (640, 1)), "prefill": ((129, 129), (140, 30))}


def layer_masks(random_masks, share=0.01, tails=False):
    """Masks of layers with heads of all modes."""
    made = random_masks(
        layers=len(MODES), heads=HEADS, kv_heads=KV_HEADS, pcl=150, share=share, dynamic=True,
        head_size=SIZE, tails=tails,
    )  # fmt: skip
    made.modes[:] = MODES
    if tails:
        made.tails[made.modes == DENSE] = 0
    anchors = np.full((*made.modes.shape, 2), -1, np.int32)
    for head, anchor in ANCHORS.items():
        anchors[head] = anchor
    return replace(made, anchors=anchors)


def attention(
    masks, device, flash, plans=None, unit=None, counts=None, rotates=False, page=PAGE, softcap=0.0,
    scales=(1.0, 1.0),
):  # fmt: skip
    """All layers of the masks; `plans` is how many numbers the plans' memory holds."""
    shard = Shard(0, KV_HEADS)
    served = {}
    choosing = {layer: shard.dynamic_heads(masks, layer) for layer in range(masks.layers)}
    rows = rows_of(choosing, ChosenPages.of_masks(masks, shard).last)
    slots = LIMITS.tokens // page + 2 * LIMITS.requests
    choices = Choices.of(rows, slots, -(-LIMITS.length // page), device)
    choices.memory.fill_(1)  # what is not written must not be read
    softmax = Softmax(SCALE * scales[0], softcap, scales[1])
    for index in range(masks.layers):
        dynamic = DynamicHeads.of_layer(
            masks, index, shard, page, 0, softmax.scale, softcap, device
        )
        reusing = ReusingHeads.of_layer(masks, index, shard, page, 0, device)
        tails = shard.tails(masks, index)
        served[f"layer {index}"] = DeviceLayer(
            static=cuda.static_sets(masks, index, shard, page, 0, False, device),
            choosing=DeviceChoosing.of_layer(index, dynamic, reusing, choices),
            kv_heads=KV_HEADS, softmax=softmax, flash=Flash(varlen) if flash else None,
            index=index,
            rotation=DeviceRotation.of_layer(masks, index, shard, device) if rotates else None,
            tails=TailHeads(tails, softmax) if tails else None,
        )  # fmt: skip
    scratch = Scratch(LIMITS.tokens, HEADS * SIZE, torch.float32, device)
    if plans is not None:
        scratch._taken = len(scratch._plans) - plans
    return cuda.CUDAAttention(
        served, page, KVLayout(keys_by_channel=False), LIMITS, scratch, 0, counts, device, unit
    )


def make_step(rng, device, requests, padding=0, page=PAGE, stored=torch.float32, drift=0.0):
    """A step over random caches, one for each layer, with poison in what nobody holds.

    Rows of padding follow the queries, as before a CUDA graph of a fixed size. Where there is a
    drift, 64 tokens after each other are alike.
    """
    counts = [-(-stop // page) for stop, _ in requests]
    blocks = max(BLOCKS, sum(counts) + 3)
    order, used = rng.permutation(blocks), 0
    table = torch.full((len(requests), -(-LIMITS.length // page)), 2**30, dtype=torch.int32)
    caches = torch.full((len(MODES), blocks, KV_HEADS, page, 2 * SIZE), torch.nan)
    keys = []
    for row, (stop, _) in enumerate(requests):
        pages = torch.from_numpy(order[used : used + counts[row]].copy())
        used += counts[row]
        table[row, : counts[row]] = pages
        both = torch.randn(len(MODES), stop, KV_HEADS, 2 * SIZE)
        both += (
            drift
            * torch.randn(len(MODES), -(-stop // 64), KV_HEADS, 2 * SIZE)[
                :, torch.arange(stop) // 64
            ]
        )
        both = both.to(stored).float()
        token = torch.arange(stop)
        caches[:, pages[token // page], :, token % page] = both.transpose(0, 1)
        keys.append(both)
    step = step_of(requests, table, device, padding)
    query = torch.randn(len(MODES), step.tokens, HEADS, SIZE).to(device)
    return SimpleNamespace(
        step=step, requests=requests, caches=caches.to(stored).to(device), keys=keys, query=query,
        page=page,
    )  # fmt: skip


def step_of(requests, table, device, padding=0):
    """The step of some requests, whose pages a table tells."""
    new = np.array([count for _, count in requests])
    starts = torch.from_numpy(np.concatenate([[0], new.cumsum()])).int()
    lens = torch.tensor([stop for stop, _ in requests], dtype=torch.int32)
    return Step(
        starts.to(device), starts, lens.to(device), table.to(device), int(new.sum()) + padding,
        int(new.max()), int(lens.max()),
    )  # fmt: skip


def run(served, made, launches=None):
    planned = served.plan(made.step)
    outputs = torch.full_like(made.query, torch.nan)
    tensors = zip(served.layers, made.query, made.caches, outputs, strict=True)
    with launches or nullcontext():
        for name, query, cache, output in [*tensors]:
            served.run(planned, name, query, cache, output)
    return outputs.cpu()


def rotate_queries(masks, made):
    """By plain products, so that the oracle sees what the cache's keys were rotated for."""
    for layer, head in np.argwhere(masks.modes == DYNAMIC):
        basis = torch.from_numpy(masks.dynamic.rotations[layer, head]).to(made.query)
        own = made.query[layer, :, head * GROUP : (head + 1) * GROUP]
        own.copy_(own @ basis)


def expected(masks, made, layer, softcap=0.0):
    """The oracle's output of a layer."""
    outputs, first, page = [], 0, made.page
    tails = Shard(0, KV_HEADS).tails(masks, layer)
    for (stop, count), stored in zip(made.requests, made.keys, strict=True):
        asked = made.query[layer, first : first + count].cpu()
        key, value = stored[layer].split(SIZE, dim=-1)
        mask = page_mask(masks, layer, stop - count, stop, page)
        static = page_mask(masks, layer, stop - count, stop, page, 0, page)
        for head in np.flatnonzero(np.isin(masks.modes[layer], (DYNAMIC, REUSE))):
            own = slice(head * GROUP, (head + 1) * GROUP)
            anchor = (layer, head) if masks.modes[layer, head] == DYNAMIC else ANCHORS[layer, head]
            rows = slice(first, first + count)
            mask[own] = static[own] | chosen(masks, made, anchor, rows, stored, softcap)
        mask = torch.from_numpy(mask)
        outputs.append(masked_attention(asked, key, value, mask, SCALE, softcap, tails, page))
        first += count
    return torch.cat(outputs)


def chosen(masks, made, anchor, rows, stored, softcap=0.0):
    """What the oracle lets an anchor choose for some rows of one request: bool [rows, keys]."""
    layer, head = anchor
    own = slice(head * GROUP, (head + 1) * GROUP)
    stop, page = stored.shape[1], made.page
    static = page_mask(masks, layer, stop - rows.stop + rows.start, stop, page, 0, page)
    query, key = made.query[layer, rows, own].cpu(), stored[layer, :, head, :SIZE]
    return chosen_mask(masks, layer, head, query, key, static[own][0], page, SCALE, softcap)
