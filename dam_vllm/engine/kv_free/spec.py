"""KV cache of units that free pages: a spec and a manager of our own, registered with vLLM.

Follows SlidingWindowSpec and SlidingWindowManager (vllm/v1/kv_cache_interface.py and
v1/core/single_type_kv_cache_manager.py, vLLM 0.32), which keep a window and no sinks. A request's
block table on the worker keeps the ids of pages that were freed, which then belong to others: the
backend must not read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    SingleTypeKVCacheManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from dam_vllm.engine.kv_free.bounds import Bounds
from dam_vllm.engine.private import give_back


@dataclass(frozen=True, kw_only=True)
class BoundedAttentionSpec(AttentionSpec):
    """Attention that reads sinks and a window.

    It is no FullAttentionSpec and no SlidingWindowSpec: vLLM treats their subclasses as these.

    Attributes:
        bounds: what is read.
        in_flight_tokens: tokens scheduled beyond those whose attention is computed, at most.
    """

    bounds: Bounds
    in_flight_tokens: int

    @property
    def most_pages(self) -> int:
        """Pages that a request of any length holds at most."""
        return self.bounds.most_pages(self.in_flight_tokens)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        whole = cdiv(vllm_config.model_config.max_model_len, self.block_size)
        return min(whole, self.most_pages) * self.page_size_bytes


class BoundedAttentionManager(SingleTypeKVCacheManager):
    """Frees the pages between sinks and window while a request runs.

    Attributes:
        freed_pages: given back to the pool before their request ended, by all managers.
    """

    freed_pages: ClassVar[int] = 0
    kv_cache_spec: BoundedAttentionSpec

    def __init__(self, kv_cache_spec: BoundedAttentionSpec, **kwargs: Any) -> None:
        kwargs["max_admission_blocks_per_request"] = kv_cache_spec.most_pages
        super().__init__(kv_cache_spec, **kwargs)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        if apply_admission_cap:
            # The cap counts pages held at a time; those a hit leaves out are not held.
            new_computed_blocks = [block for block in new_computed_blocks if not block.is_null]
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        first, last = self.kv_cache_spec.bounds.unread(processed_computed_tokens)
        before = self.block_pool.get_num_free_blocks()
        give_back(self, request_id, first, last)
        freed = self.block_pool.get_num_free_blocks() - before
        BoundedAttentionManager.freed_pages += freed

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: BoundedAttentionSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Finds the longest prefix whose sinks and window are in the cache, as vLLM asks for it.

        Speculative decoding and context parallelism are served without freeing, so that no page
        is dropped or split.
        """
        page = kv_cache_spec.block_size
        assert alignment_tokens == page
        assert not drop_eagle_block
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            page,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )

        def look_up(index: int) -> list[KVCacheBlock] | None:
            return block_pool.get_cached_block(hashes[index], kv_cache_group_ids)

        missing = [block_pool.null_block] * len(kv_cache_group_ids)
        found = _longest_hit(look_up, max_length // page, kv_cache_spec.bounds)
        rows = [blocks or missing for blocks in found]
        by_group = tuple([row[group] for row in rows] for group in range(len(missing)))
        return by_group, len(rows) * page


def _longest_hit(look_up: Any, pages: int, bounds: Bounds) -> list[list[KVCacheBlock] | None]:
    """The hit's pages, None between sinks and window.

    Args:
        look_up: finds a page by its index, None where it is not in the cache.
        pages: pages asked for at most.
        bounds: what is read.

    Returns:
        As many entries as the hit has pages.
    """
    found: list[list[KVCacheBlock] | None] = [None] * pages
    for index in range(min(bounds.sinks, pages)):
        found[index] = look_up(index)
        if found[index] is None:
            return found[:index]
    end = index = pages
    while index > bounds.sinks:
        _, window = bounds.unread(end * bounds.page)
        if index <= window:
            break
        index -= 1
        found[index] = look_up(index)
        if found[index] is None:
            end = index
    return found[:end]


register_all_kvcache_specs(None)
KVCacheSpecRegistry.register(BoundedAttentionSpec, BoundedAttentionManager)
