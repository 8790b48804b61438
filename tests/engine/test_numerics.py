"""A short run of `tests.numerics`: our backend and the stock kernel over random geometries."""

import numpy as np
import pytest

from tests.conftest import fresh_seed
from tests.numerics.__main__ import check, measure
from tests.numerics.case import draw

pytestmark = pytest.mark.engine

CASES = 30


def test_equal_to_the_stock_kernel_over_what_is_read(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_ATTN_SPLIT_KV", "0")
    seed, kinds = fresh_seed(), set()
    for index in range(CASES):
        rng = np.random.default_rng([seed, index])
        case = draw(rng)
        print(index, case)
        errors = measure(case, rng)
        check(case, errors)
        kinds |= set(errors)
    assert kinds == {"static", "dynamic"}
