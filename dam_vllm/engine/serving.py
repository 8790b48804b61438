"""What a process serves with: options and masks, found and read once."""

import functools
from dataclasses import dataclass
from pathlib import Path

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from dam_vllm.masks.file import load_mask_set
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.masks.targets import TargetError, at_target
from dam_vllm.options import DENSE_BELOW, DamOptions, OptionError, find_masks, parse_options

logger = init_logger("vllm.dam")


@dataclass(frozen=True)
class Serving:
    """What this process serves with.

    Attributes:
        options: validated options.
        file: the mask file.
        masks: its masks.
    """

    options: DamOptions
    file: Path
    masks: MaskSet

    @property
    def dense_below(self) -> int:
        """Query positions below it attend densely, in tokens: the option, or the platform's own."""
        if self.options.dense_below is not None:
            return self.options.dense_below
        return DENSE_BELOW[current_platform.device_name]


def serving_of(config: VllmConfig) -> Serving:
    """What the workers of a configuration serve with, which have checked that it can be."""
    model, options = config.model_config, parse_options(config.additional_config)
    return read_masks(options, model.model, model.revision, config.load_config.download_dir)


def read_masks(
    options: DamOptions, model: str, revision: str | None, cache_dir: str | None
) -> Serving:
    """Finds the masks, whatever the model, and reads them where they were not read before.

    Args:
        options: validated options.
        model: folder or Hub id of the served model.
        revision: its Hub revision.
        cache_dir: where what is downloaded is kept, or None for the Hub's own place.

    Returns:
        What to serve with.

    Raises:
        OptionError: for a place without a mask file, and a target that its frontier does not reach.
        MaskFileError: for a damaged mask file.
    """
    file = find_masks(options, model, revision, cache_dir)
    found = file.stat()
    return _read(options, file, (found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=1)
def _read(options: DamOptions, file: Path, version: tuple[int, ...]) -> Serving:
    """Reads a version of a file: the first process asks for its pages, then for all of it."""
    try:
        masks = at_target(load_mask_set(file), options.target_density, options.target_error)
    except TargetError as error:
        raise OptionError(f"--additional-config: dam.{error} (mask file {file})") from None
    return Serving(options, file, masks)
