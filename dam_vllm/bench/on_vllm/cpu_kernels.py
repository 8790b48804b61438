"""Drives the backend's own code on a random paged cache, without an engine, for benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dam_vllm.attention.cpu.attention import CPUAttention
from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.kernel import CPULayer
from dam_vllm.attention.cpu.rotation import CPURotation
from dam_vllm.attention.cpu.score import span_scores
from dam_vllm.attention.cpu.select import span_tokens
from dam_vllm.attention.dynamic_heads import DynamicHeads
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.engine.cpu import CPUKernel
from dam_vllm.engine.private import attention_isa, ops
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.page_tables import PageSelector
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.sharding import Shard

Call = Callable[[], torch.Tensor]
LAYOUT = KVLayout(keys_by_channel=True)


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
        return attention_isa(self.dtype, self.page, self.head_size)

    def attention(
        self, selector: PageSelector, dynamic: DynamicHeads | None = None, tails: bool = False
    ) -> CPUAttention:
        """Our attention of layers of this shape: "0", "1", ...

        Args:
            selector: their page tables.
            dynamic: how every head chooses pages, or None for static ones.
            tails: whether all heads have tails.
        """
        heads = range(self.kv_heads)
        fixed, tailed = ([] if dynamic else heads), (heads if tails else ())
        layer = CPULayer(self.scale, 0.0, fixed, dynamic, tails=tailed)
        kernel = CPUKernel(
            self.heads // self.kv_heads, self.head_size, self.dtype, self.isa, "auto"
        )
        layers = {str(row): layer for row in range(selector.layers)}
        return CPUAttention(layers, selector, kernel, LAYOUT)


@dataclass(frozen=True)
class Prompt:
    """A random prompt in a paged cache with shuffled pages.

    Attributes:
        shape: of the layer.
        query: [tokens, heads, head_size].
        key: [tokens, kv_heads, head_size].
        value: [tokens, kv_heads, head_size].
        cache: [pages, kv_heads, page, 2 * head_size], keys and values as the kernel packs them.
        step: one request, all its tokens new.
    """

    shape: Shape
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    step: Step


def random_step(requests: int, tokens: int, new: int, page: int) -> Step:
    """Requests of the same length with shuffled pages.

    Args:
        requests: how many.
        tokens: length of each.
        new: query rows of each in this step.
        page: tokens a page.

    Returns:
        The step.
    """
    pages = ceil_div(tokens, page)
    starts = torch.arange(requests + 1, dtype=torch.int32) * new
    return Step(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.full((requests,), tokens, dtype=torch.int32),
        block_table=torch.randperm(requests * pages).int().view(requests, pages),
        tokens=requests * new,
        max_query_len=new,
        max_seq_len=tokens,
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
    step = random_step(1, tokens, tokens, page)
    blocks = step.block_table[0].long()
    cache = torch.zeros(len(blocks), shape.kv_heads, page, 2 * size, dtype=shape.dtype)
    keys, values = paged(cache)
    token = torch.arange(tokens)
    slots = blocks[token // page] * page + token % page
    ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, shape.isa)
    return Prompt(shape, query, key, value, cache, step)


def paged(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [blocks, kv_heads, page, head_size] as vLLM's kernels take them."""
    keys, values = LAYOUT.keys_and_values(cache)
    return keys.unflatten(0, cache.shape[:2]), values.unflatten(0, cache.shape[:2])


def dense_step(prompt: Prompt) -> Call:
    """The prompt's attention as vLLM's stock CPU backend computes it.

    Args:
        prompt: the prompt.

    Returns:
        A function that computes [tokens, heads, head_size]; schedule and output are made
        beforehand, as vLLM does.
    """
    shape = prompt.shape
    starts, lens = prompt.step.query_start_loc, prompt.step.seq_lens
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
    keys, values = paged(prompt.cache)
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
            block_table=prompt.step.block_table,
            softcap=0.0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
        return output

    return step


def virtual_step(prompt: Prompt, selector: PageSelector) -> Call:
    """The prompt's attention as our backend computes it, permutations included.

    Args:
        prompt: the prompt.
        selector: page tables of one layer.

    Returns:
        A function that computes [tokens, heads, head_size]; plan and output are made
        beforehand, as vLLM does.
    """
    attention = prompt.shape.attention(selector)
    plan, output = attention.plan(prompt.step), torch.empty_like(prompt.query)

    def step() -> torch.Tensor:
        attention.run(plan, "0", prompt.query, prompt.cache, output)
        return output

    return step


@dataclass(frozen=True)
class DynamicSteps:
    """What dynamic heads do with a prompt, step by step; each function can be called alone.

    Attributes:
        rotate: turns queries and keys into the basis.
        gather: the keys' leading channels, float32 [kv_heads, pages, channels, page].
        product: the largest score of each page, for a span of queries after the other; of the last.
        select: scores and chooses pages, bool [kv_heads, query_blocks, pages].
        whole: all of it and attention over the pages, [tokens, heads, head_size].
        tailed: the same where all heads have tails.
    """

    rotate: Call
    gather: Call
    product: Call
    select: Call
    whole: Call
    tailed: Call


def dynamic_steps(prompt: Prompt, masks: MaskSet) -> DynamicSteps:
    """The prompt's attention where all heads are dynamic, as our backend computes it.

    Args:
        prompt: the prompt; its cache is taken as if its keys were rotated.
        masks: one layer, all of whose heads are dynamic.

    Returns:
        The steps.
    """
    shape, every = prompt.shape, Shard(0, prompt.shape.kv_heads)
    dynamic = DynamicHeads.of_layer(masks, 0, every, shape.page, 0, shape.scale, 0.0)
    rotation = CPURotation.of_layer(masks, 0, every)
    assert dynamic is not None
    assert rotation is not None
    selector = PageSelector([every.tables(masks, 0, shape.page)])
    attention = shape.attention(selector, dynamic)
    plan = attention.plan(prompt.step)
    grouped = prompt.query.view(len(prompt.query), shape.kv_heads, -1, shape.head_size)

    def rotate() -> torch.Tensor:
        rotation.keys(prompt.key)
        return rotation.queries(prompt.query, shape.kv_heads)

    keys = CachedKeys(LAYOUT.channels(prompt.cache))
    tables = plan.where.take(0, torch.arange(shape.kv_heads)).tables()[0, :, 0]
    channels = dynamic.channels[0]

    def gather() -> torch.Tensor:
        return torch.stack([keys.gather(channels, table) for table in tables])

    cached, scoring = gather(), grouped[..., :channels].transpose(0, 1).float()
    size = span_tokens(shape.page, grouped.shape[2])
    scores = span_scores(channels, shape.page, grouped.dtype)

    def product() -> torch.Tensor:
        for asked, held in zip(scoring, cached, strict=True):
            packed = scores.keys(held)
            for first in range(0, asked.shape[0], size):
                rows = asked[first : first + size].flatten(0, 1)
                found = scores.max_scores(rows, packed[: (first + size) // shape.page])
        return found

    def select() -> torch.Tensor:
        return attention.select(plan, "0", grouped, prompt.cache)

    def everything(tails: bool) -> Call:
        made = shape.attention(selector, dynamic, tails)
        plan, output = made.plan(prompt.step), torch.empty_like(prompt.query)

        def step() -> torch.Tensor:
            rotate()
            made.run(plan, "0", prompt.query, prompt.cache, output)
            return output

        return step

    return DynamicSteps(rotate, gather, product, select, everything(False), everything(True))
