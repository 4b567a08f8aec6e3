"""What one test writes into the environment reaches no other."""

import os

import pytest
from lightning.pytorch import seed_everything


@pytest.mark.parametrize("turn", [1, 2])
def test_a_seed_that_a_test_before_has_set_is_gone(turn):
    assert "PL_GLOBAL_SEED" not in os.environ  # samplers of later processes would shuffle by it
    seed_everything(7, verbose=False)
    assert os.environ["PL_GLOBAL_SEED"] == "7"
