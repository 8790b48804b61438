"""Answers of the endpoint, from masks and counts."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dam_vllm import __version__
from dam_vllm.endpoint.counts import Phase, Snapshot
from dam_vllm.endpoint.models import (
    Budget,
    Density,
    Head,
    HeadMask,
    HeadPages,
    Layer,
    Pages,
    Served,
)
from dam_vllm.masks.budget import BUDGETS, BudgetKind
from dam_vllm.masks.mask_set import HeadMode, MaskSet
from dam_vllm.masks.pictures import plot_end, shares
from dam_vllm.options import DamOptions

# What a fit tells of every step it took; `dam-vllm inspect` shows it.
LONG = ("curves", "heads", "texts", "proven")


def served(
    masks: MaskSet,
    file: Path,
    options: DamOptions,
    page: int,
    dense_until: int,
    versions: dict[str, str],
) -> Served:
    """What a server serves with.

    Args:
        masks: what is served.
        file: where they come from.
        options: of the server.
        page: tokens a page.
        dense_until: positions below it read everything, in tokens.
        versions: of other packages, by name.
    """
    header = masks.header
    parameters = dict(header.parameters)
    if "fit" in parameters:
        fit = parameters["fit"].items()
        parameters["fit"] = {name: value for name, value in fit if name not in LONG}
    return Served(
        masks=file.name,
        kind=header.kind,
        model=_without_folders(header.model),
        fingerprint=header.fingerprint.model_dump(),
        pcl=masks.pcl,
        parameters=_without_folders(parameters),
        options=_without_folders(options.model_dump()),
        page=page,
        dense_until=dense_until,
        layers=describe_all(masks),
        versions={"dam-vllm": __version__, **versions},
    )


def _without_folders(value: Any) -> Any:
    """JSON values with absolute paths cut to names."""
    if isinstance(value, dict):
        return {name: _without_folders(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value


def describe_all(masks: MaskSet) -> list[Layer]:
    """Modes of all KV heads."""
    heads = range(masks.kv_heads)
    return [
        Layer(
            layer=layer,
            type=kind,
            heads=[describe(masks, layer, head) for head in heads] if kind == "full" else [],
        )
        for layer, kind in enumerate(masks.header.layer_types)
    ]


def describe(masks: MaskSet, layer: int, head: int) -> Head:
    """A KV head's mode, and whose pages it reads or how many."""
    mode, anchor = HeadMode(int(masks.modes[layer, head])), None
    if mode == HeadMode.REUSE:
        anchor = masks.anchor(layer, head)
    choosing = anchor if anchor is not None else (layer, head)
    budget = None
    if mode in (HeadMode.DYNAMIC, HeadMode.REUSE):
        budget = _budget(masks, *choosing)
    tail = masks.tails is not None and bool(masks.tails[layer, head])
    return Head(mode=mode.name.lower(), anchor=anchor, budget=budget, tail=tail)


def _budget(masks: MaskSet, layer: int, head: int) -> Budget:
    dynamic, at = masks.dynamic, (layer, head)
    assert dynamic is not None
    kind, value = BudgetKind(int(dynamic.kinds[at])), float(dynamic.budgets[at])
    floor, cap = int(dynamic.floors[at]), int(dynamic.caps[at])
    return Budget(
        kind=kind.name.lower(),
        value=value,
        floor=floor,
        cap=cap,
        words=f"{BUDGETS[kind].words(round(value, 4))}, {floor} to {cap} tokens",
        channels=int(dynamic.channels[at]),
    )


def density(snapshot: Snapshot) -> Density:
    """What was read of each KV head, and in all."""
    prefill, decode = snapshot.pages("prefill"), snapshot.pages("decode")
    return Density(
        age=round(snapshot.age, 3),
        prefill=_total(snapshot, "prefill"),
        decode=_total(snapshot, "decode"),
        heads=[
            HeadPages(
                layer=at[0], head=at[1], prefill=_pages(*prefill[at]), decode=_pages(*decode[at])
            )
            for at in sorted(prefill)
        ],
    )


def _total(snapshot: Snapshot, phase: Phase) -> Pages:
    pages = snapshot.pages(phase).values()
    return _pages(sum(read for read, _ in pages), sum(dense for _, dense in pages))


def _pages(read: int, dense: int) -> Pages:
    return Pages(read=read, dense=dense, density=read / dense if dense else None)


def images(masks: MaskSet, layer: int) -> np.ndarray:
    """Share of pairs that any query head of each KV head attends, float32 [kv_heads, n, n]."""
    return shares(masks, layer, masks.heads // masks.kv_heads)


def head_mask(masks: MaskSet, layer: int, head: int, cells: np.ndarray) -> HeadMask:
    """A KV head's mask.

    Args:
        masks: the mask set.
        layer: global layer index, of a layer with masks.
        head: KV head.
        cells: its part of `images`.
    """
    each = masks.heads // masks.kv_heads
    own = slice(head * each, (head + 1) * each)
    return HeadMask(
        **describe(masks, layer, head).model_dump(),
        layer=layer,
        head=head,
        coverage=_numbers(masks.coverage, layer, own),
        coverage_extended=_numbers(masks.coverage_extended, layer, own),
        columns=int(masks.columns[layer, own].any(axis=0).sum()),
        diagonals=int(masks.diagonals[layer, own].any(axis=0).sum()),
        pcl=masks.pcl,
        tokens=plot_end(masks),
        cells=len(cells),
        image=base64.b64encode(np.round(cells * 255).astype(np.uint8).tobytes()).decode(),
    )


def head_masks(masks: MaskSet) -> Iterator[HeadMask]:
    """`head_mask` of every KV head that has one."""
    for layer, kind in enumerate(masks.header.layer_types):
        if kind == "full":
            for head, cells in enumerate(images(masks, layer)):
                yield head_mask(masks, layer, head, cells)


def _numbers(table: np.ndarray | None, layer: int, own: slice) -> list[float | None] | None:
    if table is None:
        return None
    return [None if value != value else round(value, 4) for value in table[layer, own].tolist()]
