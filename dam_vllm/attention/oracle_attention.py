"""`kernel: naive`: serves by the float32 oracle, request by request. Slow, for debugging."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dam_vllm.attention.interface import Step
from dam_vllm.attention.layout import KVLayout
from dam_vllm.attention.oracle import dynamic_mask, exact_mask, masked_attention, page_mask
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
    """

    served: Mapping[str, OracleLayer]
    masks: MaskSet
    shard: Shard
    layout: KVLayout
    exact: bool
    dense_below: int

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
        for request, stop in enumerate(plan.seq_lens.tolist()):
            first, last = starts[request : request + 2]
            table = plan.block_table[request, : ceil_div(stop, page)].long()
            key, value = self.layout.tokens(cache[table].cpu())
            key, value = key[:stop] * served.key_scale, value[:stop] * served.value_scale
            asked = query[first:last].cpu()
            mask = self._mask(served, asked, key, page)
            found = masked_attention(asked, key, value, mask, served.scale, served.softcap)
            rows[first:last] = found.to(rows)

    def _mask(
        self, layer: OracleLayer, query: torch.Tensor, key: torch.Tensor, page: int
    ) -> torch.Tensor:
        """Mask of one request's queries, bool [local heads, queries, keys]."""
        masks, index = self.masks, layer.index
        start, stop = len(key) - len(query), len(key)
        heads_per_kv = masks.heads // masks.kv_heads
        local = slice(self.shard.start * heads_per_kv, self.shard.stop * heads_per_kv)
        if self.exact:
            whole = exact_mask(masks, index, start, stop, page, self.dense_below)[local]
        else:
            whole = page_mask(masks, index, start, stop, page, self.dense_below)[local]
        dynamic = self.shard.dynamic_heads(masks, index)
        if dynamic:
            static = page_mask(masks, index, start, stop, page, self.dense_below, page)[local]
            grouped = query.view(len(query), -1, heads_per_kv, query.shape[-1])
            for head in dynamic:
                whole[head * heads_per_kv : (head + 1) * heads_per_kv] = dynamic_mask(
                    masks, index, self.shard.start + head, grouped[:, head], key[:, head],
                    static[head * heads_per_kv], page, layer.scale, layer.softcap,
                )  # fmt: skip
        return torch.from_numpy(whole)
