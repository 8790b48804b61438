"""Where the queries of a step lie and which pages are static, as Triton kernels read it.

On a GPU nothing may wait for the host: how many tiles a step has at most is known from its query
lengths, where they lie follows on the device from lengths that may change until the step runs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from dam_vllm.attention.select import PageSelector


@dataclass(frozen=True)
class DeviceTiles:
    """Queries of some requests cut into tiles, as many slots as there can be; some are empty.

    Attributes:
        request: int32 [slots], row of the batch.
        offset: int32 [slots], number of the tile among those of its request's queries.
        query_start_loc: int32 [requests + 1], first query row of each request.
        seq_lens: int32 [requests], tokens of each request up to its last query.
        tile: tokens a tile.
        most_queries: most queries of a tile.
    """

    request: torch.Tensor
    offset: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    tile: int
    most_queries: int

    def __len__(self) -> int:
        return len(self.request)

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What `tile_at` takes after the slot."""
        return self.request, self.offset, self.query_start_loc, self.seq_lens


def tile_slots(queries: np.ndarray, tile: int) -> np.ndarray:
    """Slots for the tiles of requests whose queries may start anywhere in a tile.

    Args:
        queries: int [requests], queries of each.
        tile: tokens a tile.

    Returns:
        int32 [2, slots], `DeviceTiles.request` and `DeviceTiles.offset`.
    """
    most = np.where(queries > 0, (queries + tile - 2) // tile + 1, 0)
    request = np.repeat(np.arange(len(queries)), most)
    offset = np.arange(len(request)) - np.repeat(most.cumsum() - most, most)
    return np.stack([request, offset]).astype(np.int32)


@triton.jit
def tile_at(slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, TILE: tl.constexpr):
    """A slot's tile.

    Returns:
        Row of the batch, absolute tile index, first query row, position of the first query, and
        after the last one; as many queries as these are apart, none where they cross.
    """
    request = tl.load(request_ptr + slot)
    index = tl.load(offset_ptr + slot)
    row = tl.load(query_start_ptr + request)
    queries = tl.load(query_start_ptr + request + 1) - row
    end = tl.load(seq_len_ptr + request)
    first = end - queries
    index += first // TILE
    start = tl.maximum(index * TILE, first)
    stop = tl.minimum(index * TILE + TILE, end)
    return request, index, row + tl.minimum(start - first, queries), start, stop


def page_arguments(selector: PageSelector) -> dict[str, Any]:
    """What `static_pages` takes of a selector of one layer, by name of its parameters."""
    near, columns, distances = (
        bits[0].view(torch.uint8) for bits in (selector.near, selector.columns, selector.distances)
    )
    return {
        "near_ptr": near,
        "columns_ptr": columns,
        "distances_ptr": distances,
        "near_tiles": near.shape[1],
        "near_pages": near.shape[2],
        "columns": columns.shape[1],
        "distances": distances.shape[1],
        "dense_tiles": selector.dense_tiles,
    }


@triton.jit
def static_pages(
    page, head, index, last_page,
    near_ptr, columns_ptr, distances_ptr,
    near_tiles, near_pages, columns, distances, dense_tiles,
    OWN: tl.constexpr,
):  # fmt: skip
    """Which pages a head reads for a tile, as `PageSelector.select` tells it.

    `page` is an int32 block, `head` a row of the tables, `index` the absolute tile index; no page
    after `last_page`, the tile's own last one, is read. A tile has OWN pages; for the rest see
    `page_arguments`. Gives an int1 block.
    """
    distance = index * OWN - page
    reach = tl.minimum(tl.maximum(distance, 0), distances - 1)
    far = tl.load(distances_ptr + head * distances + reach) > 0
    column = tl.load(columns_ptr + head * columns + page, mask=page < columns, other=0) > 0
    is_near = page < tl.where(index < near_tiles, near_pages, 0)
    near = tl.load(
        near_ptr + (head * near_tiles + index) * near_pages + page, mask=is_near, other=0
    )
    read = tl.where(is_near, near > 0, far | column)
    read |= page >= tl.where(index < dense_tiles, 0, last_page)  # the last page is the tile's own
    return read & (page <= last_page)
