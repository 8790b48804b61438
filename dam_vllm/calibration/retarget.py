"""Another choice of a fitted mask file, made in seconds without a model."""

from pathlib import Path

from dam_vllm.calibration.static.build import with_densities
from dam_vllm.masks.file import load_mask_set, save_mask_set
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.targets import at_target
from dam_vllm.options import OptionError


def retarget(
    file: Path, output: Path, target_density: float | None, target_error: float | None
) -> MaskSet:
    """Chooses every KV head's mode anew from what the fit measured.

    Args:
        file: a fitted mask file.
        output: mask file to write; it holds the same frontier.
        target_density: largest density, or None.
        target_error: largest measured KL, or None; one of the two is given.

    Returns:
        The masks that were written. Coverage and quality, which were measured for the former
        choice, are left out.

    Raises:
        MaskFileError: for a missing or damaged file.
        TargetError: for a target that the file's frontier does not reach.
        OptionError: if not exactly one target is given.
    """
    if (target_density is None) == (target_error is None):
        raise OptionError(
            f"--target-density is {target_density} and --target-error is {target_error}: "
            f"--retarget needs exactly one of them"
        )
    masks = with_densities(at_target(load_mask_set(file), target_density, target_error))
    save_mask_set(masks, output)
    return masks
