"""A setting: all that a trial depends on, drawn from its seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from tests.faults.data import LOADERS
from tests.faults.faults import FAULTS
from tests.faults.loggers import BAD, GOOD
from tests.faults.models import BODIES, OPTIMIZERS
from tests.faults.watchers import Watcher
from tests.faults.watchers import draw as draw_watchers

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true", "16-mixed")
COMPANY = ("EarlyStopping", "ModelCheckpoint", "SWA", "EMA", "LearningRateMonitor", "Finetuning", "Schedule")
LEGS = ("once", "once", "once", "resume", "again", "watched later", "watched first", "sanity checked")
FLAGS = ("fast_dev_run", "detect_anomaly", "deterministic", "barebones", "no inference_mode", "overfit_batches")


@dataclass(frozen=True)
class Setting:
    """What is fitted, on what, how, beside what, and what befalls it; the defaults are the plainest fit.

    Attributes:
        faults: Name, training step and kind of each.
        legs: ``"resume"``: the fit is saved at a step and goes on in a new trainer with new watchers; ``"again"``: with
            the same ones, from the start; ``"watched later"`` and ``"watched first"``: one of two legs is watched.
        places: Where among the other callbacks the watchers stand, from 0 to 1.
    """

    seed: int = 0
    body: str = "mlp"
    manual: bool = False
    compiled: str = ""
    objective: str = "classes"
    optimizer: str = "sgd"
    scheduler: str = "none"
    precision: str = "32-true"
    accumulate: int = 1
    clip: float | None = None
    loader: str = "whole"
    mapping: bool = False
    batches: int = 6
    epochs: int = 2
    limit: int | float = 1.0
    validation: str = "none"
    logs: bool = False
    log_every: int = 50
    logger: str = "none"
    company: tuple[str, ...] = ()
    flag: str = ""
    legs: str = "once"
    stop_at: int = 4
    faults: tuple[tuple[str, int, str], ...] = ()
    watchers: tuple[Watcher, ...] = ()
    places: float = 1.0

    def __str__(self) -> str:
        plain = Setting()
        names = [field.name for field in fields(self) if getattr(self, field.name) != getattr(plain, field.name)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def draw(seed: int) -> Setting:
    """The setting of a seed, whatever is drawn for others."""
    rng = random.Random(seed)
    often: Any = lambda usual, other, share=0.3: rng.choice(other) if rng.random() < share else usual  # noqa: E731
    optimizer = often("sgd", sorted(OPTIMIZERS), 0.6)
    names = rng.sample(sorted(FAULTS), rng.choice([0, 1, 1, 1, 2]))
    return Setting(
        seed=seed,
        body=rng.choice(sorted(BODIES)),
        manual=rng.random() < 0.15,
        compiled=often("", ["inner", "whole"], 0.04),
        objective=rng.choice(["classes", "classes", "targets", "views"]),
        optimizer=optimizer,
        scheduler=often("none", ["step", "epoch"]),
        precision=often("32-true", PRECISIONS[: 4 if optimizer == "lbfgs" else 5], 0.6),  # the scaler refuses it
        accumulate=often(1, [2, 3]),
        clip=often(None, [0.1]),
        loader=often("whole", LOADERS, 0.6),
        mapping=rng.random() < 0.3,
        batches=rng.randint(2, 7),
        epochs=rng.randint(1, 3),
        limit=often(1.0, [0, 1, 3, 0.5], 0.2),
        validation=often("none", ["epoch", "middle"], 0.4),
        logs=rng.random() < 0.6,
        log_every=rng.choice([1, 2, 50]),
        logger=often(rng.choice(GOOD), BAD, 0.2),
        company=tuple(rng.sample(COMPANY, rng.choice([0, 0, 1, 2]))),
        flag=often("", FLAGS, 0.15),
        legs=rng.choice(LEGS),
        stop_at=rng.randint(1, 8),
        faults=tuple((name, rng.randint(1, 8), rng.choice(FAULTS[name][1])) for name in names),
        watchers=draw_watchers(rng),
        places=rng.choice([0.0, 0.5, 1.0]),
    )


def simpler(setting: Setting) -> Iterator[Setting]:
    """The same with one thing less, in every way."""
    for name in ("watchers", "faults", "company"):
        parts = getattr(setting, name)
        for i in range(len(parts)):
            yield replace(setting, **{name: parts[:i] + parts[i + 1 :]})
    for field in fields(Setting):
        kept = ("seed", "watchers", "faults", "company", "stop_at")
        if field.name not in kept and getattr(setting, field.name) != field.default:
            yield replace(setting, **{field.name: field.default})
    for i, (name, arguments) in enumerate(setting.watchers):
        for key in arguments.keys() - {"loaders"}:  # which has no default
            less = {other: value for other, value in arguments.items() if other != key}
            yield replace(setting, watchers=(*setting.watchers[:i], (name, less), *setting.watchers[i + 1 :]))
