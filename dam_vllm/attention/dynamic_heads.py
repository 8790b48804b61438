"""A layer's dynamic heads, and those that reuse what such heads chose, on any platform."""

from dataclasses import dataclass, field

import torch

from dam_vllm.masks.budget import Budget
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.page_tables import PageSelector
from dam_vllm.masks.sharding import Shard


@dataclass(frozen=True)
class DynamicHeads:
    """A layer's dynamic heads on one worker.

    Attributes:
        channels: leading channels that score, a head.
        budgets: a head.
        static: page tables of these heads, one layer, query blocks of one page.
        scale: factor of the scores, that of an fp8 cache's keys included.
        softcap: soft-capping of the scores, 0 for none.
        ids: their local KV heads.
    """

    channels: list[int]
    budgets: list[Budget]
    static: PageSelector
    scale: float
    softcap: float = 0.0
    ids: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def of_layer(
        cls,
        masks: MaskSet,
        layer: int,
        shard: Shard,
        page: int,
        dense_below: int,
        scale: float,
        softcap: float,
        device: torch.device | str = "cpu",
    ) -> "DynamicHeads | None":
        """How a layer's dynamic heads choose pages.

        Args:
            masks: the mask set.
            layer: global layer index.
            shard: KV heads of this rank.
            page: tokens a page.
            dense_below: positions below it read everything, up to static heads' query blocks.
            scale: factor of the scores, that of an fp8 cache's keys included.
            softcap: soft-capping of the scores, 0 for none.
            device: where page tables are kept.

        Returns:
            The heads, or None where this rank holds none.
        """
        local = shard.dynamic_heads(masks, layer)
        if not local or masks.dynamic is None:
            return None
        heads = [shard.start + head for head in local]
        tables = shard.tables(masks, layer, page, query_block=page).take(local)
        return cls(
            channels=[int(masks.dynamic.channels[layer, head]) for head in heads],
            budgets=[masks.dynamic.budget(layer, head, page) for head in heads],
            static=PageSelector([tables], dense_below, device),
            scale=scale,
            softcap=softcap,
            ids=local,
        )

    def logits(self, max_scores: torch.Tensor) -> torch.Tensor:
        """Scales and caps float32 scores, in their place."""
        logits = max_scores.mul_(self.scale)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap) if self.softcap else logits


@dataclass(frozen=True)
class ReusingHeads:
    """A layer's heads on one worker that read what other heads chose.

    Attributes:
        ids: their local KV heads.
        anchors: of each, the global layer index and the local KV head whose choice it reads.
        static: page tables of these heads, one layer, query blocks of one page.
    """

    ids: list[int]
    anchors: list[tuple[int, int]]
    static: PageSelector

    @classmethod
    def of_layer(
        cls,
        masks: MaskSet,
        layer: int,
        shard: Shard,
        page: int,
        dense_below: int,
        device: torch.device | str = "cpu",
    ) -> "ReusingHeads | None":
        """What a layer's reusing heads read.

        Args:
            masks: the mask set; anchors of this rank's heads are on this rank.
            layer: global layer index.
            shard: KV heads of this rank.
            page: tokens a page.
            dense_below: positions below it read everything, up to static heads' query blocks.
            device: where page tables are kept.

        Returns:
            The heads, or None where this rank holds none.
        """
        local = shard.reusing_heads(masks, layer)
        if not local:
            return None
        tables = shard.tables(masks, layer, page, query_block=page).take(local)
        return cls(
            ids=local,
            anchors=[shard.anchor(masks, layer, head) for head in local],
            static=PageSelector([tables], dense_below, device),
        )
