"""Peers timed in turn, so that a change of the machine's load meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Advance = Callable[[], None]


def alternate(
    peers: Mapping[str, Callable[[], object]], rounds: int, advance: Advance = lambda: None
) -> dict[str, list[float]]:
    """Times each peer once a round, after one call of each that is not counted.

    Args:
        peers: what to call, by name.
        rounds: measurements of each.
        advance: called after every round.

    Returns:
        Seconds of each round, by peer.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for call in peers.values():
        call()
    for _ in range(rounds):
        for name, call in peers.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        advance()
    return seconds


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Median over rounds of one peer's time over the other's in the same round."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
