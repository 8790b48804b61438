"""One check for all arrays: no value outside what it may be."""

import numpy as np
import numpy.typing as npt


def refuse_outside(
    name: str, values: np.ndarray, low: npt.ArrayLike, high: npt.ArrayLike, nan: bool = False
) -> None:
    """Refuses an array that holds a value outside a range.

    Args:
        name: of the array, for the error.
        values: of any shape and number dtype.
        low: least value that is allowed, one for all or one each.
        high: largest value that is allowed, likewise.
        nan: whether NaN, for what was not measured, is allowed too.

    Raises:
        ValueError: naming the first such value, its place and what is allowed.
    """
    inside = (values >= low) & (values <= high)
    if nan:
        inside |= np.isnan(values)
    if inside.all():
        return
    at = tuple(int(index) for index in np.argwhere(~inside)[0])
    least, most = (np.broadcast_to(bound, values.shape)[at] for bound in (low, high))
    place = ", ".join(map(str, at))
    allowed = f"from {least} to {most}" + (" or NaN" if nan else "")
    raise ValueError(f"{name}[{place}] is {values[at]}, must be {allowed}")


def refuse_padding(name: str, packed: np.ndarray, spare: int) -> None:
    """Refuses packed rows whose last byte has bits where no values are.

    Args:
        name: of the array, for the error.
        packed: uint8 [..., bytes], eight values a byte, the first in the highest bit.
        spare: bits of a row's last byte that hold no value, 0 to 7.

    Raises:
        ValueError: naming the first such row.
    """
    last = packed[..., -1]
    rows = np.argwhere(last & ((1 << spare) - 1))
    if len(rows):
        place = ", ".join(str(int(index)) for index in rows[0])
        raise ValueError(
            f"{name}[{place}] ends in byte {last[tuple(rows[0])]}, whose last {spare} bits must be "
            f"zeros"
        )
