"""Runs a benchmark of kernels and fails where a peer did or was wrong: the part `smoke`.

    python deploy/gpu/smoke.py FILE dam-vllm bench kernel ...

FILE is where the benchmark leaves its rows.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# In bfloat16 errors are some .0024 of what float32 gives; a page too few makes them .05.
MOST_ERROR = 0.01


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each peer that failed, or is too far from float32."""
    found = [] if rows else ["nothing was measured"]
    for row in rows:
        case = f"{row['phase']} {row['batch']} x {row['tokens']}, {row['heads']}"
        found += [f"{case}: {text}" for text in row.get("failed", ())]
        for name, error in row.items():
            # NaN, where an element was not written, is no less than anything.
            if name.endswith("_error") and error is not None and not error <= MOST_ERROR:
                found.append(f"{case}: {name} is {error}, must be at most {MOST_ERROR}")
    return found


def main(file: str, *command: str) -> int:
    """Runs the command; 1 where it failed or one of its rows tells of a fault."""
    subprocess.run([*command, "--json", file], check=True)
    found = faults(json.loads(Path(file).read_text())["rows"])
    print(*found, sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
