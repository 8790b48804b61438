"""What a mask file tells about its fit, as far as it is shown; the file may come from anyone."""

import reprlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Measured(BaseModel):
    """A choice of all heads' modes. Attributes: density, and loss, the KL in nats."""

    model_config = ConfigDict(extra="allow")

    density: Finite
    loss: Finite


class Taken(Measured):
    """The choice that the masks are. Attributes: cost beside."""

    cost: Finite


class Check(BaseModel):
    """Masks beside the dense model. Attributes: KL in nats, share of equal best tokens."""

    model_config = ConfigDict(extra="allow")

    kl: Finite
    top1: Finite


class FitReport(BaseModel):
    """The header's parameter "fit"; entries that are shown as they stand are not named.

    Attributes:
        target_error: KL that was asked for, or None.
        target_density: density that was asked for, or None.
        lengths: tokens of the texts.
        chosen: what was taken.
        proven: choices whose loss was measured.
        curves: choices with predicted loss, by how far probes of layers were trusted.
        check: by kind of text and of rows.
    """

    model_config = ConfigDict(extra="allow")

    target_error: Finite | None
    target_density: Finite | None
    lengths: list[int] = Field(min_length=1)
    chosen: Taken
    proven: list[Measured]
    curves: dict[str, list[Measured]]
    check: dict[str, Check] = Field(default_factory=dict)


def check_fit(fit: Any, file: Path) -> None:
    """Refuses a report that cannot be shown.

    Args:
        fit: the header's parameter "fit".
        file: the mask file.

    Raises:
        ValueError: naming the first entry that is missing or wrong.
    """
    try:
        FitReport.model_validate(fit, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = f"mask file {file}: parameter {'.'.join(['fit', *map(str, first['loc'])])!r}"
        if first["type"] == "missing":
            raise ValueError(f"{place} is missing") from None
        raise ValueError(f"{place} is {reprlib.repr(first['input'])}: {first['msg']}") from None
