"""What `python -m tests.soak` ends with."""

from contextlib import nullcontext

import pytest

from tests.soak import __main__ as program

CLEAN = {
    "bursts": 3, "asked": 24, "streamed": 9, "cut": 2, "lost": 0, "other tokens": 0,
    "other log-probabilities": 0, "preempted": 5, "found in the prefix cache": 7,
    "pages in use at the end": 0.0, "MiB": [900, 950, 1000, 1100, 1200],
}  # fmt: skip


@pytest.fixture
def end(monkeypatch):
    """Function that runs it with a report for each server; what it exits with, None for success."""

    def run(**changed):
        reports = iter([CLEAN | changed.get(name, {}) for name in program.SERVERS])

        async def soak(*given, **also):
            return next(reports)

        monkeypatch.setattr(program, "soak", soak)
        monkeypatch.setattr(program, "serve", lambda *given, **also: nullcontext())
        monkeypatch.setattr(program, "save_static", lambda *given: None)
        monkeypatch.setattr(program.sys, "argv", ["soak"])
        try:
            program.main()
        except SystemExit as error:
            return error.code
        return None

    return run


def test_all_as_it_must_be(end):
    """Memory may grow, and answers be others as often as stock vLLM's are."""
    other = {"other tokens": 3, "other log-probabilities": 9}
    assert end(stock=other, fitted=other) is None


@pytest.mark.parametrize(
    ("server", "what"),
    [
        ("static", "other tokens"), ("static", "other log-probabilities"), ("static", "lost"),
        ("stock", "lost"), ("fitted", "lost"), ("fitted", "pages in use at the end"),
    ],
)  # fmt: skip
def test_what_must_not_be_is_the_exit_status(end, server, what):
    assert end(**{server: {what: 1}}) == f'must not be: {{"{server}": {{"{what}": 1}}}}'


def test_fitted_masks_that_change_more_than_stock(end):
    found = end(stock={"other tokens": 3}, fitted={"other tokens": 6})
    shares = '{"shares of other tokens": [0.25, 0.125]}'
    assert found == f'must not be: {{"fitted beside stock": {shares}}}'
