"""What saves time in every process of the suite: imports that it needs not, and garbage that is not there."""

import gc

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Lightning's advice on loaders, workers and missing validation is not about us.

    A filter in `pyproject.toml` would have the process import Lightning that only hands tests out to others.
    """
    hands_out = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        advice = "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
        config.addinivalue_line("filterwarnings", advice)


def pytest_collection_finish() -> None:
    """What is there when tests begin, a million objects, is not looked through again by every garbage collection."""
    gc.freeze()
