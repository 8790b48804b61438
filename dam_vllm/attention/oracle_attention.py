"""`kernel: naive`: serves by the float32 oracle, request by request. Slow, for debugging."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dam_vllm.attention.chosen_pages import ChosenPages
from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle import chosen_mask, exact_mask, masked_attention, page_mask
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.rounding import ceil_div
from dam_vllm.masks.sharding import Shard


@dataclass(frozen=True)
class OracleLayer:
    """One layer on this worker.

    Attributes:
        index: global layer index.
        scale: factor of the scores.
        softcap: soft-capping of the scores, 0 for none.
        key_scale: factor of the stored keys.
        value_scale: factor of the stored values.
    """

    index: int
    scale: float
    softcap: float
    key_scale: float = 1.0
    value_scale: float = 1.0


@dataclass(frozen=True)
class OracleAttention:
    """Attention of masked layers by its definition, on any platform.

    Attributes:
        served: layers by name.
        masks: the mask set.
        shard: KV heads of this rank.
        layout: of the cache.
        exact: whether masks are token-exact, not rounded up to pages.
        dense_below: positions below it read everything.
        chosen: masks bool [queries, keys] of what anchors chose, request by request.
    """

    served: Mapping[str, OracleLayer]
    masks: MaskSet
    shard: Shard
    layout: KVLayout
    exact: bool
    dense_below: int
    chosen: ChosenPages[list[np.ndarray]]

    @property
    def layers(self) -> Mapping[str, OracleLayer]:
        return self.served

    def plan(self, step: Step) -> Step:
        """The step as it is: there is nothing to plan."""
        return step

    def run(
        self, plan: Step, layer: str, query: torch.Tensor, cache: torch.Tensor, output: torch.Tensor
    ) -> None:
        """See `SparseAttention.run`."""
        served, page = self.served[layer], cache.shape[2]
        starts, rows = plan.query_start_loc.tolist(), output.view(query.shape)
        choices: dict[int, list[np.ndarray]] = {
            head: [] for head in self.shard.dynamic_heads(self.masks, served.index)
        }
        self.chosen.keep(served.index, choices)
        for request, stop in enumerate(plan.seq_lens.tolist()):
            first, last = starts[request : request + 2]
            table = plan.block_table[request, : ceil_div(stop, page)].long()
            key, value = self.layout.tokens(cache[table].cpu())
            key, value = key[:stop] * served.key_scale, value[:stop] * served.value_scale
            asked = query[first:last].cpu()
            mask = self._mask(served, asked, key, page, choices, request)
            tails = self.shard.tails(self.masks, served.index)
            found = masked_attention(
                asked, key, value, mask, served.scale, served.softcap, tails, page
            )
            rows[first:last] = found.to(rows)
        self.chosen.drop(served.index)

    def _mask(
        self,
        layer: OracleLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        page: int,
        choices: dict[int, list[np.ndarray]],
        request: int,
    ) -> torch.Tensor:
        """Mask of a request's queries, bool [local heads, queries, keys].

        What a dynamic head chose for them is added to its `choices`, before its followers read it.
        """
        masks, index = self.masks, layer.index
        start, stop = len(key) - len(query), len(key)
        local, heads_per_kv = self.shard.query_heads(masks), query.shape[1] // self.shard.heads
        if self.exact:
            whole = exact_mask(masks, index, start, stop, page, self.dense_below)[local]
        else:
            whole = page_mask(masks, index, start, stop, page, self.dense_below)[local]
        reusing = self.shard.reusing_heads(masks, index)
        if not choices and not reusing:
            return torch.from_numpy(whole)
        static = page_mask(masks, index, start, stop, page, self.dense_below, page)[local]
        static = static[::heads_per_kv]
        grouped = query.view(len(query), -1, heads_per_kv, query.shape[-1])
        seen = whole.reshape(-1, heads_per_kv, *whole.shape[1:])
        for head, chosen in choices.items():
            mine = chosen_mask(
                masks, index, self.shard.start + head, grouped[:, head], key[:, head],
                static[head], page, layer.scale, layer.softcap,
            )  # fmt: skip
            chosen.append(mine)
            seen[head] = static[head] | mine
        for head in reusing:
            (anchors,) = self.chosen.of([self.shard.anchor(masks, index, head)])
            # Requests come in the same order in every layer of a step.
            seen[head] = static[head] | anchors[request]
        return torch.from_numpy(seen.reshape(whole.shape))
