"""KV heads in several cache groups on CPU: virtual pages of one pool, one call of the kernel."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dam_vllm.attention.cpu.attention import CPUAttention, CPUPlan
from dam_vllm.attention.cpu.plan import VirtualPages
from dam_vllm.attention.interface import Step
from dam_vllm.engine.kv_free.head_groups import Pool
from dam_vllm.masks.rounding import ceil_div

PADDING = -(2**62)  # negative, whatever is added


@dataclass(frozen=True)
class CPUGroupedPlan:
    """A step's plan.

    Attributes:
        plan: of all layers.
        placed: int64 [groups, tokens], slots in the pool but for each head's offset.
    """

    plan: CPUPlan
    placed: torch.Tensor


@dataclass(frozen=True)
class CPUGroups:
    """`GroupedAttention` on CPU.

    Attributes:
        attention: of all layers.
    """

    attention: CPUAttention

    @property
    def layers(self) -> Mapping[str, object]:
        return self.attention.layers

    def plan(
        self, step: Step, tables: list[torch.Tensor], slots: list[torch.Tensor], pool: Pool
    ) -> CPUGroupedPlan:
        """See `GroupedAttention.plan`."""
        longest = int(step.seq_lens.max())
        blocks = torch.stack([table[:, : ceil_div(longest, pool.page)] for table in tables])
        where = VirtualPages(blocks, pool.group, pool.offset, pool.heads)
        if longest <= self.attention.dense_until:
            self.attention.count_dense(step)
            plan = self.attention.plan_dense_over(step, where)
        else:
            plan = self.attention.plan_over(step, where)
        each = torch.stack(slots)
        placed = each // pool.page * (pool.heads * pool.page) + each % pool.page
        return CPUGroupedPlan(plan, torch.where(each < 0, PADDING, placed))

    def run(
        self,
        plan: CPUGroupedPlan,
        layer: str,
        query: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """See `GroupedAttention.run`."""
        self.attention.run(plan.plan, layer, query, cache, output)

    def store(
        self,
        plan: CPUGroupedPlan | None,
        layer: str,
        key: torch.Tensor,
        value: torch.Tensor,
        slots: torch.Tensor,
        pool: Pool,
    ) -> None:
        """See `GroupedAttention.store`."""
        if plan is None:
            return
        row, size = pool.rows[layer], key.shape[-1]
        offset = pool.offset[row, :, None] * pool.page
        placed = (plan.placed[pool.group[row]] + offset).t()
        self.attention.kernel.store(
            key[: len(placed)].reshape(-1, size),
            value[: len(placed)].reshape(-1, size),
            *self.attention.layout.keys_and_values(pool.pages),
            placed.flatten(),
            self.attention.served[layer],
        )
