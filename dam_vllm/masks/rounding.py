"""Rounding up to whole pages and query blocks."""

from typing import TypeVar

import numpy as np
import torch

Whole = TypeVar("Whole", int, np.ndarray, torch.Tensor)


def ceil_div(value: Whole, by: int) -> Whole:
    """Divides and rounds up, exactly.

    Args:
        value: an integer, or integers of any shape; negative ones too.
        by: a positive integer.

    Returns:
        The quotient rounded towards infinity, of the value's type, shape and dtype.
    """
    return -(-value // by)
