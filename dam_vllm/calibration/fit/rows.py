"""Attention of some queries split by key page, so that any selection's output is a sum of parts."""

from dataclasses import dataclass

import torch

from dam_vllm.calibration.fit.states import LayerStates
from dam_vllm.masks.tails import span_pages, unread_spans

TINY = 1e-30  # a row's pages may hold so little mass that it vanishes: its output is then zero


@dataclass(frozen=True)
class Rows:
    """Queries of one KV head in query blocks of the same size; all pages up to the last one.

    Attributes:
        mass: float32 [query_blocks, pages, rows], unnormalised attention mass; 0 where not causal.
        output: float32 [query_blocks, pages, rows, head_size], mass times values.
        full: float32 [query_blocks, rows, head_size], full attention.
        tail_mass: float32 [query_blocks, spans, rows], what spans count in a tail.
        tail_output: float32 [query_blocks, spans, rows, head_size], that times mean values.
        own: int64 [query_blocks], pages of their first queries.
        page: tokens a page.
    """

    mass: torch.Tensor
    output: torch.Tensor
    full: torch.Tensor
    tail_mass: torch.Tensor
    tail_output: torch.Tensor
    own: torch.Tensor
    page: int

    def errors(self, selected: torch.Tensor) -> torch.Tensor:
        """Squared errors of rows' outputs under selections, summed over query blocks and rows.

        Args:
            selected: bool [candidates, query_blocks, pages]; own pages included.

        Returns:
            float64 [2, candidates], without a tail and with one.
        """
        chosen = selected.transpose(0, 1).to(self.mass.dtype)
        unread = unread_spans(selected, self.own, self.page).transpose(0, 1)
        unread = unread[..., : self.tail_mass.shape[1]].to(self.mass.dtype)
        mass, output = chosen @ self.mass, chosen @ self.output.flatten(2)
        alone = self._error(output, mass)
        mass += unread @ self.tail_mass
        output += unread @ self.tail_output.flatten(2)
        return torch.stack([alone, self._error(output, mass)])

    def _error(self, output: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        """Of unnormalised outputs [query_blocks, candidates, rows * head_size]: [candidates]."""
        apart = output.unflatten(2, self.full.shape[1:])
        error = apart / mass.clamp_min(TINY)[..., None] - self.full[:, None]
        return error.square().sum(dim=-1).double().sum(dim=(0, 2))


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
    scores = capped(
        query.permute(1, 2, 0, 3).flatten(1, 2) @ key.t() * states.scale, states.softcap
    )
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
    largest = scores.amax(dim=-1, keepdim=True)
    weights = (scores - largest).exp_()
    paged = by_page(weights, page, 0.0).transpose(1, 2)  # [query_blocks, pages, rows, page]
    value = states.value[head, : scores.shape[-1]].float()
    short = -len(value) % page
    value = torch.nn.functional.pad(value, (0, 0, 0, short)).view(-1, page, value.shape[-1])
    output = paged @ value
    mass = paged.sum(dim=-1)
    full = output.sum(dim=1) / mass.sum(dim=1)[..., None]
    own = position[:, 0] // page
    keys, means = span_means(states, head, int(own.max()) * page, page)
    query = states.query[states.query_heads(head), position].float().permute(1, 2, 0, 3)
    tail = capped(query.flatten(1, 2) @ keys.t() * states.scale, states.softcap) - largest
    tail_mass = (tail.exp_() * (span_pages(page) * page)).transpose(1, 2)
    tail_output = tail_mass[..., None] * means[:, None]
    return Rows(mass, output, full, tail_mass, tail_output, own, page)


def span_means(
    states: LayerStates, head: int, tokens: int, page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean keys and values of whole spans among the first tokens: [spans, head_size] each."""
    span = span_pages(page) * page
    key, value = (
        each[head, : tokens // span * span].float().unflatten(0, (-1, span)).mean(dim=1)
        for each in (states.key, states.value)
    )
    return key, value


def capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """Soft-capped scores; as they are where `softcap` is 0."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores
