"""A step's queries cut at fixed positions: query blocks share one selection of pages."""

from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.masks.rounding import ceil_div


@dataclass(frozen=True)
class QueryBlocks:
    """A batch's queries cut at query block boundaries of their absolute position.

    Attributes:
        request: int64 [n], row of the batch.
        index: int64 [n], absolute query block index.
        row: int64 [n], first query row in the batch.
        start: int64 [n], position of the first query.
        stop: int64 [n], position after the query block's last query in this batch.
        tokens: query rows in the batch.
    """

    request: torch.Tensor
    index: torch.Tensor
    row: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    tokens: int

    def take(self, which: torch.Tensor) -> "QueryBlocks":
        """Some of the query blocks; `tokens` stays that of the batch."""
        return QueryBlocks(
            request=self.request[which],
            index=self.index[which],
            row=self.row[which],
            start=self.start[which],
            stop=self.stop[which],
            tokens=self.tokens,
        )


def cut_query_blocks(
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, query_block: int
) -> QueryBlocks:
    """Cuts each request's queries of this step into query blocks.

    Args:
        query_start_loc: int32 [requests + 1], first query row of each request.
        seq_lens: int32 [requests], tokens of each request up to its last query.
        query_block: tokens a query block.

    Returns:
        The query blocks, request by request, in order of position.
    """
    # numpy's small operations take a fraction of torch's, and a decoding step has little else.
    starts, stop = (each.numpy().astype(np.int64) for each in (query_start_loc, seq_lens))
    start = stop - np.diff(starts)
    first = start // query_block
    counts = ceil_div(stop, query_block) - first
    request = np.repeat(np.arange(len(counts)), counts)
    offset = np.arange(len(request)) - (counts.cumsum() - counts)[request]
    index = first[request] + offset
    begin = np.maximum(index * query_block, start[request])
    return QueryBlocks(
        request=torch.from_numpy(request),
        index=torch.from_numpy(index),
        row=torch.from_numpy(starts[request] + begin - start[request]),
        start=torch.from_numpy(begin),
        stop=torch.from_numpy(np.minimum((index + 1) * query_block, stop[request])),
        tokens=int(starts[-1]),
    )
