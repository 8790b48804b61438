"""Tails of heads: means of unread spans join what a paged kernel computed.

The kernel tells no log-sum-exp, so that what was read is scored once more.
"""

import math
from itertools import pairwise

import torch

from dam_vllm.attention.cpu import llvm
from dam_vllm.attention.cpu.cached_keys import CachedKeys
from dam_vllm.attention.cpu.compiled_tail import CompiledTail
from dam_vllm.attention.cpu.kernel import CPULayer, UnreadSpans, VirtualBatch
from dam_vllm.attention.cpu.tail_rows import TailRows
from dam_vllm.masks.tails import span_pages

Numbers = tuple[float, float, float]
# Rows at a time: more take memory that is fresh each time, whose page faults cost as much again.
ROWS = 4096


def add_tail(
    layer: CPULayer,
    batch: VirtualBatch,
    unread: UnreadSpans,
    query: torch.Tensor,
    keys: CachedKeys,
    means: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Adds tails to what a paged kernel computed.

    Args:
        layer: scales and soft-capping.
        batch: what the kernel computed.
        unread: of the batch.
        query: [rows, heads_per_kv, head_size], as the kernel took it.
        keys: the cache's.
        means: [virtual pages, 2, head_size], of `SpanMeans`.
        output: like the query, changed.
    """
    heads_per_kv, size = query.shape[1:]
    asked, found = (each.flatten(0, 1) for each in (query, output))
    span = span_pages(keys.page) * keys.page
    numbers = layer.scale * layer.key_scale, layer.softcap, math.log(span)
    shares_of = torch_shares
    if llvm.compiles():
        stored = keys.stored or keys.pages.dtype
        compiled = CompiledTail.of(size, keys.page, query.dtype, stored, layer.softcap != 0)
        shares_of = compiled.shares
    longest = int(batch.query_start_loc.diff().max()) * heads_per_kv
    for some in unread.split(max(1, ROWS // longest)):
        rows = TailRows.of(batch, some, heads_per_kv, keys.page)
        keep, tail = shares_of(asked.index_select(0, rows.index), rows, keys, means, numbers)
        kept = found.index_select(0, rows.index).float().mul_(keep[:, None])
        # Rows that fill vectors up are the last one once more, and equal to it.
        found.index_copy_(0, rows.index, kept.add_(tail, alpha=layer.value_scale).to(found.dtype))


def torch_shares(
    query: torch.Tensor,
    rows: TailRows,
    keys: CachedKeys,
    means: torch.Tensor,
    numbers: Numbers,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows keep of what they read, and what unread spans add; slow.

    Args:
        query: [rows, head_size].
        rows: where they lie, and what they read.
        keys: the cache's.
        means: [virtual pages, 2, head_size], of `SpanMeans`.
        numbers: factor of the scores, their cap or 0, and what a span's logit has added.

    Returns:
        Float32 [rows], the share of what was read, and [rows, head_size], mean values times shares
        of spans.
    """
    keep, tail = torch.empty(len(query)), torch.empty(query.shape)
    bounds, size = (rows.first * (len(query) // int(rows.first[-1]))).tolist(), query.shape[1]
    for at, (start, stop) in enumerate(pairwise(bounds)):
        some = slice(start, stop)
        # Products round by how many rows they have, which is not seen after those of float64.
        asked = query[some].double()
        table = rows.table[at, : rows.pages[at]]
        key = keys.gather(size, table).double().transpose(1, 2).flatten(0, 1)
        later = torch.arange(len(key)) > rows.position[some, None]
        read = _logits(asked @ key.t(), numbers).masked_fill(later, -torch.inf)
        spans = means[rows.unread.table[at, : rows.unread.counts[at]].long()].double()
        unread = _logits(asked @ spans[:, 0].t(), numbers) + numbers[2]
        total = torch.cat([read, unread], dim=1).logsumexp(1, keepdim=True)
        keep[some] = (read - total).exp().sum(1)
        tail[some] = ((unread - total).exp() @ spans[:, 1]).float()
    return keep, tail


def _logits(scores: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """Scaled and capped."""
    scale, cap, _ = numbers
    return cap * torch.tanh(scores * scale / cap) if cap else scores * scale
