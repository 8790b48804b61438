"""The benchmarks' options, checked: one error names option, value and what is allowed."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dam_vllm.options import PAGE_MULTIPLES, OptionError

if TYPE_CHECKING:
    from dam_vllm.bench.estimates import Estimate
    from dam_vllm.bench.scattered import Spread

Word = TypeVar("Word", bound=StrEnum)

MIN_PAGE, MAX_PAGE, MAX_CHANNELS = PAGE_MULTIPLES["cpu"], 512, 256
GPU_PAGES = (16, 32, 64, 128, 256)
IMAGES = (".png", ".svg", ".pdf")


def lengths_option(text: str, least: int, most: int, option: str = "--lengths") -> list[int]:
    """Prompt lengths, in rising order.

    Args:
        text: comma-separated tokens.
        least: shortest allowed; lengths must be its multiples.
        most: longest allowed.
        option: what it is told as.

    Returns:
        The lengths.

    Raises:
        OptionError: if one is not allowed.
    """
    values = _integers(text)
    if not values or any(value % least or not least <= value <= most for value in values):
        raise OptionError(
            f"{option} is {text!r}: must be comma-separated multiples of {least} up to {most}"
        )
    return sorted(set(values))


def pages_option(text: str, option: str = "--pages") -> list[int]:
    """Page sizes that vLLM's CPU kernels take; raises OptionError for others."""
    values = _integers(text)
    if not values or any(v % MIN_PAGE or not MIN_PAGE <= v <= MAX_PAGE for v in values):
        raise OptionError(
            f"{option} is {text!r}: must be multiples of {MIN_PAGE} up to {MAX_PAGE} tokens"
        )
    return values


def gpu_pages_option(text: str, option: str = "--pages") -> list[int]:
    """Page sizes that the GPU kernels take; raises OptionError for others."""
    values = _integers(text)
    if not values or any(value not in GPU_PAGES for value in values):
        allowed = ", ".join(map(str, GPU_PAGES))
        raise OptionError(f"{option} is {text!r}: must be comma-separated, of {allowed} tokens")
    return values


def counts_option(text: str, option: str) -> list[int]:
    """Numbers from 1 on; raises OptionError for others."""
    values = _integers(text)
    if not values or any(value < 1 for value in values):
        raise OptionError(f"{option} is {text!r}: must be comma-separated numbers from 1 on")
    return values


def channels_option(text: str, option: str, least: int) -> list[int]:
    """Head sizes or channels, multiples of `least`; raises OptionError for others."""
    values = _integers(text)
    if not values or any(v % least or not least <= v <= MAX_CHANNELS for v in values):
        raise OptionError(
            f"{option} is {text!r}: must be multiples of {least} up to {MAX_CHANNELS} channels"
        )
    return values


def densities_option(text: str, option: str = "--densities") -> list[float]:
    """Densities above 0 up to 1; raises OptionError for others."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or any(not 0 < value <= 1 for value in values):
        raise OptionError(f"{option} is {text!r}: must be comma-separated numbers above 0 up to 1")
    return values


def spreads_option(text: str) -> "list[Spread]":
    """How densities are spread over heads; raises OptionError for other words."""
    from dam_vllm.bench.scattered import Spread

    return _words(text, "--spreads", Spread)


def estimates_option(text: str) -> "list[Estimate]":
    """What stands for pages that are not read; raises OptionError for other words."""
    from dam_vllm.bench.estimates import Estimate

    return _words(text, "--estimates", Estimate)


def window_option(window: int) -> None:
    """Raises OptionError for a window that masks cannot have."""
    if not 1 <= window <= 8192:
        raise OptionError(f"--window is {window}: must be from 1 to 8192 tokens")


def heads_option(heads: int, kv_heads: int, head_size: int) -> None:
    """Raises OptionError for heads that the kernels cannot serve."""
    if heads % kv_heads:
        raise OptionError(f"--heads is {heads}: must be a multiple of --kv-heads, {kv_heads}")
    sizes = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
    if head_size not in sizes:
        raise OptionError(
            f"--head-size is {head_size}: must be one of {', '.join(map(str, sizes))}"
        )


def fa3_option(folder: Path | None) -> None:
    """Raises OptionError for a folder without FlashAttention 3."""
    from dam_vllm.bench.fa3 import INTERFACE, LIBRARY, is_packed

    if folder is not None and not is_packed(folder):
        raise OptionError(
            f"--fa3 is {str(folder)!r}: must be a folder with {INTERFACE} and {LIBRARY} or "
            f"{LIBRARY}.xz, both of vLLM's vllm_flash_attn"
        )


def file_option(path: Path | None, option: str) -> None:
    """Raises OptionError for a path that is no file."""
    if path is not None and not path.is_file():
        raise OptionError(f"{option} is {str(path)!r}: must be an existing file")


def image_option(path: Path | None, option: str) -> None:
    """Raises OptionError for an image that cannot be written."""
    if path is not None and (path.suffix not in IMAGES or not path.parent.is_dir()):
        raise OptionError(
            f"{option} is {str(path)!r}: must end in {', '.join(IMAGES)} and lie in a folder "
            f"that exists"
        )


def dynamic_option(dynamic: int, kv_heads: int) -> None:
    """Raises OptionError for more KV heads than there are."""
    if not 0 <= dynamic <= kv_heads:
        raise OptionError(f"--dynamic is {dynamic}: must be from 0 to {kv_heads} KV heads")


def _words(text: str, option: str, of: type[Word]) -> list[Word]:
    """Some of an enumeration's words, comma-separated."""
    allowed, wanted = [str(each) for each in of], text.split(",")
    if not set(wanted) <= set(allowed):
        raise OptionError(f"{option} is {text!r}: must be comma-separated, of {', '.join(allowed)}")
    return [of(each) for each in wanted]


def _integers(text: str) -> list[int]:
    """The numbers of a comma-separated list, or none if one is not a whole number."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return []
