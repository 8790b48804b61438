import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dam_vllm.masks.page_tables import dense_until
from dam_vllm.masks.rounding import ceil_div


@pytest.mark.parametrize("by", [1, 3, 16])
def test_quotients_are_rounded_up(by):
    values = [-33, -16, -1, 0, 1, 15, 16, 17, 2**53 + 1]
    expected = [math.ceil(Fraction(value, by)) for value in values]
    assert [ceil_div(value, by) for value in values] == expected
    assert ceil_div(np.array(values), by).tolist() == expected
    assert ceil_div(torch.tensor(values), by).tolist() == expected


@pytest.mark.parametrize(
    ("dense_below", "page", "until"),
    [(0, 16, 0), (1, 16, 128), (128, 16, 128), (129, 32, 256), (2048, 48, 2160), (300, 256, 512)],
)
def test_dense_until_is_whole_query_blocks(dense_below, page, until):
    assert dense_until(dense_below, page) == until
