"""Servers under load for a while: `python -m tests.soak --minutes 60 --seed 1`.

Each server in turn is asked every request alone. Then bursts of the same requests come, more than
its cache holds: of 1 to 8192 tokens, streamed or not, cut in the middle, with shared prefixes. None
may be lost, and each must be what it was alone: by masks of static heads within `load.ROUNDING`.
Stock vLLM, which is asked the same, tells how often answers change by its own rounding; fitted
masks must change no more of them, but for `SLACK`. Pages must all be free at the end. What must not
be is told last and ends in exit status 1; memory is told alone.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from dam_vllm.demo import model_dir
from dam_vllm.options import MASKS_IN_MODEL
from tests.soak.load import NAMES, save_static, serve, soak

SERVERS = ("static", "stock", "fitted")
NEVER, NEVER_OF_STATIC = ("lost", "pages in use at the end"), NAMES[-2:]
# Share of answers, of which stock vLLM changes few itself.
SLACK = 0.005


def broken(name, report):
    """What a server's report counts that must not be."""
    judged = NEVER + (NEVER_OF_STATIC if name == "static" else ())
    return {what: report[what] for what in judged if report[what]}


def changed_more(fitted, stock):
    """Answers that fitted masks change oftener than stock vLLM does, by their reports."""
    shares = [report["other tokens"] / report["asked"] for report in (fitted, stock)]
    return {"shares of other tokens": shares} if shares[0] > shares[1] + SLACK else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="of all servers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", nargs="+", default=list(SERVERS), choices=SERVERS)
    options = parser.parse_args()
    failed, reports = {}, {}
    seconds = options.minutes * 60 / len(options.servers)
    with tempfile.TemporaryDirectory() as folder:
        files = {"static": Path(folder) / "masks", "fitted": model_dir() / MASKS_IN_MODEL}
        save_static(files["static"], np.random.default_rng(options.seed))
        for name in options.servers:
            rng = np.random.default_rng(options.seed)
            # Pages that are freed leave room, and none is preempted.
            kept = {"kv_free": "off"} if name == "static" else {}
            with serve(files.get(name), **kept) as server:
                report = asyncio.run(soak(server, rng, requests=24, seconds=seconds))
            print(name, json.dumps(report), flush=True)
            reports[name] = report
            failed |= {name: found} if (found := broken(name, report)) else {}
    if {"fitted", "stock"} <= reports.keys():
        found = changed_more(reports["fitted"], reports["stock"])
        failed |= {"fitted beside stock": found} if found else {}
    if failed:
        sys.exit(f"must not be: {json.dumps(failed)}")


if __name__ == "__main__":
    main()
