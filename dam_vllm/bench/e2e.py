"""Whole requests over HTTP, asked by vLLM's own client: the stock backend and dam, in turn."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from dam_vllm.bench.client import Figures, Load, ask
from dam_vllm.bench.model import Model
from dam_vllm.bench.report import Row
from dam_vllm.bench.servers import Peers, Setup, device, serve
from dam_vllm.bench.timing import Advance, ratio
from dam_vllm.masks.density import density
from dam_vllm.masks.mask_set import MaskSet
from dam_vllm.options import DENSE_BELOW
from dam_vllm.server import Server

TARGETS = (
    "ratios are dense over dam (requests: dam over dense), medians over rounds; targets for TTFT: "
    "long >= 4 at 16384, never under 1/1.02 = 0.98 at 2048 and below; on GPU an 8b shape >= 3 at "
    "131072"
)
NEW = 65
# All tokens after the first come at once: one by one they keep client and HTTP server busy, on few
# cores longer than what decoding is to be told by.
STREAM = f"--stream-interval={NEW}"
# Short prompts are cheap to repeat and need it for a steady median: up to MOST of them a round,
# as many as a machine multiplies in about a second.
MOST, FLOPS = 4, {"cpu": 3e11, "cuda": 3e14}
SPARSE = {"dense_below": 0}


def load_of(model: Model, tokens: int, concurrency: int) -> Load:
    """The requests of a round: one for each that is under way at a time, more if they are cheap."""
    flops = concurrency * tokens * model.weight_bytes  # of two bytes a weight, two a token
    times = max(1, min(MOST, int(FLOPS[device()] / flops)))
    # The first ones of a size are slower; where they take long they are left to the median.
    return Load(tokens, NEW, times * concurrency, concurrency, concurrency if times > 1 else 0)


def peers_of(crossover: bool) -> Peers:
    """Servers by name, with `dam` options; `crossover` adds one where all lengths are sparse."""
    return {"dense": None, "dam": {}} | ({"sparse": SPARSE} if crossover else {})


def measure(
    name: str,
    setup: Setup,
    loads: Sequence[Load],
    rounds: int,
    groups: Sequence[Peers],
    advance: Advance,
) -> Iterator[Row]:
    """Asks servers in turn for every load.

    Args:
        name: of the model, for the rows.
        setup: model, masks and arguments.
        loads: what they are asked.
        rounds: how often each of them.
        groups: the servers that run at a time, of `peers_of`; "dense" first.
        advance: called once after a group's servers have started and once a load of each.

    Yields:
        A row a load and choice of `dense_below`, as soon as it is known; times in milliseconds,
        medians over rounds, in `each_round` those of every round.
    """
    found: dict[tuple[str, Load], list[Figures]] = defaultdict(list)
    for group in groups:
        with serve(setup, group) as (servers, masks):
            advance()
            for load in loads:
                for each, figures in _ask_in_turn(servers, load, rounds):
                    found[each, load].append(figures)
                advance()
                for each in group:
                    if each != "dense":
                        row = {"bench": "e2e", "model": name, "tokens": load.tokens}
                        row |= {"concurrency": load.concurrency}
                        row |= _read(masks, setup.page, load.tokens, each)
                        yield row | _figures(found["dense", load], found[each, load])


def _ask_in_turn(
    servers: Mapping[str, Server], load: Load, rounds: int
) -> Iterator[tuple[str, Figures]]:
    for turn in range(rounds):
        # Every other round backwards, so that no server always follows the same one.
        for name in list(servers)[:: -1 if turn % 2 else 1]:
            yield name, ask(servers[name], load, seed=turn)


def _read(masks: MaskSet, page: int, tokens: int, peer: str) -> Row:
    """What a server reads of a prompt."""
    below = 0 if peer == "sparse" else DENSE_BELOW[device()]
    read = density(masks, [tokens], page, below)[1]
    return {"density": 1.0 if tokens <= below else float(read.mean()), "dense_below": below}


def _figures(dense: Sequence[Figures], dam: Sequence[Figures]) -> Row:
    row: Row = {}
    for key, field in (("ttft_ms", "ttft"), ("ttft_p99_ms", "ttft_p99"), ("tpot_ms", "tpot")):
        one, other = ([getattr(each, field) for each in peer] for peer in (dense, dam))
        row[f"dense_{key}"], row[f"dam_{key}"] = statistics.median(one), statistics.median(other)
        row[f"{field}_ratio"] = ratio(one, other)
    one, other = ([each.requests_per_s for each in peer] for peer in (dense, dam))
    row |= {"dense_req/s": statistics.median(one), "dam_req/s": statistics.median(other)}
    row |= {"req/s_ratio": ratio(other, one), "rounds": len(dam)}
    rounds = zip(dense, dam, strict=True)
    row["each_round"] = [{"dense": _told(a), "dam": _told(b)} for a, b in rounds]
    return row


def _told(figures: Figures) -> Row:
    """A round's figures; there is no gap between tokens that come together."""
    return {name: value for name, value in asdict(figures).items() if name != "gap"}


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
