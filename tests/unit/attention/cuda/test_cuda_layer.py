"""A layer's decoding captured in a CUDA graph and replayed for other lengths."""

import numpy as np
import pytest
import torch

from dam_vllm.attention.cuda.layer import DeviceLayer, HeadSet, Part
from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.cuda.plan import DeviceQueryBlocks
from dam_vllm.attention.cuda.select import DeviceDynamic
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle import dynamic_mask, masked_attention, page_mask
from dam_vllm.masks.page_tables import PageSelector, page_tables

HEADS, KV_HEADS, SIZE, PAGE, BLOCKS, SCALE = 8, 2, 64, 32, 99, 0.15
REQUESTS, LONGEST = 4, 1024


def device_layer(masks, device):
    """A static head and a dynamic one."""
    sets = []
    for head, query_block in ((0, None), (1, PAGE)):
        tables = page_tables(masks, 0, PAGE, query_block).take([head])
        selector = PageSelector([tables], 0, device)
        dynamic = None
        if query_block is not None:
            budget = masks.dynamic.budget(0, head, PAGE)
            channels = int(masks.dynamic.channels[0, head])
            chosen = DynamicHeads([channels], [budget], selector, SCALE, ids=[head])
            dynamic = DeviceDynamic.of(chosen)
        heads = torch.tensor([head], dtype=torch.int32, device=device)
        sets.append(HeadSet((head,), heads, selector, dynamic))
    return DeviceLayer(sets, KV_HEADS, Softmax(SCALE), None)


def expected(masks, query, cache, table, stop):
    """The oracle for one query after `stop` - 1 tokens."""
    pages = cache[table[: -(-stop // PAGE)].long()].cpu().float()
    keys, values = pages.transpose(1, 2).flatten(0, 1)[:stop].split(SIZE, dim=-1)
    mask = page_mask(masks, 0, stop - 1, stop, PAGE)
    static = page_mask(masks, 0, stop - 1, stop, PAGE, query_block=PAGE)
    group = HEADS // KV_HEADS
    asked = query[None, group:].cpu().float()
    mask[group:] = dynamic_mask(masks, 0, 1, asked, keys[:, 1], static[group], PAGE, SCALE)
    return masked_attention(query[None].cpu(), keys, values, torch.from_numpy(mask), SCALE)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: captures a graph")
def test_replayed_graph_follows_the_lengths(rng, random_masks):
    torch.manual_seed(int(rng.integers(2**31)))
    device = torch.device("cuda")
    masks = random_masks(
        layers=1, heads=HEADS, kv_heads=KV_HEADS, share=0.02, dynamic=True, head_size=SIZE
    )
    layer = device_layer(masks, device)
    cache = torch.randn(BLOCKS, KV_HEADS, PAGE, 2 * SIZE, device=device, dtype=torch.float16)
    order = rng.permutation(BLOCKS)[: REQUESTS * 8].reshape(REQUESTS, 8)
    table = torch.zeros(REQUESTS, LONGEST // PAGE, dtype=torch.int32)
    table[:, :8] = torch.from_numpy(order)
    table = table.to(device)
    each = torch.arange(REQUESTS + 1, dtype=torch.int32, device=device)
    lens = torch.full((REQUESTS,), 3, dtype=torch.int32, device=device)
    query_blocks = {
        query_block: DeviceQueryBlocks(
            each[:-1], torch.zeros_like(lens), each, lens, query_block, 1
        )
        for query_block in (PAGE, 128)
    }
    part = Part(query_blocks, table, slice(0, REQUESTS), LONGEST // PAGE)
    query = torch.randn(REQUESTS, HEADS, SIZE, device=device, dtype=torch.float16)
    output = torch.empty_like(query)
    key, value = KVLayout(keys_by_channel=False).keys_and_values(cache)
    layer.attend(query, key, value, output, part)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.attend(query, key, value, output, part)
    for _ in range(3):
        stops = rng.integers(1, 8 * PAGE + 1, REQUESTS)
        lens.copy_(torch.from_numpy(stops.astype(np.int32)))
        query.copy_(torch.randn_like(query))
        output.fill_(torch.nan)
        graph.replay()
        wanted = [
            expected(masks, query[row], cache, table[row], int(stop))
            for row, stop in enumerate(stops)
        ]
        torch.testing.assert_close(output.float().cpu(), torch.stack(wanted), rtol=4e-3, atol=4e-3)
