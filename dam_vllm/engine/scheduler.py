"""Chunks of prompts that end at pages, so that heads that choose answer alike under any load.

A dynamic head chooses pages for all queries of a page that run together. Where a step's tokens are
used up inside a page, vLLM's schedulers split it, and each part reads what its own queries want;
these leave such a page to the next step.
"""

import math
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec
from vllm.v1.request import Request

from dam_vllm.engine.serving import Serving, logger
from dam_vllm.masks.mask_set import HeadMode


class PageScheduler(Scheduler):
    """vLLM's scheduler, but for chunks' ends.

    Attributes:
        page: tokens at whose multiples a chunk may end; 1 where steps are too small to wait for.
    """

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        self.page = chunk_multiple(vllm_config, kv_cache_config)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        # Asked once for each request and step, after all that may shorten a chunk.
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        return self.chunk(request, num_computed_tokens, tokens)

    def chunk(self, request: Request, start: int, tokens: int) -> int:
        """Tokens of a request that a step computes.

        Args:
            request: its `num_tokens` are known; what lies behind is being generated or guessed.
            start: tokens that are computed already.
            tokens: those that vLLM would compute.

        Returns:
            As many, or fewer, down to none, so that a page is computed in one step.
        """
        if start + tokens >= request.num_tokens:
            return tokens
        whole = max((start + tokens) // self.page * self.page - start, 0)
        # What ends before an image that must be computed in one step might wait for ever.
        return whole or tokens if request.has_encoder_inputs else whole


class AsyncPageScheduler(PageScheduler, AsyncScheduler):
    """The same where steps are scheduled before the last one's tokens are known."""


def chunk_multiple(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Tokens at whose multiples chunks can end without a prompt waiting for others' answers.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: its groups of layers, and their pages.

    Returns:
        The size of a page, or 1 where requests that decode may leave less than that of a step.
    """
    specs = (group.kv_cache_spec for group in kv_cache_config.kv_cache_groups)
    page = math.lcm(*(each.block_size for each in specs if not isinstance(each, MambaSpec)))
    limits = vllm_config.scheduler_config
    decoding = limits.max_num_seqs * (1 + vllm_config.num_speculative_tokens)
    tokens = (limits.max_num_scheduled_tokens or limits.max_num_batched_tokens) - decoding
    if limits.long_prefill_token_threshold:
        tokens = min(tokens, limits.long_prefill_token_threshold)
    if tokens >= page:
        return page
    logger.warning(
        "Pages of %d queries are split by ends of steps, which leave %d tokens to a prompt, and "
        "heads that choose pages then choose for each part: raise --max-num-batched-tokens or "
        "lower --max-num-seqs",
        page,
        tokens,
    )
    return 1


def end_chunks_at_pages(config: VllmConfig, serving: Serving) -> None:
    """Chooses one of these schedulers where heads choose pages.

    Args:
        config: vLLM's configuration, changed in place.
        serving: what is served.
    """
    scheduling = config.scheduler_config
    if not (serving.masks.modes == HeadMode.DYNAMIC).any():
        return
    if scheduling.scheduler_cls is not None:
        logger.warning(
            "--scheduler-cls is %s: pages of queries may be split by ends of steps, and heads "
            "that choose pages then choose for each part; leave the option away to have none split",
            scheduling.scheduler_cls,
        )
        return
    ours = AsyncPageScheduler if scheduling.async_scheduling else PageScheduler
    scheduling.scheduler_cls = f"{ours.__module__}.{ours.__name__}"
