"""A layer's heads whose pages depend on queries, and budgets of the dynamic ones, on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dam_vllm.attention.cuda.choices import Choices
from dam_vllm.attention.dynamic_heads import DynamicHeads, ReusingHeads
from dam_vllm.masks.budget import Budget, BudgetKind
from dam_vllm.masks.page_tables import PageSelector


@dataclass(frozen=True)
class DeviceBudgets:
    """Budgets of KV heads, see `Budget`.

    Attributes:
        kinds: int32 [heads], a `BudgetKind` each.
        values: float32 [heads].
        floors: int32 [heads], pages.
        caps: int32 [heads], pages.
        any_top_p: whether any is one of mass.
    """

    kinds: torch.Tensor
    values: torch.Tensor
    floors: torch.Tensor
    caps: torch.Tensor
    any_top_p: bool

    @classmethod
    def of(cls, budgets: Sequence[Budget], device: torch.device) -> "DeviceBudgets":
        """The same budgets on a device."""
        kinds, floors, caps = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in zip(*((each.kind, each.floor, each.cap) for each in budgets), strict=True)
        )
        values = torch.tensor([each.value for each in budgets], device=device)
        any_top_p = any(each.kind == BudgetKind.TOP_P for each in budgets)
        return cls(kinds, values, floors, caps, any_top_p)


@dataclass(frozen=True)
class DeviceDynamic:
    """A layer's dynamic heads on one worker's device.

    Attributes:
        heads: int32 [n], KV heads among those of the worker.
        channels: int32 [n], leading channels that score.
        max_channels: the largest of them.
        budgets: of these heads.
        static: page tables of these heads, one layer, query blocks of one page.
        scale: factor of the scores, that of an fp8 cache's keys included.
        softcap: soft-capping of the scores, 0 for none.
    """

    heads: torch.Tensor
    channels: torch.Tensor
    max_channels: int
    budgets: DeviceBudgets
    static: PageSelector
    scale: float
    softcap: float

    @classmethod
    def of(cls, dynamic: DynamicHeads) -> "DeviceDynamic":
        """The same heads, on the device of their page tables."""
        device = dynamic.static.near.device
        return cls(
            heads=torch.tensor(dynamic.ids, dtype=torch.int32, device=device),
            channels=torch.tensor(dynamic.channels, dtype=torch.int32, device=device),
            max_channels=max(dynamic.channels),
            budgets=DeviceBudgets.of(dynamic.budgets, device),
            static=dynamic.static,
            scale=dynamic.scale,
            softcap=dynamic.softcap,
        )


@dataclass(frozen=True)
class DeviceChoosing:
    """A layer's dynamic heads, then those that reuse what others chose.

    Attributes:
        heads: int32 [n], KV heads among those of the worker.
        dynamic: the first of them, or None where all reuse.
        static: page tables of all, one layer, query blocks of one page.
        rows: int32 [n], where the pages that each reads beyond these lie among the choices.
        choices: the worker's.
    """

    heads: torch.Tensor
    dynamic: DeviceDynamic | None
    static: PageSelector
    rows: torch.Tensor
    choices: Choices

    @classmethod
    def of_layer(
        cls,
        layer: int,
        dynamic: DynamicHeads | None,
        reusing: ReusingHeads | None,
        choices: Choices,
    ) -> "DeviceChoosing | None":
        """The same heads, on the device of the choices; None where there are none.

        Args:
            layer: global layer index.
            dynamic: dynamic heads of the layer, on that device.
            reusing: reusing heads, likewise.
            choices: the worker's.
        """
        own = [(layer, head) for head in dynamic.ids] if dynamic else []
        followed = reusing.anchors if reusing else []
        ids = [*(dynamic.ids if dynamic else ()), *(reusing.ids if reusing else ())]
        if not ids:
            return None
        device = choices.memory.device
        tables = [heads.static for heads in (dynamic, reusing) if heads is not None]
        rows = [choices.rows[anchor] for anchor in [*own, *followed]]
        return cls(
            heads=torch.tensor(ids, dtype=torch.int32, device=device),
            dynamic=None if dynamic is None else DeviceDynamic.of(dynamic),
            static=PageSelector.joined(tables),
            rows=torch.tensor(rows, dtype=torch.int32, device=device),
            choices=choices,
        )
