"""The fault campaign: random fits, bare and watched, that must end alike.

Run: ``python -m tests.faults --trials 1000 --seed 0 --workers 2``, or ``--only SEED`` for one of them, ``--shrink`` to
look for the plainest setting that fails alike. ``--control`` compares bare fits with bare fits.
"""

import argparse
import sys

from tests.faults.campaign import campaign, one, quiet, show
from tests.faults.trial import shrink


def main() -> int:
    """Parse, run, and say by the exit code whether all passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="that of the first trial")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="repeat the trial of this seed")
    parser.add_argument("--shrink", action="store_true", help="with --only: find the plainest setting that fails alike")
    parser.add_argument("--control", action="store_true", help="watch nothing: no trial may fail")
    given = parser.parse_args()
    if given.only is None:
        return min(campaign(range(given.seed, given.seed + given.trials), given.workers, given.control), 1)
    quiet()
    trial = one(given.only, given.control)
    show(shrink(trial) if given.shrink and trial.failures else trial)
    print(f"ended: {trial.end}; {trial.points} points; refused: {trial.refused}; {trial.kind or 'passed'}")
    return bool(trial.failures)


if __name__ == "__main__":
    sys.exit(main())
