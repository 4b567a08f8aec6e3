"""Weights that change while training runs."""

import math

import pytest
import torch

from lightning_collapse.losses import LinearRamp, LinearWarmup
from lightning_collapse.losses.schedule import require_weight, weighted


def test_warmup_is_linear_and_bounded() -> None:
    warmup = LinearWarmup(weight=3.0, steps=10, start=5)
    assert [warmup(step) for step in (0, 5, 10, 15, 100)] == [0.0, 0.0, 1.5, 3.0, 3.0]
    switch = LinearWarmup(weight=3.0, steps=0, start=5)
    assert [switch(step) for step in (4, 5, 6)] == [0.0, 3.0, 3.0]


@pytest.mark.parametrize("argument", ["steps", "start"])
def test_negative_arguments_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must not be negative, got -1"):
        LinearWarmup(**({"weight": 1.0, "steps": 1} | {argument: -1}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"`weight` must be finite, got {value}"):
        LinearWarmup(value, 1)
    with pytest.raises(ValueError, match=f"`last` must be finite, got {value}"):
        LinearRamp(1.0, value, 1)
    with pytest.raises(ValueError, match=f"`weight` must be finite, got {value}"):
        require_weight(torch.tensor(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_and_function_weigh_alike(dtype: torch.dtype) -> None:
    value = torch.tensor(1.7, dtype=dtype)
    constant, function = weighted(0.25, value, 0), weighted(lambda step: step / 8, value, 2)
    assert constant.dtype == function.dtype == dtype
    assert torch.equal(constant, function)
