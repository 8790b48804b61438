"""A layer's decoding captured in a CUDA graph and replayed for other lengths."""

import numpy as np
import pytest
import torch

from dam_vllm.attention.cuda.attention import CUDAAttention, Limits, static_sets
from dam_vllm.attention.cuda.choices import Choices
from dam_vllm.attention.cuda.dynamic import DeviceChoosing
from dam_vllm.attention.cuda.layer import DeviceLayer
from dam_vllm.attention.cuda.paged import Softmax
from dam_vllm.attention.cuda.scratch import Scratch
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle import masked_attention, page_mask
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.sharding import Shard
from tests.oracle import dynamic_mask

HEADS, KV_HEADS, SIZE, PAGE, BLOCKS, SCALE = 8, 2, 64, 32, 99, 0.15
REQUESTS, LONGEST = 4, 1024


def attention(masks, device):
    """A static head and a dynamic one."""
    shard = Shard(0, KV_HEADS)
    dynamic = DynamicHeads.of_layer(masks, 0, shard, PAGE, 0, SCALE, 0.0, device)
    choices = Choices.of({(0, 1): 0}, 256, LONGEST // PAGE, device)
    layer = DeviceLayer(
        static=static_sets(masks, 0, shard, PAGE, 0, False, device),
        choosing=DeviceChoosing.of_layer(0, dynamic, None, choices),
        kv_heads=KV_HEADS, softmax=Softmax(SCALE), flash=None,
    )  # fmt: skip
    return CUDAAttention(
        served={"layer": layer}, page=PAGE, layout=KVLayout(keys_by_channel=False),
        limits=Limits(REQUESTS, 256, LONGEST), scratch=Scratch(0, 0, torch.float16, device),
        dense_below=0, counts=None, device=device,
    )  # fmt: skip


def expected(masks, query, cache, table, stop):
    """The oracle for one query after `stop` - 1 tokens."""
    pages = cache[table[: -(-stop // PAGE)].long()].cpu().float()
    keys, values = pages.transpose(1, 2).flatten(0, 1)[:stop].split(SIZE, dim=-1)
    mask = page_mask(masks, 0, stop - 1, stop, PAGE)
    static = page_mask(masks, 0, stop - 1, stop, PAGE, query_block=PAGE)
    heads_per_kv = HEADS // KV_HEADS
    asked = query[None, heads_per_kv:].cpu().float()
    mask[heads_per_kv:] = dynamic_mask(
        masks, 0, 1, asked, keys[:, 1], static[heads_per_kv], PAGE, SCALE
    )
    return masked_attention(query[None].cpu(), keys, values, torch.from_numpy(mask), SCALE)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: captures a graph")
def test_replayed_graph_follows_the_lengths(rng, random_masks):
    torch.manual_seed(int(rng.integers(2**31)))
    device = torch.device("cuda")
    masks = random_masks(
        layers=1, heads=HEADS, kv_heads=KV_HEADS, share=0.02, dynamic=True, head_size=SIZE
    )
    masks.modes[0] = [HeadMode.STATIC, HeadMode.DYNAMIC]
    served = attention(masks, device)
    cache = torch.randn(BLOCKS, KV_HEADS, PAGE, 2 * SIZE, device=device, dtype=torch.float16)
    order = rng.permutation(BLOCKS)[: REQUESTS * 8].reshape(REQUESTS, 8)
    table = torch.zeros(REQUESTS, LONGEST // PAGE, dtype=torch.int32)
    table[:, :8] = torch.from_numpy(order)
    table = table.to(device)
    each = torch.arange(REQUESTS + 1, dtype=torch.int32, device=device)
    lens = torch.full((REQUESTS,), 3, dtype=torch.int32, device=device)
    planned = served.plan(Step(each, each.cpu(), lens, table, REQUESTS, 1, LONGEST))
    query = torch.randn(REQUESTS, HEADS, SIZE, device=device, dtype=torch.float16)
    output = torch.empty_like(query)
    served.run(planned, "layer", query, cache, output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        served.run(planned, "layer", query, cache, output)
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
