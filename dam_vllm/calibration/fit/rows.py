"""Attention of some queries split by key page, so that any selection's output is a sum of parts."""

from dataclasses import dataclass

import torch

from dam_vllm.calibration.fit.states import LayerStates

TINY = 1e-30  # a row's pages may hold so little mass that it vanishes: its output is then zero


@dataclass(frozen=True)
class Rows:
    """Queries of one KV head in query blocks of the same size; all pages up to the last one.

    Attributes:
        mass: float32 [query_blocks, pages, rows], unnormalised attention mass; 0 where not causal.
        output: float32 [query_blocks, pages, rows, head_size], mass times values.
        full: float32 [query_blocks, rows, head_size], full attention.
    """

    mass: torch.Tensor
    output: torch.Tensor
    full: torch.Tensor

    def errors(self, selected: torch.Tensor) -> torch.Tensor:
        """Squared error of each row's output under selections.

        Args:
            selected: bool [candidates, query_blocks, pages]; own pages included.

        Returns:
            float32 [candidates, query_blocks, rows].
        """
        query_blocks, pages, rows, size = self.output.shape
        chosen = selected.transpose(0, 1).to(self.mass.dtype)
        mass = chosen @ self.mass
        output = (chosen @ self.output.view(query_blocks, pages, rows * size)).view(
            query_blocks, -1, rows, size
        )
        error = output / mass.clamp_min(TINY)[..., None] - self.full[:, None]
        return error.square().sum(dim=-1).transpose(0, 1)


def logits(
    states: LayerStates, head: int, position: torch.Tensor, rotation: torch.Tensor, channels: int
) -> torch.Tensor:
    """Causal logits of a KV head's queries in the leading channels of a basis.

    Args:
        states: the layer.
        head: KV head.
        position: int64 [query_blocks, queries].
        rotation: [head_size, head_size].
        channels: channels.

    Returns:
        float32 [query_blocks, queries * heads_per_kv, tokens up to the last position], -inf in
            the future.
    """
    heads_per_kv, stop = states.heads_per_kv, int(position.max()) + 1
    basis = rotation[:, :channels]
    query = states.query[states.query_heads(head), position].float() @ basis
    key = states.key[head, :stop].float() @ basis
    scores = query.permute(1, 2, 0, 3).flatten(1, 2) @ key.t() * states.scale
    if states.softcap:
        scores = states.softcap * torch.tanh(scores / states.softcap)
    future = (
        torch.arange(stop, device=key.device)
        > position.repeat_interleave(heads_per_kv, 1)[..., None]
    )
    return scores.masked_fill_(future, float("-inf"))


def by_page(values: torch.Tensor, page: int, fill: float) -> torch.Tensor:
    """Splits the last axis into pages, the last one filled up: [..., pages, page]."""
    short = -values.shape[-1] % page
    return torch.nn.functional.pad(values, (0, short), value=fill).unflatten(-1, (-1, page))


def split_rows(states: LayerStates, head: int, position: torch.Tensor, page: int) -> Rows:
    """Computes full attention of a KV head's queries, page by page.

    Args:
        states: the layer.
        head: KV head.
        position: int64 [query_blocks, queries].
        page: tokens a page.

    Returns:
        The rows.
    """
    size = states.key.shape[-1]
    identity = torch.eye(size, device=states.key.device)
    scores = logits(states, head, position, identity, size)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    paged = by_page(weights, page, 0.0).transpose(1, 2)  # [query_blocks, pages, rows, page]
    value = states.value[head, : scores.shape[-1]].float()
    short = -len(value) % page
    value = torch.nn.functional.pad(value, (0, 0, 0, short)).view(-1, page, value.shape[-1])
    output = paged @ value
    mass = paged.sum(dim=-1)
    full = output.sum(dim=1) / mass.sum(dim=1)[..., None]
    return Rows(mass, output, full)
