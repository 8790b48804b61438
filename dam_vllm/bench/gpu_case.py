"""One attention layer's step on a GPU: its geometry and random inputs in a paged cache."""

from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.attention.cuda.places import Places
from dam_vllm.attention.cuda.query_blocks import DeviceQueryBlocks, query_block_slots
from dam_vllm.masks.page_tables import query_block_size

DTYPE = torch.bfloat16
MOST_COPIES = 128  # recording more of the shortest steps would take longer than measuring them
MEMORY_SHARE = 0.6  # the rest is for outputs, parts of split keys and recorded graphs


@dataclass(frozen=True)
class Case:
    """Requests of one length: a whole prompt, its last chunk, or one new token each.

    Attributes:
        phase: "prefill", "chunk" or "decode".
        heads: query heads.
        kv_heads: KV heads.
        head_size: channels a head.
        page: tokens a page.
        tokens: length of each request, a multiple of the query block.
        batch: requests.
        chunk: new tokens of a chunk, a multiple of the query block.
    """

    phase: str
    heads: int
    kv_heads: int
    head_size: int
    page: int
    tokens: int
    batch: int
    chunk: int = 0

    @property
    def heads_per_kv(self) -> int:
        """Query heads a KV head."""
        return self.heads // self.kv_heads

    @property
    def queries(self) -> int:
        """New tokens of each request."""
        return {"prefill": self.tokens, "chunk": self.chunk, "decode": 1}[self.phase]

    @property
    def rows(self) -> int:
        """New tokens of all requests."""
        return self.batch * self.queries

    @property
    def pages(self) -> int:
        """Pages of each request."""
        return self.tokens // self.page

    @property
    def query_block(self) -> int:
        return query_block_size(self.page)

    @property
    def own(self) -> int:
        """Pages a query block."""
        return self.query_block // self.page

    @property
    def query_blocks(self) -> np.ndarray:
        """Absolute indices of the query blocks in which a request's new tokens lie, int [n]."""
        return np.arange(
            (self.tokens - self.queries) // self.query_block, self.tokens // self.query_block
        )

    @property
    def scale(self) -> float:
        return float(self.head_size**-0.5)

    @property
    def key_bytes(self) -> int:
        """Bytes of all keys and values."""
        return 2 * DTYPE.itemsize * self.batch * self.tokens * self.kv_heads * self.head_size

    @property
    def query_bytes(self) -> int:
        """Bytes of all queries, or of the output."""
        return DTYPE.itemsize * self.rows * self.heads * self.head_size


@dataclass(frozen=True)
class Inputs:
    """What a step reads.

    Attributes:
        query: [rows, heads, head_size].
        key: [batch, kv_heads, tokens, head_size].
        value: [batch, kv_heads, tokens, head_size].
        cache: [blocks, kv_heads, page, 2 * head_size], the same keys and values in shuffled pages.
        block_table: int32 [batch, pages], that of all sets of inputs.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True)
class Geometry:
    """Where the queries of a case lie.

    Attributes:
        starts: int32 [batch + 1], first query row of each request.
        lens: int32 [batch], tokens of each request.
        query_blocks: its queries, cut as serving cuts them.
        every: int32 [kv_heads], all KV heads.
        places: of them in a plan, as serving holds them.
    """

    starts: torch.Tensor
    lens: torch.Tensor
    query_blocks: DeviceQueryBlocks
    every: torch.Tensor
    places: Places


def draw(case: Case, device: torch.device, count: int = 1) -> list[Inputs]:
    """Random inputs, as of so many layers: pages are shuffled alike.

    Args:
        case: their geometry.
        device: where to.
        count: sets of inputs.
    """
    table = torch.randperm(case.batch * case.pages, device=device).view(case.batch, case.pages)
    return [_draw(case, device, table) for _ in range(count)]


def _draw(case: Case, device: torch.device, table: torch.Tensor) -> Inputs:
    size, pages = case.head_size, case.pages
    shape = (case.batch, case.kv_heads, case.tokens, size)
    key, value = (torch.randn(shape, dtype=DTYPE, device=device) for _ in range(2))
    cache = key.new_empty(case.batch * pages, case.kv_heads, case.page, 2 * size)
    for blocks, keys, values in zip(table, key, value, strict=True):
        for part, source in ((slice(size), keys), (slice(size, None), values)):
            cache[..., part][blocks] = source.unflatten(1, (pages, case.page)).transpose(0, 1)
    query = torch.randn(case.rows, case.heads, size, dtype=DTYPE, device=device)
    return Inputs(query, key, value, cache, table.int())


def geometry(case: Case, device: torch.device) -> Geometry:
    """Where the queries lie, on a device."""
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.queries
    lens = torch.full_like(starts[1:], case.tokens)
    slots = query_block_slots(np.full(case.batch, case.queries), case.query_block)
    request, offset = torch.from_numpy(slots).to(device)
    query_blocks = DeviceQueryBlocks(
        request, offset, starts, lens, case.query_block, min(case.queries, case.query_block)
    )
    every = torch.arange(case.kv_heads, dtype=torch.int32, device=device)
    if case.queries == 1:
        places = Places.by_slot([range(case.kv_heads)], case.kv_heads, device)
    else:
        places = Places.by_head([case.kv_heads], device)
    return Geometry(starts, lens, query_blocks, every, places)


def copies(case: Case, density: float, device: torch.device) -> int:
    """Sets of inputs to rotate, so that none is found in the cache of the GPU.

    Args:
        case: the geometry.
        density: lowest that is measured; a decoding step reads no more of the keys.
        device: a GPU, or a CPU, whose caches are not asked for.

    Returns:
        As many as outgrow the L2 cache twice, at least four where memory allows.
    """
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free = MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]
    share = density if case.phase == "decode" else 1.0
    touched = share * case.key_bytes + 2 * case.query_bytes
    # Contiguous, in our pages and in stock vLLM's pages.
    held = 3 * case.key_bytes + 2 * case.query_bytes
    return max(1, min(MOST_COPIES, max(4, -int(-2 * cache // touched)), int(free // held)))
