"""Our KV-cache spec and manager inside vLLM's own pool, coordinator and grouping."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from dam_vllm.engine.kv_free.bounds import Bounds
from dam_vllm.engine.kv_free.capacity import group_units

pytestmark = pytest.mark.engine

PAGE, CHUNK = 16, 64
BOUNDS = Bounds(page=PAGE, query_block=128, sinks=2, window=3, start=256)
MOST = BOUNDS.most_pages(CHUNK)


def specs(kept, freed):
    """Specs of as many units, kept ones first."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from dam_vllm.engine.kv_free.spec import BoundedAttentionSpec

    shape = {"block_size": PAGE, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    bounded = BoundedAttentionSpec(**shape, bounds=BOUNDS, in_flight_tokens=CHUNK)
    full = FullAttentionSpec(**shape)
    names = [f"layers.{index}" for index in range(kept + freed)]
    return {name: full if index < kept else bounded for index, name in enumerate(names)}


class Cache:
    """vLLM's KV-cache manager over a pool of some pages, and requests of given tokens."""

    def __init__(self, pages, kept=1, freed=1, caching=True, length=4096):
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import (
            get_request_block_hasher,
            init_none_hash,
        )
        from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

        init_none_hash(sha256)
        groups = [KVCacheGroupSpec([name], spec) for name, spec in specs(kept, freed).items()]
        self.manager = KVCacheManager(
            KVCacheConfig(pages + 1, [], groups),
            max_model_len=length,
            scheduler_block_size=PAGE,
            hash_block_size=PAGE,
            enable_caching=caching,
            max_in_flight_tokens=CHUNK,
        )
        self.pool = self.manager.block_pool
        self.pages = pages
        self._hasher = get_request_block_hasher(PAGE, sha256)
        self._count = 0

    def request(self, tokens):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self._count += 1
        return Request(
            str(self._count), tokens, SamplingParams(max_tokens=8), None,
            block_hasher=self._hasher,
        )  # fmt: skip

    def step(self, request, tokens, admit=False):
        """Schedules and computes some tokens of a request; False where the pool is full."""
        blocks, hit = None, 0
        if request.num_computed_tokens == 0:
            blocks, hit, _ = self.manager.get_computed_blocks(request)
            tokens = min(tokens, request.num_tokens - hit)
        new = self.manager.allocate_slots(
            request, tokens, hit, blocks, full_sequence_must_fit=admit
        )
        if new is None:
            return False
        request.num_computed_tokens += hit + tokens
        return True

    def prefill(self, request):
        """Computes the whole prompt in chunks; returns most pages held by the freed group."""
        most = 0
        while request.num_computed_tokens < request.num_tokens:
            left = request.num_tokens - request.num_computed_tokens
            assert self.step(request, min(CHUNK, left))
            most = max(most, len(self.held(request)))
        return most

    def held(self, request, group=-1):
        """Indices of a request's pages that a group holds."""
        blocks = self.manager.get_blocks(request.request_id).blocks[group]
        return [index for index, block in enumerate(blocks) if not block.is_null]

    def is_whole(self):
        return self.pool.get_num_free_blocks() == self.pages


def test_the_middle_is_freed_while_a_request_runs():
    from dam_vllm.engine.kv_free.spec import BoundedAttentionManager

    cache, before = Cache(200, caching=False), BoundedAttentionManager.freed_pages
    request = cache.request(list(range(1000)))
    assert cache.prefill(request) <= MOST
    first, last = BOUNDS.unread(1000 - 1000 % CHUNK)
    assert cache.held(request) == [*range(first), *range(last, 63)]
    assert cache.held(request, group=0) == list(range(63))
    freed = BoundedAttentionManager.freed_pages - before
    assert freed == last - first
    cache.manager.free(request)
    assert cache.is_whole()
    assert BoundedAttentionManager.freed_pages - before == freed  # not those of its end


def test_nothing_is_freed_below_the_start():
    cache = Cache(200, caching=False)
    request = cache.request(list(range(300)))
    while request.num_computed_tokens < 250:
        assert cache.step(request, 50)
    assert cache.held(request) == list(range(16))
    assert cache.step(request, 50)
    assert cache.held(request) == list(range(19))


def test_a_request_of_the_capped_size_is_admitted_and_runs():
    """The admission gate counts what a request holds at its peak, not its whole length."""
    cache = Cache(MOST, kept=0, caching=False)
    request = cache.request(list(range(3000)))
    assert cache.step(request, CHUNK, admit=True)
    assert cache.prefill(request) <= MOST
    small = Cache(MOST - 1, kept=0, caching=False)
    assert not small.step(small.request(list(range(3000))), CHUNK, admit=True)


def test_admission_counts_the_pages_of_a_hit_once():
    """What the hit leaves out is no part of the peak; what it holds, in use elsewhere, is."""
    cache = Cache(300, kept=0)
    first, again = (cache.request(list(range(3000))) for _ in range(2))
    cache.prefill(first)
    blocks, hit, _ = cache.manager.get_computed_blocks(again)
    held = sum(not block.is_null for block in blocks.blocks[0])
    assert 0 < held < hit // PAGE
    needed = cache.manager.coordinator.get_num_blocks_to_allocate(
        again.request_id, 3000, blocks.blocks, 0, hit, hit, 3000, apply_admission_cap=True
    )
    assert needed == MOST - held


def test_a_hit_needs_sinks_and_window_alone():
    cache = Cache(300)
    tokens = list(range(1000))
    first = cache.request(tokens)
    cache.prefill(first)
    cache.manager.free(first)
    assert cache.is_whole()
    again = cache.request(tokens)
    blocks, hit, _ = cache.manager.get_computed_blocks(again)
    assert hit == 992
    sinks, window = BOUNDS.unread(hit)
    held = [index for index, block in enumerate(blocks.blocks[1]) if not block.is_null]
    assert held == [*range(sinks), *range(window, 62)]
    assert cache.step(again, CHUNK)
    cache.manager.free(again)
    assert cache.is_whole()


@pytest.mark.parametrize(
    ("evicted", "expected"),
    [(20, 992), (1, 16), (61, 976), (57, 912), (10, 992)],
    ids=["middle", "sink", "last of the window", "window", "below the start"],
)
def test_evictions(evicted, expected):
    """A hit of the freed group alone after one of its pages was evicted."""
    cache = Cache(300, kept=0)
    tokens = list(range(1000))
    first = cache.request(tokens)
    ids = []
    while first.num_computed_tokens < 1000:
        assert cache.step(first, min(CHUNK, 1000 - first.num_computed_tokens))
        blocks = cache.manager.get_blocks(first.request_id).blocks[0]
        known = [None if block.is_null else block.block_id for block in blocks]
        ids = [known[index] or old for index, old in enumerate(ids)] + known[len(ids) :]
    cache.manager.free(first)
    cache.manager.evict_blocks({ids[evicted]})
    _, hit, _ = cache.manager.get_computed_blocks(cache.request(tokens))
    assert hit == expected


def test_a_hit_shorter_than_the_start_needs_every_page():
    cache = Cache(300, kept=0)
    first = cache.request(list(range(240)))
    cache.prefill(first)
    tokens = [*range(200), *range(5000, 5100)]
    blocks, hit, _ = cache.manager.get_computed_blocks(cache.request(tokens))
    assert hit == 192
    assert not any(block.is_null for block in blocks.blocks[0])


def test_no_page_is_lost_whatever_requests_do(rng):
    """Random requests with shared prefixes, run at random, some cancelled or preempted."""
    cache = Cache(150)
    prefixes = [rng.integers(0, 1000, 1500).tolist() for _ in range(3)]
    running = []
    for _ in range(400):
        if len(running) < 4 and rng.random() < 0.3:
            shared = prefixes[rng.integers(3)][: rng.integers(0, 1500)]
            running.append(cache.request([*shared, *rng.integers(0, 1000, 40).tolist()]))
        for request in list(running):
            left = request.num_tokens - request.num_computed_tokens
            if left == 0 or rng.random() < 0.02:
                cache.manager.free(request)
                running.remove(request)
            elif not cache.step(request, int(min(left, rng.integers(1, CHUNK + 1)))):
                cache.manager.free(running[-1])
                running[-1].num_computed_tokens = 0
            if request.num_computed_tokens:
                assert len(cache.held(request)) <= MOST
    for request in running:
        cache.manager.free(request)
    assert cache.is_whole()


def grouping():
    """vLLM's rule, which 0.33 moved."""
    found = importlib.util.find_spec("vllm.v1.core.kv_cache_planning")
    name = "kv_cache_utils" if found is None else "kv_cache_planning"
    return importlib.import_module(f"vllm.v1.core.{name}").get_kv_cache_groups


@pytest.mark.parametrize(
    ("kept", "freed"), [(4, 4), (6, 10), (12, 4), (5, 4), (1, 7), (0, 6), (7, 2), (13, 12)]
)
def test_vllm_groups_as_we_foresee(kept, freed):
    """Groups and "maximum concurrency", so that the enumeration chooses by what comes true."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.kv_cache_layout import KVCacheLayout

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        model_config=SimpleNamespace(max_model_len=4096),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC),
        speculative_config=None,
    )
    groups = grouping()(config, specs(kept, freed))
    foreseen = group_units(kept, freed)
    assert len(groups) == foreseen.groups
    assert max(len(group.layer_names) for group in groups) == foreseen.size
    blocks = 10000 // foreseen.size
    found = get_max_concurrency_for_kv_cache_config(config, KVCacheConfig(blocks, [], groups))
    assert found == pytest.approx(blocks * foreseen.size / foreseen.pages(256, MOST))
