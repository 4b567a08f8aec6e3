"""What every test shares: a seed, and an environment and loggers that the tests before it have not written to."""

import logging
import os
from functools import cache
from importlib.metadata import entry_points

import pytest

# examples and the fault campaign turn these down, and a test after them would hear nothing
LOGGERS = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_collapse")]


@pytest.fixture(scope="session")
def seed_with():
    import torch  # here, for the process that only hands tests out to others has no need of it

    # `torch.manual_seed` writes the stack of its callers down, for a device that may be started later
    return torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def _as_it_was(seed_with):
    """`seed_everything` and `Trainer` leave variables there that samplers and later trainers read."""
    before, levels = dict(os.environ), [logger.level for logger in LOGGERS]
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    seed_with(0)
    yield
    after = dict(os.environ)
    if after != before:
        for name in after.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
    for logger, level in zip(LOGGERS, levels, strict=True):
        if logger.level != level:  # setting it forgets what every logger has cached
            logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def _entry_points():
    """Every `Trainer` reads the metadata of all packages that are installed; no test installs one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.fabric.utilities.registry.entry_points", cache(entry_points))
        yield
