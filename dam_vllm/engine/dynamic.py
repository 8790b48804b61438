"""A layer's dynamic heads while serving: rotation, selection from the cache, virtual pages.

Keys of dynamic heads are stored rotated into the calibrated basis, so that the leading channels
of the cached keys are the keys that score a page: there is no second cache, and pages found by
prefix caching carry theirs along. Queries of these heads are rotated alike, on every path.
"""

from dataclasses import dataclass

import torch

from dam_vllm.attention.choose import Budget
from dam_vllm.attention.dynamic import DynamicHeads, select_dynamic
from dam_vllm.attention.plan import Tiles, VirtualPages, plan_pages
from dam_vllm.attention.rotate import rotate
from dam_vllm.attention.select import PageSelector
from dam_vllm.engine.counters import COUNTS
from dam_vllm.engine.heads import Shard
from dam_vllm.engine.virtual import Scheduler, VirtualBatch
from dam_vllm.masks.mask_set import MaskSet


@dataclass(frozen=True)
class DynamicStep:
    """What a step's dynamic heads need, the same for all layers.

    Attributes:
        tiles: the batch's queries, cut at pages.
        new: int64 [requests], queries of each request.
        where: virtual pages of all KV heads of these layers.
    """

    tiles: Tiles
    new: torch.Tensor
    where: VirtualPages


@dataclass(frozen=True)
class LayerDynamic:
    """Dynamic heads of one layer on this worker.

    Attributes:
        dynamic: how they choose.
        heads: int64, their local ids.
        row: the layer among the step's layers.
        rotations: float32 [heads, head_size, head_size].
        scheduler: makes virtual batches.
    """

    dynamic: DynamicHeads
    heads: torch.Tensor
    row: int
    rotations: torch.Tensor
    scheduler: Scheduler

    def rotated_keys(self, key: torch.Tensor) -> torch.Tensor:
        """Keys [tokens, kv_heads, head_size] with those of dynamic heads rotated."""
        turned = rotate(key[:, self.heads], self.rotations)
        return key.index_copy(1, self.heads, turned.transpose(0, 1))

    def rotated_queries(self, query: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Queries [tokens, heads, head_size] with those of dynamic KV heads rotated."""
        grouped = query.view(len(query), kv_heads, -1, query.shape[-1])
        group = grouped.shape[2]
        asked = grouped[:, self.heads].flatten(1, 2)
        turned = rotate(asked, self.rotations.repeat_interleave(group, dim=0))
        turned = turned.view(len(self.heads), group, len(query), -1).permute(2, 0, 1, 3)
        return grouped.index_copy(1, self.heads, turned).view(query.shape)

    def virtual(
        self, query: torch.Tensor, kv_cache: torch.Tensor, step: DynamicStep
    ) -> VirtualBatch:
        """Chooses pages for the queries at hand.

        Args:
            query: [tokens, kv_heads, group, head_size], rotated.
            kv_cache: [blocks, kv_heads, page, 2 * head_size], which holds these queries' keys;
                all virtual pages in order.
            step: the step.

        Returns:
            Virtual sequences of the dynamic heads.
        """
        page, width = kv_cache.shape[2:]
        keys = kv_cache.view(-1, 2, width // 2, page)[:, 0]
        scoring = query.transpose(0, 1)[..., : max(self.dynamic.ranks)]
        where = step.where.take(self.row, self.heads)
        selected = select_dynamic(
            self.dynamic, scoring[self.heads], keys, step.tiles, where.tables()[0]
        )
        COUNTS.add(selected.sum(-1), step.tiles, step.new, page)
        plan = plan_pages(selected[None], where, step.tiles, page)
        return self.scheduler.dynamic(plan, self.heads)


def layer_dynamic(
    masks: MaskSet,
    layer: int,
    row: int,
    shard: Shard,
    page: int,
    dense_below: int,
    scale: float,
    softcap: float,
    stored: torch.dtype | None,
    scheduler: Scheduler,
) -> LayerDynamic | None:
    """Sets up a layer's dynamic heads.

    Args:
        masks: the mask set.
        layer: global layer index.
        row: the layer among the step's layers.
        shard: KV heads of this rank.
        page: tokens a page.
        dense_below: positions below it read everything, a multiple of static heads' tile.
        scale: factor of the scores, that of an fp8 cache's keys included.
        softcap: soft-capping of the scores, 0 for none.
        stored: dtype of an fp8 cache, else None.
        scheduler: makes virtual batches.

    Returns:
        The heads, or None where this rank holds none.
    """
    local = shard.dynamic_heads(masks, layer)
    if not local or masks.dynamic is None:
        return None
    heads = [shard.start + head for head in local]
    tables = shard.tables(masks, layer, page, tile=page).take(local)
    few_digits = scheduler.dtype == torch.bfloat16
    dynamic = DynamicHeads(
        ranks=[int(masks.dynamic.ranks[layer, head]) for head in heads],
        budgets=[Budget.of(masks.dynamic, layer, head, page) for head in heads],
        static=PageSelector([tables], dense_below),
        scale=scale,
        softcap=softcap,
        computed=torch.bfloat16 if few_digits else torch.float32,
        stored=stored,
    )
    rotations = torch.from_numpy(masks.dynamic.rotations[layer, heads])
    return LayerDynamic(dynamic, torch.tensor(local), row, rotations, scheduler)
