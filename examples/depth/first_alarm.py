"""Which verdict comes first where the tokens of a transformer become one vector? Two specimens, and their twins.

Run: ``python -m examples.depth.first_alarm`` (3 minutes on one core; with ``--quick`` one specimen, one seed).
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from examples.zoo.score import Run, run
from examples.zoo.sequences.token_uniformity import SPECIMENS
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse.rules import RULES

SEEDS = (2, 3, 4)


def table(runs: Sequence[Run]) -> str:
    """By specimen and verdict, notices left out: in how many runs it was said, and the steps at which it was first."""
    lines = ["| specimen | verdict | said in | first at step | in healthy twins |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(each.specimen for each in runs):
        sick, healthy = ([each for each in runs if (each.specimen, each.sick) == (name, s)] for s in (True, False))
        found = _first_steps(sick)
        for kind, steps in sorted(found.items(), key=lambda item: statistics.median(item[1])):
            alarms = len(_first_steps(healthy).get(kind, []))
            said = f"{len(steps)} of {len(sick)}"
            lines.append(f"| {name} | `{kind}` | {said} | {', '.join(map(str, steps))} | {alarms} |")
        if not found:
            lines.append(f"| {name} | none | 0 of {len(sick)} | | |")
    return "\n".join(lines)


def _first_steps(runs: Sequence[Run]) -> dict[str, list[int]]:
    """By verdict, when each run says it first."""
    found: dict[str, list[int]] = {}
    for each in runs:
        first: dict[str, int] = {}
        for kind, _, step in each.verdicts:
            if not RULES[kind].informative:
                first.setdefault(kind, step)
        for kind, step in first.items():
            found.setdefault(kind, []).append(step)
    return found


def shortened(specimen: Specimen, steps: int) -> Specimen:
    """The same, for fewer steps."""

    def make(seed: int, **setting: Any) -> Habitat:
        return replace(specimen.make(seed, **setting), steps=steps)

    return replace(specimen, make=make)


def main(seeds: Sequence[int] = SEEDS, specimens: Sequence[Specimen] = SPECIMENS) -> None:
    """Train and print."""
    runs = [run(specimen, seed, sick) for specimen in specimens for seed in seeds for sick in (True, False)]
    print(table(runs))
    print(f"\nAfter {sum(each.steps for each in runs)} steps of {len(runs)} runs.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one specimen, one seed, few steps: to see that it runs")
    if parser.parse_args().quick:
        main(SEEDS[:1], [shortened(SPECIMENS[0], 40)])
    else:
        main()
