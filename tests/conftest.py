"""What every test shares: a seed, and an environment and loggers that the tests before it have not written to."""

import logging
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment():
    """`seed_everything` and `Trainer` leave variables there that samplers and later trainers read."""
    before = dict(os.environ)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _loggers():
    """Examples and the fault campaign turn these down, and a test after them would hear nothing."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_collapse")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
