"""Drives the backend's own code on a random paged cache, without an engine, for benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from dam_vllm.attention.cpu.plan import VirtualPages, build_plan
from dam_vllm.attention.cpu.select import select_dynamic
from dam_vllm.attention.query_blocks import cut_query_blocks
from dam_vllm.engine.dynamic import DynamicStep, layer_dynamic
from dam_vllm.engine.shards import Shard
from dam_vllm.engine.virtual import Scheduler, VirtualBatch, attend
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.page_tables import PageSelector

Step = Callable[[], torch.Tensor]
LAYER = SimpleNamespace(_k_scale_float=1.0, _v_scale_float=1.0)


@dataclass(frozen=True)
class Shape:
    """One attention layer.

    Attributes:
        heads: query heads.
        kv_heads: KV heads.
        head_size: channels a head.
        page: tokens a page.
        dtype: of queries, keys and values.
    """

    heads: int
    kv_heads: int
    head_size: int
    page: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return float(self.head_size**-0.5)

    @property
    def isa(self) -> str:
        return str(_get_attn_isa(self.dtype, self.page, self.head_size, "auto"))

    def scheduler(self) -> Scheduler:
        """What schedules virtual sequences of this shape."""
        group = self.heads // self.kv_heads
        return Scheduler(group, self.head_size, self.dtype, self.isa, "auto")


@dataclass(frozen=True)
class Batch:
    """Geometry of a step.

    Attributes:
        query_start_loc: int32 [requests + 1], first query row of each request.
        seq_lens: int32 [requests], tokens of each request up to its last query.
        block_table_tensor: int32 [requests, pages], pages of each request.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table_tensor: torch.Tensor


@dataclass(frozen=True)
class Prompt:
    """A random prompt in a paged cache with shuffled pages.

    Attributes:
        shape: of the layer.
        query: [tokens, heads, head_size].
        key: [tokens, kv_heads, head_size].
        value: [tokens, kv_heads, head_size].
        cache: [pages, kv_heads, page, 2 * head_size], keys and values as the kernel packs them.
        batch: one request, all its tokens new.
    """

    shape: Shape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    batch: Batch


