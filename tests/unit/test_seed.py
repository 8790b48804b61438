"""A seed that a test printed can be fed back."""

import numpy as np
import pytest

from tests.conftest import fresh_seed


def test_a_seed_is_fed_back(monkeypatch, capsys):
    monkeypatch.delenv("DAM_SEED", raising=False)
    first, second = fresh_seed(), fresh_seed()
    assert first != second
    printed = capsys.readouterr().out.split()[1]
    assert int(printed) == first
    monkeypatch.setenv("DAM_SEED", printed)
    assert fresh_seed() == first


def test_the_variable_reaches_random_numbers(monkeypatch, request):
    monkeypatch.setenv("DAM_SEED", "7")
    expected = np.random.default_rng(7).integers(10**6)
    assert request.getfixturevalue("rng").integers(10**6) == expected


@pytest.mark.parametrize("value", ["x", "-1", str(2**32), ""])
def test_what_is_no_seed_is_refused(monkeypatch, value):
    monkeypatch.setenv("DAM_SEED", value)
    with pytest.raises(ValueError, match=r"DAM_SEED is '.*': must be an integer from 0"):
        fresh_seed()
