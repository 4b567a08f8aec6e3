"""Run the zoo and print what the guard and simple baselines saw.

Run: ``python -m examples.zoo`` (five seeds; ``--quick`` one, ``--only NAME`` one specimen, ``--seeds 5 6`` these).
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from . import SPECIMENS
from .score import Run, run
from .table import report


def runs_of(name: str, seeds: Sequence[int], workers: int) -> list[Run]:
    """All runs of the specimens with ``name`` in their names, seeds in turn."""
    chosen = [specimen for specimen in SPECIMENS if name in specimen.name]
    jobs = [(s, seed, sick) for seed in seeds for s in chosen for sick in ((True, False) if s.setting else (False,))]
    if workers == 1:
        return [run(*job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(run, *zip(*jobs, strict=True)))


def main() -> None:
    """Run, and print."""
    parser = argparse.ArgumentParser(prog="python -m examples.zoo", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seed 0 only")
    parser.add_argument("--only", default="", metavar="NAME", help="specimens with this in their names")
    parser.add_argument("--seeds", type=int, nargs="+", default=None, help="0 to 4 by default")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    seeds = options.seeds or ((0,) if options.quick else range(5))
    print(report(SPECIMENS, runs_of(options.only, seeds, options.workers)))


if __name__ == "__main__":
    main()
