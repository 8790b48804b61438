"""The options under `--additional-config '{"dam": {...}}'`."""

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dam_vllm.hub import MASKS_IN_REPOSITORY, HubError, fetch, is_hub_id

MASKS_VARIABLE = "DAM_MASKS"
MASKS_IN_MODEL = MASKS_IN_REPOSITORY
KEY = "dam"


DENSE_BELOW = {
    # Up to here sparse attention does not pay: `dam-vllm bench e2e`, docs/benchmarks.md.
    "cpu": 2048,
    # A quarter of dynamic heads pays from 4k to 8k tokens on: docs/cuda.md.
    "cuda": 4096,
}


PAGE = 128  # tokens, where neither a fit nor `--block-size` says
# The platforms that are served, by vLLM's names (`device_type` calls ROCm "cuda" too), and pages
# that vLLM's CPU kernels and FlashAttention take there: multiples, in tokens.
PAGE_MULTIPLES = {"cpu": 32, "cuda": 16}


class OptionError(ValueError):
    """An option that cannot be honoured; the message names it, its value and what is allowed."""


class DamOptions(BaseModel):
    """Options of the `dam` attention backend.

    Attributes:
        masks: mask file, folder that holds `dam/masks.safetensors`, or Hub id of one.
        target_density: largest density; the masks of the fit's frontier that lose least within it
            are served. None for the masks as fitted.
        target_error: largest measured KL of the next token in nats; the cheapest masks of the
            frontier within it are served. At most one of the two is given.
        dense_below: query positions below it attend densely, in tokens; a request shorter than
            this runs dense. Rounded up to whole query blocks, whatever the granularity. None for
            the platform's own, see `DENSE_BELOW`.
        kv_free: "layer" gives KV-cache pages that no head of a layer can read again back to vLLM;
            "head" those of single KV heads too, where that gains more; "off" keeps all. "auto" is
            "head" on CPU and "layer" on CUDA, where "head" has not been measured; it keeps all
            where nothing can be freed, the other two are refused there.
        kernel: "flash" and "triton" are the kernels on CUDA, "auto" the first of them that can
            serve, and vLLM's own paged kernel on CPU; "naive" is a slow float32 oracle for
            debugging and tests.
        granularity: "page" rounds masks up to pages; "token" is exact, served by the Triton and
            the naive kernel.
        fingerprint: "strict" refuses masks made for other weights; "config" accepts them where
            the model's shape is the same, as for a quantised copy of the calibrated model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    masks: str | None = None
    target_density: float | None = Field(default=None, gt=0, le=1)
    target_error: float | None = Field(default=None, gt=0)
    dense_below: int | None = Field(default=None, ge=0)
    kv_free: Literal["auto", "off", "layer", "head"] = "auto"
    kernel: Literal["auto", "flash", "triton", "naive"] = "auto"
    granularity: Literal["page", "token"] = "page"
    fingerprint: Literal["strict", "config"] = "strict"

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.target_density is not None and self.target_error is not None:
            raise ValueError(
                f"target_density is {self.target_density} and target_error is "
                f"{self.target_error}: at most one of them may be given"
            )
        return self


def parse_options(additional_config: object) -> DamOptions:
    """Reads our part of vLLM's `additional_config`.

    Args:
        additional_config: `VllmConfig.additional_config`.

    Returns:
        The validated options; all defaults where there is no "dam" part.

    Raises:
        OptionError: for an unknown key, a value that is not allowed, or options of ours that stand
            beside "dam" or under another spelling of it.
    """
    everything: dict[Any, Any] = additional_config if isinstance(additional_config, dict) else {}
    for name, value in everything.items():
        # Other keys are other plugins' own.
        if name in DamOptions.model_fields or (name != KEY and str(name).lower() == KEY):
            raise OptionError(
                f"--additional-config: {name!r} is {value!r} at the top: options of the dam "
                f'backend must stand under "{KEY}", as {{"{KEY}": {{"masks": PATH}}}}'
            )
    values: Any = everything.get(KEY, {})
    if not isinstance(values, dict):
        raise OptionError(f'--additional-config: "{KEY}" is {values!r}, must be an object')
    try:
        return DamOptions.model_validate(values)
    except ValidationError as error:
        raise OptionError("; ".join(_explain(item) for item in error.errors())) from None


def _explain(item: Any) -> str:
    path = ".".join([KEY, *map(str, item["loc"])])
    if item["type"] == "extra_forbidden":
        allowed = ", ".join(DamOptions.model_fields)
        return f"--additional-config: unknown option {path!r}; allowed are {allowed}"
    if item["type"] == "value_error":
        return f"--additional-config: {path}: " + str(item["msg"]).removeprefix("Value error, ")
    return f"--additional-config: {path} is {item['input']!r}: {item['msg']}"


def find_masks(
    options: DamOptions, model: str, revision: str | None = None, cache: str | None = None
) -> Path:
    """Locates the mask file: the option, else the environment, else the model's folder.

    Args:
        options: the validated options.
        model: folder or Hub id of the served model.
        revision: its Hub revision.
        cache: folder that downloads go to (vLLM's `--download-dir`), or None for the Hub's own.

    Returns:
        Path of an existing file.

    Raises:
        OptionError: if there is none; the message names the places that were looked at.
    """
    given = options.masks or os.environ.get(MASKS_VARIABLE)
    if not given:
        return _of_model(model, revision, cache)
    name = "dam.masks" if options.masks else MASKS_VARIABLE
    try:
        file = mask_file(given, cache)
    except HubError as error:
        raise OptionError(f"{name} is {given!r}: {error}") from None
    if not file.is_file():
        raise OptionError(
            f"{name} is {given!r}: must be a mask file, or a folder or Hugging Face Hub id "
            f"that holds {MASKS_IN_MODEL}"
        )
    return file


def mask_file(place: str, cache: str | None = None) -> Path:
    """The mask file that a path or a Hub id names.

    Args:
        place: a file, a folder that holds `dam/masks.safetensors`, or the Hub id of such one.
        cache: folder that downloads go to, or None for the Hub's own.

    Returns:
        The file, which may be missing where a path was given.

    Raises:
        HubError: if it is a Hub id whose file cannot be had.
    """
    path = Path(place)
    if path.is_dir():
        return path / MASKS_IN_MODEL
    return fetch(place, cache=cache) if is_hub_id(place) and not path.exists() else path


def output_option(option: str, path: Path | None) -> None:
    """Raises OptionError for a file to write that is a folder."""
    if path is not None and path.is_dir():
        raise OptionError(f"{option} is {str(path)!r}, a folder; must be a file")


def masks_output_option(path: Path, model: str | None) -> None:
    """Refuses a mask file to write where it would be taken for something else.

    Args:
        path: what `--output` names.
        model: folder or Hub id of the model that the masks are for, or None.

    Raises:
        OptionError: if it is a folder, or lies among the weights.
    """
    output_option("--output", path)
    if model is None or path.suffix != ".safetensors":
        return
    folder = Path(model)
    if folder.is_dir() and path.resolve().parent == folder.resolve():
        raise OptionError(
            f"--output is {str(path)!r}, in the model's folder, where every .safetensors file is "
            f"read as weights: must lie elsewhere, as {folder / MASKS_IN_MODEL}, which is served "
            f"without being named"
        )


def _of_model(model: str, revision: str | None, cache: str | None) -> Path:
    """The mask file beside a model's weights."""
    why = ""
    if Path(model).is_dir():
        file = Path(model) / MASKS_IN_MODEL
        if file.is_file():
            return file
    else:
        try:
            return fetch(model, revision, cache)
        except HubError as error:
            why = f". {error}"
    raise OptionError(
        f'no mask file: set --additional-config \'{{"{KEY}": {{"masks": PATH}}}}\' or '
        f"{MASKS_VARIABLE}, or put {MASKS_IN_MODEL} beside the model's weights "
        f"({model}); `dam-vllm calibrate` makes one{why}"
    )
