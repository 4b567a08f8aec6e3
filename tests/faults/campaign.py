"""A campaign: many trials on several processes, and what failed in them."""

import logging
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from tests.faults.fit import fit
from tests.faults.setting import draw
from tests.faults.trial import Trial, run

SECONDS = 60
"""Of the processor, for a trial; most take less than one."""
COMPILED = 240
"""For one that compiles: every step anew until the compiler gives up, and every hook with it."""


class Hung(BaseException):
    """A trial does not end."""


def quiet() -> None:
    """One thread, and no word of Lightning's."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "torch._dynamo", "torch.fx"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def one(seed: int, control: bool = False) -> Trial:
    """The trial of a seed; one that hangs or cannot be made fails too."""

    def hang(*args: Any) -> None:
        raise Hung

    setting = draw(seed)
    seconds = COMPILED if setting.compiled else SECONDS
    for kind, number in ((signal.ITIMER_PROF, signal.SIGPROF), (signal.ITIMER_REAL, signal.SIGALRM)):
        signal.signal(number, hang)
        signal.setitimer(kind, seconds if kind == signal.ITIMER_PROF else 10 * seconds)
    try:
        return run(setting, (lambda setting, watch: fit(setting, False)) if control else fit)
    except (Hung, Exception) as error:
        return Trial(setting, [f"the trial: {error!r:.300}"], f"the trial {type(error).__name__}")
    finally:
        for kind in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(kind, 0)


def show(trial: Trial) -> None:
    """Print a failure and how to repeat it."""
    print(f"python -m tests.faults --only {trial.setting.seed}\n  {trial.setting}")
    for failure in trial.failures[:6]:
        print(f"  - {failure}")
    if len(trial.failures) > 6:
        print(f"  - and {len(trial.failures) - 6} more")


def campaign(seeds: range, workers: int, control: bool) -> int:
    """Run trials and print a summary; returns how many failed."""
    start, trials = time.monotonic(), []
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=quiet) as pool:
        for done in as_completed([pool.submit(one, seed, control) for seed in seeds]):
            trials.append(trial := done.result())
            if trial.failures:
                show(trial)
                sys.stdout.flush()
    failed = [trial for trial in trials if trial.failures]
    ends = Counter(trial.end.partition(":")[0] for trial in trials)
    refused = Counter(name for trial in trials for name in trial.refused)
    print(f"{len(trials)} trials in {time.monotonic() - start:.0f} s, {sum(t.points for t in trials)} points published")
    print("bare fits ended:", ", ".join(f"{end} {number}" for end, number in ends.most_common()))
    print("refused at the start:", ", ".join(f"{name} {number}" for name, number in refused.most_common()) or "none")
    for kind, number in Counter(trial.kind for trial in failed).most_common():
        seeds_of_kind = sorted(trial.setting.seed for trial in failed if trial.kind == kind)
        print(f"{number:4d} failed: {kind}; seeds {', '.join(map(str, seeds_of_kind[:8]))}")
    print(f"{len(failed)} of {len(trials)} failed")
    return len(failed)
