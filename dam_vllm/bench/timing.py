"""Peers timed in turn, so that a change of the machine's load meets all of them."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Advance = Callable[[], None]
Name = TypeVar("Name", bound=Hashable)


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(
    peers: Mapping[Name, Callable[[], object]],
    rounds: int,
    advance: Advance = lambda: None,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[Name, list[float]]:
    """Times each peer once a round, after one call of each that is not counted.

    Args:
        peers: what to call, by name.
        rounds: measurements of each.
        advance: called after every round.
        clock: calls a peer and tells the seconds.

    Returns:
        Seconds of each round, by peer.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in peers}
    for call in peers.values():
        call()
    for _ in range(rounds):
        for name, call in peers.items():
            seconds[name].append(clock(call))
        advance()
    return seconds


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median over rounds of one peer's time over the other's in the same round."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
