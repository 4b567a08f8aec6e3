"""Weights that change while training runs."""

import pytest
import torch

from lightning_collapse.losses import LinearWarmup
from lightning_collapse.losses.schedule import weighted


def test_warmup_is_linear_and_bounded() -> None:
    warmup = LinearWarmup(weight=3.0, steps=10, start=5)
    assert [warmup(step) for step in (0, 5, 10, 15, 100)] == [0.0, 0.0, 1.5, 3.0, 3.0]
    switch = LinearWarmup(weight=3.0, steps=0, start=5)
    assert [switch(step) for step in (4, 5, 6)] == [0.0, 3.0, 3.0]


@pytest.mark.parametrize("argument", ["steps", "start"])
def test_negative_arguments_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must not be negative, got -1"):
        LinearWarmup(**({"weight": 1.0, "steps": 1} | {argument: -1}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_and_function_weigh_alike(dtype: torch.dtype) -> None:
    value = torch.tensor(1.7, dtype=dtype)
    constant, function = weighted(0.25, value, 0), weighted(lambda step: step / 8, value, 2)
    assert constant.dtype == function.dtype == dtype
    assert torch.equal(constant, function)
