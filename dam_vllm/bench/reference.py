"""How far outputs are from float32 attention over the same pages, on a sample of rows."""

from dataclasses import dataclass

import torch

from dam_vllm.bench.gpu_case import Case, Inputs

SAMPLED = 64


@dataclass(frozen=True)
class Sample:
    """Some (row, head) pairs.

    Attributes:
        rows: int64 [n], query rows.
        heads: int64 [n], query heads.
    """

    rows: torch.Tensor
    heads: torch.Tensor


def sample(case: Case, device: torch.device, count: int = SAMPLED) -> Sample:
    """Random pairs of a case."""
    rows = torch.randint(case.rows, (count,), device=device)
    return Sample(rows, torch.randint(case.heads, (count,), device=device))


def expected(
    case: Case, inputs: Inputs, pages: torch.Tensor | None, sampled: Sample
) -> torch.Tensor:
    """Attention of the sample, written plainly.

    Args:
        case: the geometry.
        inputs: queries, keys and values.
        pages: bool [kv_heads, query_blocks, pages] that are read, or None for all.
        sampled: the pairs.

    Returns:
        float32 [n, head_size].
    """
    found = []
    for row, head in zip(sampled.rows.tolist(), sampled.heads.tolist(), strict=True):
        request, position = row // case.queries, case.tokens - case.queries + row % case.queries
        kv_head = head // case.heads_per_kv
        keys, values = (
            part[request, kv_head, : position + 1].float() for part in (inputs.key, inputs.value)
        )
        scores = keys @ inputs.query[row, head].float() * case.scale
        if pages is not None:
            query_block = position // case.query_block - int(case.query_blocks[0])
            seen = pages[kv_head, query_block].repeat_interleave(case.page)[: position + 1]
            scores = scores.masked_fill(~seen.to(scores.device), float("-inf"))
        found.append(scores.softmax(dim=0) @ values)
    return torch.stack(found)


def relative_error(output: torch.Tensor, sampled: Sample, wanted: torch.Tensor) -> float:
    """Norm of the difference over that of what is expected.

    Args:
        output: [rows, heads, head_size].
        sampled: the pairs.
        wanted: float32 [n, head_size].

    Returns:
        NaN where an element was not written.
    """
    found = output[sampled.rows, sampled.heads].float()
    return float((found - wanted).norm() / wanted.norm())
