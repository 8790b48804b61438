"""How page max scores lie in memory, and how rows and pages are cut for the products."""

from dataclasses import dataclass

import torch
import triton

from dam_vllm.attention.cuda.scratch import Room

TOKENS = 128
CHUNK_TOKENS = 1024
# Every block of rows reads all keys again, so blocks are large; rows need registers.
MOST_ROWS = 128


@dataclass(frozen=True)
class Rows:
    """Query rows of the query blocks that a launch takes: those of one query, or all longer ones.

    Attributes:
        queries: most queries of a query block, 1 or the page size.
        heads_per_kv: query heads a KV head; a query block's rows are its queries' heads, query by
            query.
    """

    queries: int
    heads_per_kv: int

    @property
    def count(self) -> int:
        """Most rows of a query block."""
        return self.queries * self.heads_per_kv

    @property
    def block(self) -> int:
        """Rows of a block; a matrix product takes 16 at least."""
        return min(MOST_ROWS, max(16, triton.next_power_of_2(self.count)))

    @property
    def blocks(self) -> int:
        """Blocks a query block."""
        return triton.cdiv(self.count, self.block)


@dataclass(frozen=True)
class PageBlocks:
    """How pages of keys are cut for matrix products.

    Attributes:
        page: tokens a page, a multiple of 16.
    """

    page: int

    @property
    def unit(self) -> int:
        """Tokens of a page in one product: a power of two that divides the page."""
        return min(TOKENS, self.page & -self.page)

    @property
    def parts(self) -> int:
        """Products until a page is done."""
        return self.page // self.unit

    @property
    def pages(self) -> int:
        """Pages in one product."""
        return TOKENS // self.unit

    @property
    def chunk(self) -> int:
        """Pages whose masses are summed at once; chunks start at multiples of it."""
        return max(1, CHUNK_TOKENS // (self.page * self.pages)) * self.pages


@dataclass(frozen=True)
class PageMaxScores:
    """Page max scores of query blocks' rows, undefined for what is not there.

    Attributes:
        logits: float32 [heads, slots, pages, rows], scaled and capped.
        largest: float32 [heads, slots, chunks, rows], largest logit of a chunk's pages.
        sums: float32 [heads, slots, chunks, rows], sum of exp(logit - largest) over them.
    """

    logits: torch.Tensor
    largest: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(
        cls, heads: int, slots: int, width: int, rows: Rows, blocks: PageBlocks, room: Room
    ) -> "PageMaxScores":
        """Memory for peaks of `width` pages, taken of `room`."""
        chunks = triton.cdiv(width, blocks.chunk)
        logits, largest, sums = (
            room.take(torch.float32, heads, slots, count, rows.count)
            for count in (width, chunks, chunks)
        )
        return cls(logits, largest, sums)
