"""Where the queries of a step lie, as Triton kernels read it.

On a GPU nothing may wait for the host: how many query blocks a step has at most is known from its
query lengths, where they lie follows on the device from lengths that may change until the step
runs.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class DeviceQueryBlocks:
    """Queries of some requests cut into query blocks, in as many slots as there can be.

    Attributes:
        request: int32 [slots], row of the batch.
        offset: int32 [slots], number of the query block among those of its request's queries.
        query_start_loc: int32 [requests + 1], first query row of each request.
        seq_lens: int32 [requests], tokens of each request up to its last query.
        query_block: tokens a query block.
        most_queries: most queries of a query block.
    """

    request: torch.Tensor
    offset: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    query_block: int
    most_queries: int

    def __len__(self) -> int:
        return len(self.request)

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """What `query_block_at` takes after the slot."""
        return self.request, self.offset, self.query_start_loc, self.seq_lens


def query_block_slots(queries: np.ndarray, query_block: int) -> np.ndarray:
    """Slots for the query blocks of requests whose queries may start anywhere in a query block.

    Args:
        queries: int [requests], queries of each.
        query_block: tokens a query block.

    Returns:
        int32 [2, slots], `DeviceQueryBlocks.request` and `DeviceQueryBlocks.offset`.
    """
    most = np.where(queries > 0, (queries + query_block - 2) // query_block + 1, 0)
    request = np.repeat(np.arange(len(queries)), most)
    offset = np.arange(len(request)) - np.repeat(most.cumsum() - most, most)
    return np.stack([request, offset]).astype(np.int32)


@triton.jit
def query_block_at(
    slot, request_ptr, offset_ptr, query_start_ptr, seq_len_ptr, QUERY_BLOCK: tl.constexpr
):
    """A slot's query block.

    Returns:
        Row of the batch, absolute query block index, first query row, position of the first query,
        and after the last one; as many queries as these are apart, none where they cross.
    """
    request = tl.load(request_ptr + slot)
    index = tl.load(offset_ptr + slot)
    row = tl.load(query_start_ptr + request)
    queries = tl.load(query_start_ptr + request + 1) - row
    end = tl.load(seq_len_ptr + request)
    first = end - queries
    index += first // QUERY_BLOCK
    start = tl.maximum(index * QUERY_BLOCK, first)
    stop = tl.minimum(index * QUERY_BLOCK + QUERY_BLOCK, end)
    return request, index, row + tl.minimum(start - first, queries), start, stop
