"""What static heads can still read: pages at the start (sinks) and a window before the query.

Beyond the PCL a static head reads kept columns and kept diagonals. Both end somewhere, so a page
between the last kept column and the longest kept diagonal is never read again.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.page_tables import dense_until, query_block_size
from dam_vllm.masks.rounding import ceil_div

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Bounds:
    """What some KV heads can read of a request.

    Attributes:
        page: tokens a page.
        query_block: tokens that share a selection of pages, a multiple of the page.
        sinks: pages from the request's start on.
        window: pages before the first page of the query's query block.
        start: queries at positions below this may read every page before them; in tokens.
    """

    page: int
    query_block: int
    sinks: int
    window: int
    start: int

    def unread(self, done: int) -> tuple[int, int]:
        """Pages that no later query reads.

        Args:
            done: tokens whose attention is computed; later queries stand at `done` or beyond.

        Returns:
            The first such page and the one after the last; both the same if there is none.
        """
        if done < self.start:
            return self.sinks, self.sinks
        query_block_page = done // self.query_block * self.query_block // self.page
        return self.sinks, max(self.sinks, query_block_page - self.window)

    def most_pages(self, in_flight: int) -> int:
        """Pages that a request of any length holds at most.

        Args:
            in_flight: tokens that are scheduled beyond those whose attention is computed.

        Returns:
            The larger of two peaks: before anything may be freed, and while the window moves.
        """
        early = ceil_div(max(self.start, 1) - 1 + in_flight, self.page)
        late = self.sinks + self.window + ceil_div(self.query_block - 1 + in_flight, self.page)
        return max(early, late)


@dataclass(frozen=True)
class HeadBounds:
    """Bounds of every KV head on its own.

    Attributes:
        page: tokens a page.
        query_block: tokens a query block of static heads.
        start: as in `Bounds`, the same for all heads.
        bounded: bool [layers, kv_heads]; other heads can read any page.
        sinks: int64 [layers, kv_heads], pages; says nothing for heads that are not bounded.
        window: int64 [layers, kv_heads], likewise.
    """

    page: int
    query_block: int
    start: int
    bounded: npt.NDArray[np.bool_]
    sinks: IntArray
    window: IntArray


def head_bounds(masks: MaskSet, page: int, dense_below: int) -> HeadBounds:
    """Finds what each KV head can read beyond the PCL.

    Args:
        masks: the mask set.
        page: tokens a page.
        dense_below: query positions below it read everything, in tokens.

    Returns:
        The bounds; static heads without a tail are bounded in layers that the masks cover.
    """
    query_block = query_block_size(page)
    full = np.array([kind == "full" for kind in masks.header.layer_types])
    bounded = (masks.modes == HeadMode.STATIC) & full[:, None]
    if masks.tails is not None:
        # Means of spans lie where their last page does.
        bounded &= masks.tails == 0
    return HeadBounds(
        page=page,
        query_block=query_block,
        start=dense_until(max(dense_below, masks.pcl), page),
        bounded=bounded,
        sinks=np.maximum(1, ceil_div(_kept(masks.columns, masks.kv_heads), page)),
        window=ceil_div(np.maximum(0, _kept(masks.diagonals, masks.kv_heads) - 1), page),
    )


def _kept(bits: npt.NDArray[np.bool_], kv_heads: int) -> IntArray:
    """One past the last kept entry of each KV head's query heads, 0 without any."""
    layers, heads, reach = bits.shape
    joined = np.asarray(bits.reshape(layers, kv_heads, heads // kv_heads, reach).any(axis=2))
    last = reach - joined[..., ::-1].argmax(axis=-1)
    return np.where(joined.any(axis=-1), last, 0)