def random_batch(requests: int, tokens: int, new: int, page: int) -> Batch:
    """Requests of the same length with shuffled pages.

    Args:
        requests: how many.
        tokens: length of each.
        new: query rows of each in this step.
        page: tokens a page.

    Returns:
        The batch.
    """
    pages = -(-tokens // page)
    return Batch(
        query_start_loc=torch.arange(requests + 1, dtype=torch.int32) * new,
        seq_lens=torch.full((requests,), tokens, dtype=torch.int32),
        block_table_tensor=torch.randperm(requests * pages).int().view(requests, pages),
    )


def random_prompt(shape: Shape, tokens: int) -> Prompt:
    """Draws a prompt and stores its keys and values by vLLM's own kernel.

    Args:
        shape: of the layer.
        tokens: length of the prompt.

    Returns:
        The prompt.
    """
    size, page = shape.head_size, shape.page
    query, key, value = (
        torch.randn(tokens, heads, size).to(shape.dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    batch = random_batch(1, tokens, tokens, page)
    blocks = batch.block_table_tensor[0].long()
    cache = torch.zeros(len(blocks), shape.kv_heads, page, 2 * size, dtype=shape.dtype)
    keys, values = cache.view(len(blocks), shape.kv_heads, 2 * page, size).chunk(2, dim=2)
    token = torch.arange(tokens)
    slots = blocks[token // page] * page + token % page
    ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, shape.isa)
    return Prompt(shape, query, key, value, cache, batch)


def dense_step(prompt: Prompt) -> Step:
    """The prompt's attention as vLLM's stock CPU backend computes it.

    Args:
        prompt: the prompt.

    Returns:
        A function that computes [tokens, heads, head_size]; schedule and output are made
        beforehand, as vLLM does.
    """
    shape = prompt.shape
    starts, lens = prompt.batch.query_start_loc, prompt.batch.seq_lens
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_size,
        seq_lens=lens,
        dtype=shape.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=shape.isa,
        enable_kv_split=True,
    )
    blocks, kv_heads, page, width = prompt.cache.shape
    keys, values = prompt.cache.view(blocks, kv_heads, 2 * page, width // 2).chunk(2, dim=2)
    output = torch.empty_like(prompt.query)

    def step() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query=prompt.query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=starts,
            seq_lens=lens,
            scale=shape.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=prompt.batch.block_table_tensor,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
        return output

    return step


def virtual_step(prompt: Prompt, selector: PageSelector) -> Step:
    """The prompt's attention as our backend computes it, permutations included.

    Args:
        prompt: the prompt.
        selector: page tables of one layer.

    Returns:
        A function that computes [tokens, heads, head_size]; plan and output are made
        beforehand, as vLLM does.
    """
    impl = SimpleNamespace(scale=prompt.shape.scale, logits_soft_cap=0.0, kv_cache_dtype="auto")
    (virtual,) = planner(prompt.shape, selector)(prompt.batch)
    output = torch.empty_like(prompt.query)
    grouped = (len(output), prompt.shape.kv_heads, -1, prompt.shape.head_size)

    def step() -> torch.Tensor:
        query, result = prompt.query.view(grouped), output.view(grouped)
        attend(impl, LAYER, query, prompt.cache, virtual, result)
        return output

    return step


@dataclass(frozen=True)
class DynamicSteps:
    """What dynamic heads do with a prompt, step by step; each function can be called alone.

    Attributes:
        rotate: turns queries and keys into the basis.
        select: scores and chooses pages, bool [kv_heads, query_blocks, pages].
        whole: all of it and attention over the pages, [tokens, heads, head_size].
    """

    rotate: Step
    select: Step
    whole: Step


def dynamic_steps(prompt: Prompt, masks: MaskSet) -> DynamicSteps:
    """The prompt's attention where all heads are dynamic, as our backend computes it.

    Args:
        prompt: the prompt; its cache is taken as if its keys were rotated.
        masks: one layer, all of whose heads are dynamic.

    Returns:
        The steps.
    """
    shape, page = prompt.shape, prompt.shape.page
    every = Shard(0, shape.kv_heads)
    dynamic = layer_dynamic(masks, 0, 0, every, page, 0, shape.scale, 0.0, None, shape.scheduler())
    assert dynamic is not None
    starts, lens = prompt.batch.query_start_loc, prompt.batch.seq_lens
    query_blocks = cut_query_blocks(starts, lens, page)
    where = VirtualPages.of_layers(prompt.batch.block_table_tensor, 1, shape.kv_heads)
    step = DynamicStep(query_blocks, starts.diff(), where)
    grouped = prompt.query.view(len(prompt.query), shape.kv_heads, -1, shape.head_size)
    keys = prompt.cache.view(-1, 2, shape.head_size, page)[:, 0]
    output = torch.empty_like(prompt.query)
    impl = SimpleNamespace(scale=shape.scale, logits_soft_cap=0.0, kv_cache_dtype="auto")

    def rotate() -> torch.Tensor:
        dynamic.rotation.keys(prompt.key)
        return dynamic.rotation.queries(prompt.query, shape.kv_heads)

    def select() -> torch.Tensor:
        asked = grouped.transpose(0, 1)[..., : max(dynamic.dynamic.channels)][
            dynamic.rotation.heads
        ]
        return select_dynamic(dynamic.dynamic, asked, keys, query_blocks, where.tables()[0])

    def whole() -> torch.Tensor:
        rotate()
        batch = dynamic.virtual(grouped, prompt.cache, step)
        attend(impl, LAYER, grouped, prompt.cache, batch, output.view(grouped.shape))
        return output

    return DynamicSteps(rotate, select, whole)


def planner(shape: Shape, selector: PageSelector) -> Callable[[Batch], list[VirtualBatch]]:
    """What the backend does once a step: query blocks, plan, and every layer's schedule.

    Args:
        shape: of the layers.
        selector: their page tables.

    Returns:
        A function from a batch to each layer's virtual sequences.
    """
    heads = list(range(selector.heads))
    scheduler = shape.scheduler()

    def plan(batch: Batch) -> list[VirtualBatch]:
        query_blocks = cut_query_blocks(batch.query_start_loc, batch.seq_lens, selector.query_block)
        table = batch.block_table_tensor
        where = VirtualPages.of_layers(table, selector.layers, selector.heads)
        made = build_plan(selector, query_blocks, where)
        layers = range(selector.layers)
        batches = (scheduler.static(made, layer, selector.heads, heads) for layer in layers)
        return [batch for batch in batches if batch is not None]

    return plan
