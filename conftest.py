"""What pytest does not do in the process that only hands tests out to others: import Lightning, for a filter."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Lightning's advice on loaders, workers and missing validation is not about us."""
    hands_out = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        advice = "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
        config.addinivalue_line("filterwarnings", advice)
