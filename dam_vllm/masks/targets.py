"""One file, any target: the masks of another point of the fit's frontier."""

from dataclasses import replace

import numpy as np

from dam_vllm.masks.frontier_arrays import MEASURES, unpack_pattern
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.options import OptionError

OF_ONE_CHOICE = ("heads", "check")
"""What a fit tells of the choice that it took, and of no other."""


class TargetError(OptionError):
    """A target that the mask file's frontier does not reach."""


def at_target(
    masks: MaskSet, target_density: float | None = None, target_error: float | None = None
) -> MaskSet:
    """Chooses the heads' modes anew among those that the fit measured; no model is needed.

    Args:
        masks: as fitted.
        target_density: largest density; the least KL within it is taken.
        target_error: largest measured KL in nats; the cheapest choice within it is taken. At most
            one of the two is given; with neither the masks stay as fitted.

    Returns:
        The masks.

    Raises:
        TargetError: if the file holds no frontier, or none of its points is within the target.
    """
    if target_density is None and target_error is None:
        return masks
    name = "target_density" if target_density is not None else "target_error"
    target = float(target_density if target_density is not None else target_error)  # type: ignore
    frontier = masks.frontier
    if frontier is None:
        raise TargetError(
            f"{name} is {target}: the mask file holds no frontier to choose from; "
            f"`dam-vllm calibrate` with a target makes one"
        )
    bounded = frontier.density if target_density is not None else frontier.kl
    within = np.flatnonzero(bounded <= target)
    if not len(within):
        raise TargetError(
            f"{name} is {target}: must be at least {_up(bounded.min())}; the mask file's choices "
            f"reach from there to {bounded.max():.4g}"
        )
    best = frontier.kl if target_density is not None else frontier.cost
    point = int(within[best[within].argmin()])
    density, cost, loss, top1 = (float(getattr(frontier, each)[point]) for each in MEASURES)
    chosen = {"density": density, "loss": loss, "cost": cost, "top1": top1}
    told = masks.header.parameters.get("fit", {})
    kept = {each: value for each, value in told.items() if each not in OF_ONE_CHOICE}
    fit = kept | {"chosen": chosen, "retargeted": {name: target}}
    parameters = masks.header.parameters | {"fit": fit}
    header = masks.header.model_copy(update={"parameters": parameters, "quality": None})
    return replace(at_point(masks, point), header=header)


def _up(value: float) -> str:
    """A bound with four digits, rounded up where asking for less would not be granted."""
    step = 10.0 ** (np.floor(np.log10(max(float(value), 1e-9))) - 3)
    near = f"{value:.4g}"
    return near if np.float32(near) >= np.float32(value) else f"{float(value) + step:.4g}"


def at_point(masks: MaskSet, point: int) -> MaskSet:
    """The masks of a point of the frontier.

    Args:
        masks: with a frontier; where a point has dynamic heads, with bases too.
        point: its index.

    Returns:
        The masks, the frontier with them. Coverage and densities by length, which were measured
        for the former choice, are left out.
    """
    frontier, heads_per_kv = masks.frontier, masks.heads // masks.kv_heads
    assert frontier is not None
    bits = {name: np.zeros_like(getattr(masks, name)) for name in ("columns", "diagonals")}
    bits["true_bits"] = np.zeros_like(masks.true_bits)
    for (layer, head), index in np.ndenumerate(frontier.patterns[point]):
        heads = slice(head * heads_per_kv, (head + 1) * heads_per_kv)
        found = unpack_pattern(
            frontier.pattern(index), heads_per_kv, masks.reach, masks.true_bits.shape[-1]
        )
        for name, array in zip(("columns", "diagonals", "true_bits"), found, strict=True):
            bits[name][layer, heads] = array
    return replace(
        frontier.choice(masks, point),
        **bits,
        coverage=None,
        coverage_extended=None,
        density_lengths=None,
        density_heads=None,
        density_kv=None,
    )
