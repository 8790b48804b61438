"""Time to the first token and a token over HTTP: the stock backend and dam, in turn."""

import statistics
from collections.abc import Mapping, Sequence

import torch

from dam_vllm.bench.client import arrivals, random_prompt
from dam_vllm.bench.report import Row
from dam_vllm.bench.servers import Setup, serve
from dam_vllm.bench.timing import Advance, ratio
from dam_vllm.masks.density import density
from dam_vllm.options import DENSE_BELOW
from dam_vllm.server import Server, rest

TARGETS = "targets: TTFT ratio >= 4 at 16384; at 2048 and below never under 1/1.02 = 0.98"
VOCABULARY = 2304
DECODED = 17
BUDGET = 32768
MAX_ROUNDS = 12


def rounds_at(tokens: int, least: int) -> int:
    """Rounds at a length: short prompts are cheap to repeat and need it for a steady median."""
    return max(least, min(MAX_ROUNDS, BUDGET // tokens))


def measure(
    setup: Setup, lengths: Sequence[int], least: int, crossover: bool, advance: Advance
) -> list[Row]:
    """Asks servers in turn at every length.

    Args:
        setup: model, masks and arguments.
        lengths: prompt lengths in tokens.
        least: rounds at the longest prompts.
        crossover: whether to measure also with `dense_below: 0`, where all lengths are sparse.
        advance: called once after the servers have started and once a length.

    Returns:
        A row a length and choice of `dense_below`; times in milliseconds, medians.
    """
    default = DENSE_BELOW["cuda" if torch.cuda.is_available() else "cpu"]
    peers: dict[str, dict[str, object] | None] = {"dense": None, "dam": {}}
    if crossover:
        peers["sparse"] = {"dense_below": 0}
    rows: list[Row] = []
    with serve(setup, peers) as (servers, masks):
        advance()
        for tokens in lengths:
            first, later = _ask_in_turn(servers, tokens, rounds_at(tokens, least))
            for name, below in (("dam", default), ("sparse", 0)):
                if name in servers:
                    read = density(masks, [tokens], setup.page, below)[1]
                    row = {"bench": "e2e", "tokens": tokens, "dense_below": below}
                    row["density"] = 1.0 if tokens <= below else float(read.mean())
                    rows.append(row | _times(first, later, name))
            advance()
    return rows


def _ask_in_turn(
    servers: Mapping[str, Server], tokens: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds to the first token and for each later one, by server and round."""
    first: dict[str, list[float]] = {name: [] for name in servers}
    later: dict[str, list[float]] = {name: [] for name in servers}
    warm = 1 if tokens <= BUDGET // 4 else 0
    for turn in range(rounds + warm):
        prompt = random_prompt(tokens, VOCABULARY)
        # Every other round backwards, so that no server always follows the same one.
        for name in list(servers)[:: 1 if turn % 2 else -1]:
            rest()
            times = arrivals(servers[name].url, servers[name].model, prompt, DECODED)
            if turn >= warm:
                first[name].append(times[1] - times[0])
                later[name].append((times[-1] - times[1]) / (len(times) - 2))
    return first, later


def _times(first: Mapping[str, list[float]], later: Mapping[str, list[float]], name: str) -> Row:
    return {
        "dense_ttft_ms": 1e3 * statistics.median(first["dense"]),
        "dam_ttft_ms": 1e3 * statistics.median(first[name]),
        "ttft_ratio": ratio(first["dense"], first[name]),
        "dense_tpot_ms": 1e3 * statistics.median(later["dense"]),
        "dam_tpot_ms": 1e3 * statistics.median(later[name]),
        "tpot_ratio": ratio(later["dense"], later[name]),
        "rounds": len(first[name]),
    }


def crossover_length(rows: Sequence[Row]) -> int | None:
    """The least length from which on sparse attention is faster at every one measured.

    Args:
        rows: of `measure`; those with `dense_below` 0 count.

    Returns:
        Tokens, or None if it is not faster at the longest.
    """
    result = None
    for row in sorted(rows, key=lambda row: -row["tokens"]):
        if row["dense_below"] == 0:
            if row["ttft_ratio"] <= 1:
                break
            result = int(row["tokens"])
    return result
