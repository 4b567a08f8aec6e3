"""What one test writes into the environment and turns down in loggers reaches no other."""

import logging
import os

import pytest
from lightning.pytorch import seed_everything


@pytest.mark.parametrize("turn", [1, 2])
def test_a_seed_that_a_test_before_has_set_is_gone(turn):
    assert "PL_GLOBAL_SEED" not in os.environ  # samplers of later processes would shuffle by it
    seed_everything(7, verbose=False)
    assert os.environ["PL_GLOBAL_SEED"] == "7"


@pytest.mark.parametrize("turn", [1, 2])
def test_a_logger_that_a_test_before_has_turned_down_speaks(turn):
    logger = logging.getLogger("lightning_collapse")
    assert logger.isEnabledFor(logging.WARNING)
    logger.setLevel(logging.CRITICAL)
