"""Proof on a GPU, in one command of at most eight minutes; elsewhere one line.

The tests marked ``cuda``; torch's own check that nothing waits for the device between points of any monitor, in any
loss and in any penalty; sums over processes through NCCL where there are two GPUs; and what watching costs there.

Run: ``python -m tests.cuda [--device cpu]``: on a CPU the same code runs with stand-ins, to show that it does.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from tests.benchmarks import monitor_overhead as costs
from tests.cuda import processes, waits

MINUTES = 8


def check(title: str, results: Iterator[tuple[str, waits.Found]], may_decompose: bool = False) -> bool:
    """Print who waits; says whether nobody did who must not."""
    fine, lines, number = True, [], 0
    for name, found in results:
        number += 1
        excused = may_decompose and found.decompositions
        if found.waits or found.decompositions:
            fine &= bool(excused)
            lines.append(f"  {name}: {', '.join(sorted({*found.waits, *found.decompositions}))[:200]}")
    print(f"{title}: {number}, of which {len(lines)} wait for the device", *lines, sep="\n", flush=True)
    return fine


def marked() -> bool:
    """Run the tests that need a GPU."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "cuda"], check=False).returncode in (0, 5)


def table(device: str, until: float, quick: bool) -> None:
    """Print the cost of watching, row by row while there is time."""
    for name, row in costs.ROWS.items():
        if time.monotonic() > until:
            print(f"{row.title}: left out, no time is left (python -m tests.benchmarks.monitor_overhead {name!r})")
            continue
        print(f"{row.title}: {costs.measure(row, device, quick)} (goal {row.goal})", flush=True)
    print(f"compiled transformer, watched: {costs.graphs(device)} graphs (goal 1)")


def main() -> int:
    """Run all parts; the exit code says whether all that must hold did."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--skip-table", action="store_true", help="leave the costs out")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("make cuda: torch sees no GPU here, nothing to do")
        return 0
    until = time.monotonic() + 60 * MINUTES - 90  # a row takes less than that
    costs.quiet()
    fine = marked() if given.device == "cuda" else True
    fine &= check("monitors between points", waits.monitors(given.device))
    fine &= check("losses", waits.losses(given.device), may_decompose=True)
    fine &= check("penalties", waits.penalties(given.device))
    if given.device == "cpu" or torch.cuda.device_count() > 1:
        fine &= processes.agree(given.device)
    else:
        print("NCCL: left out, it takes two GPUs")
    if not given.skip_table:
        table(given.device, until, quick=given.device == "cpu")
    print("all held" if fine else "NOT all held")
    return not fine


if __name__ == "__main__":
    sys.exit(main())
