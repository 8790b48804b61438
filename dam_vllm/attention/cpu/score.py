"""Page scores: the largest token score of each page, in the leading channels of a basis.

Queries and keys are rotated into the head's calibrated basis, so that their leading channels
hold most of every score (Loki, arXiv 2406.02542). Matrix products have the same shape and place
for a query whatever else is in the batch, so that scores do not depend on it.
"""

import torch

KEY_BLOCK = 4096


def max_scores_of_rows(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Scores pages for few rows that share no keys: decoding.

    Args:
        query: [n, rows, channels].
        keys: [n, pages, channels, page].

    Returns:
        [pages, n, rows].
    """
    return torch.matmul(query[:, None], keys).amax(-1).transpose(0, 1)


def max_scores_of_span(
    query: torch.Tensor, keys: torch.Tensor, scratch: torch.Tensor
) -> torch.Tensor:
    """Scores pages for many rows over the same keys: prefill.

    Args:
        query: [rows, channels].
        keys: [pages, page, channels], contiguous.
        scratch: at least KEY_BLOCK * rows elements; fresh memory would cost as much as the
            product itself.

    Returns:
        [pages, rows].
    """
    (pages, page, _), rows = keys.shape, len(query)
    block = max(1, KEY_BLOCK // page)
    transposed = query.t().contiguous()
    result = query.new_empty(pages, rows)
    for start in range(0, pages, block):
        count = min(block, pages - start)
        scores = scratch[: count * page * rows].view(count * page, rows)
        torch.mm(keys[start : start + count].flatten(0, 1), transposed, out=scores)
        torch.amax(scores.view(count, page, rows), dim=1, out=result[start : start + count])
    return result


def max_scores_of_own_page(
    query: torch.Tensor, keys: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """Scores each query block's own page, causally.

    Args:
        query: [query_blocks, queries, group, channels].
        keys: [query_blocks, channels, page], the page that holds the query block.
        first: int64 [query_blocks], place in its page of each query block's first query.

    Returns:
        [query_blocks, queries * group].
    """
    query_blocks, queries, group, channels = query.shape
    scores = torch.matmul(query.reshape(query_blocks, queries * group, channels), keys)
    row = first[:, None] + torch.arange(queries, device=query.device)
    later = torch.arange(keys.shape[2], device=query.device) > row[..., None]
    later = later.repeat_interleave(group, dim=1)
    return scores.masked_fill_(later, float("-inf")).amax(-1)
