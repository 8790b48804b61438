"""A layer's dynamic heads while serving: rotation, selection from the cache, virtual pages.

Keys of dynamic heads are stored rotated into the calibrated basis, so that the leading channels
of the cached keys are the keys that score a page: there is no second cache, and pages found by
prefix caching carry theirs along. Queries of these heads are rotated alike, on every path.
"""

from dataclasses import dataclass, replace

import torch

from dam_vllm.attention.cpu.plan import VirtualPages, plan_pages
from dam_vllm.attention.cpu.select import DynamicHeads, select_dynamic
from dam_vllm.attention.query_blocks import QueryBlocks
from dam_vllm.attention.rotation import HeadRotation
from dam_vllm.engine.counters import COUNTS
from dam_vllm.engine.shards import Shard
from dam_vllm.engine.virtual import Scheduler, VirtualBatch
from dam_vllm.masks.budget import Budget
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.page_tables import PageSelector, query_block_size


@dataclass(frozen=True)
class DynamicStep:
    """What a step's dynamic heads need, the same for all layers.

    Attributes:
        query_blocks: the batch's queries, cut at pages.
        new: int64 [requests], queries of each request.
        where: virtual pages of all KV heads of these layers.
    """

    query_blocks: QueryBlocks
    new: torch.Tensor
    where: VirtualPages


@dataclass(frozen=True)
class LayerDynamic:
    """Dynamic heads of one layer on this worker.

    Attributes:
        dynamic: how they choose.
        rotation: turns their queries and keys.
        row: the layer among the step's layers.
        scheduler: makes virtual batches.
    """

    dynamic: DynamicHeads
    rotation: HeadRotation
    row: int
    scheduler: Scheduler

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
        scoring = query.transpose(0, 1)[..., : max(self.dynamic.channels)]
        heads = self.rotation.heads
        where = step.where.take(self.row, heads)
        selected = select_dynamic(
            self.dynamic, scoring[heads], keys, step.query_blocks, where.tables()[0]
        )
        COUNTS.add_prefill(selected.sum(-1), step.query_blocks, step.new, page)
        plan = plan_pages(selected[None], where, step.query_blocks, page)
        return self.scheduler.dynamic(plan, heads)


def dynamic_heads(
    masks: MaskSet,
    layer: int,
    shard: Shard,
    page: int,
    dense_below: int,
    scale: float,
    softcap: float,
    device: torch.device | str = "cpu",
) -> DynamicHeads | None:
    """How a layer's dynamic heads choose pages.

    Args:
        masks: the mask set.
        layer: global layer index.
        shard: KV heads of this rank.
        page: tokens a page.
        dense_below: positions below it read everything; rounded up to static heads' query blocks.
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
    dense_until = -(-dense_below // query_block_size(page)) * query_block_size(page)
    return DynamicHeads(
        channels=[int(masks.dynamic.channels[layer, head]) for head in heads],
        budgets=[Budget.of(masks.dynamic, layer, head, page) for head in heads],
        static=PageSelector([tables], dense_until, device),
        scale=scale,
        softcap=softcap,
    )


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
    """Sets up a layer's dynamic heads on CPU.

    Args:
        masks: the mask set.
        layer: global layer index.
        row: the layer among the step's layers.
        shard: KV heads of this rank.
        page: tokens a page.
        dense_below: as for `dynamic_heads`, with what follows up to `softcap`.
        scale: factor of the scores.
        softcap: soft-capping of the scores.
        stored: dtype of an fp8 cache, else None.
        scheduler: makes virtual batches.

    Returns:
        The heads, or None where this rank holds none.
    """
    dynamic = dynamic_heads(masks, layer, shard, page, dense_below, scale, softcap)
    if dynamic is None or masks.dynamic is None:
        return None
    few_digits = scheduler.dtype == torch.bfloat16
    dynamic = replace(
        dynamic, computed=torch.bfloat16 if few_digits else torch.float32, stored=stored
    )
    local = shard.dynamic_heads(masks, layer)
    rotations = torch.from_numpy(masks.dynamic.rotations[layer, shard.start : shard.stop][local])
    return LayerDynamic(dynamic, HeadRotation(torch.tensor(local), rotations), row, scheduler)
