"""Rounding errors over random geometries: `python -m tests.numerics --cases 1000 --seed 1`.

Each case draws heads, head size, pages, lengths, chunks, masks and dtypes, and computes attention
by our backend and by the stock kernel, run densely over a contiguous copy of just the keys that a
query block reads. Both must be equal bit for bit, and both are held against float64. Keys and
queries of dynamic heads are rotated, and so rounded once more, before the kernel gets them: beside
the stock kernel on the same inputs, their error is held against its error without the rotation,
ROTATED times as much at most.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from tests.numerics.batch import Batch
from tests.numerics.case import draw

ROTATED = 4.0


@dataclass(frozen=True)
class Errors:
    """Of a case's heads of one kind, against float64; all relative to the outputs' mean square.

    Attributes:
        ours: largest, and root mean square.
        stock: likewise.
        same: whether ours is equal bit for bit to the stock kernel's from the same inputs.
    """

    ours: tuple[float, float]
    stock: tuple[float, float]
    same: bool


def measure(case, rng):
    """Errors by kind of head, "static" and "dynamic", as far as a case has them."""
    batch = Batch(case, rng)
    output, reads = batch.ours()
    assert not output.isnan().any()
    by_head = output.view(-1, case.kv_heads, case.heads_per_kv, case.size)
    result = {}
    for kind in ("static", "dynamic"):
        mine = [read for read in reads if (read.head in batch.dynamic) == (kind == "dynamic")]
        if mine:
            ours = torch.cat([by_head[read.rows, read.head] for read in mine])
            exact = torch.cat([batch.exact(read) for read in mine])
            told = [relative(found, exact) for found in (ours, batch.stock(mine))]
            result[kind] = Errors(*told, torch.equal(ours, batch.stock(mine, turned=True)))
    return result


def relative(found, exact):
    """Largest and root mean square error, in units of the exact outputs' root mean square."""
    error = (found.double() - exact) / exact.square().mean().sqrt()
    return float(error.abs().max()), float(error.square().mean().sqrt())


def check(case, errors):
    """Holds a case's errors against what is promised."""
    for found in errors.values():
        assert found.same, errors
        # Of few keys the stock kernel may err by nothing: half a unit is allowed in any case.
        assert found.ours[1] <= ROTATED * found.stock[1] + torch.finfo(case.dtype).eps / 2, errors


class Worst:
    """The largest errors of cases of one kind."""

    def __init__(self):
        self.counts = Counter()
        self.ours = self.stock = self.ratio = 0.0

    def add(self, errors):
        self.counts["cases"] += 1
        self.counts["bit-equal"] += errors.same
        self.ours, self.stock = max(self.ours, errors.ours[0]), max(self.stock, errors.stock[0])
        self.ratio = max(self.ratio, errors.ours[1] / max(errors.stock[1], 1e-12))

    def report(self):
        told = {"largest": self.ours, "stock's": self.stock, "worst ratio of rms": self.ratio}
        return dict(self.counts) | {name: float(f"{value:.2g}") for name, value in told.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat the case of this number")
    options = parser.parse_args()
    # By default the kernel splits long sequences over threads by what else a batch holds.
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"
    worst, failures, start = {}, 0, time.monotonic()
    for index in range(options.cases) if options.only is None else [options.only]:
        rng = np.random.default_rng([options.seed, index])
        case = draw(rng)
        try:
            errors = measure(case, rng)
            for kind, found in errors.items():
                name = f"{kind} {str(case.dtype).removeprefix('torch.')} {case.cache_dtype}"
                worst.setdefault(name, Worst()).add(found)
            check(case, errors)
        except Exception:
            failures += 1
            print(f"--seed {options.seed} --only {index}: {case}", file=sys.stderr)
            traceback.print_exc(limit=-2)
    for name in sorted(worst):
        print(name, json.dumps(worst[name].report()))
    print(json.dumps({"failures": failures, "seconds": round(time.monotonic() - start)}))
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
