"""The tables of measures and losses."""

from collections.abc import Iterator
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.functional import expected_under_isotropy
from lightning_collapse.spectral import spectrum_of
from lightning_collapse.utilities.registry import (
    LOSSES,
    MEASURES,
    Measure,
    get_measure,
    register_loss,
    register_measure,
)


@pytest.fixture(autouse=True)
def _tables() -> Iterator[None]:
    measures, losses = dict(MEASURES), dict(LOSSES)
    yield
    for table, before in ((MEASURES, measures), (LOSSES, losses)):
        table.clear()
        table.update(before)


def top_value(singular_values: Tensor) -> Tensor:
    return singular_values[..., 0]


def test_plain_registration_has_the_defaults() -> None:
    assert register_measure(top_value) is top_value
    measure = get_measure("top_value")
    assert measure == Measure("top_value", top_value)
    assert (measure.kind, measure.spectrum, measure.record, measure.scale_free) == ("spectrum", "centered", False, True)
    assert measure.curve == "top_value"


def test_registration_with_facts() -> None:
    fn = register_measure(range="0 to 1", key="top_1", spectrum="raw", null=lambda n, d: n + d)(top_value)
    assert fn is top_value
    measure = get_measure("top_value")
    assert measure.curve == "top_1"
    assert measure.spectrum == "raw"
    assert expected_under_isotropy("top_value", 3, 4) == 7


def test_what_a_measure_of_a_spectrum_is_given() -> None:
    record = spectrum_of(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    register_measure(top_value)
    assert get_measure("top_value").of_spectrum(record) == record.singular_values[0]

    @register_measure(record=True)
    def rows_and_features(spectrum):
        return spectrum.count * 100 + spectrum.dim

    assert get_measure("rows_and_features").of_spectrum(record) == 904


def test_a_users_measure_has_a_null() -> None:
    register_measure(top_value)
    null = expected_under_isotropy("top_value", 400, 40)
    tops = [
        spectrum_of(torch.randn(400, 40, generator=torch.Generator().manual_seed(seed))).singular_values[0].item()
        for seed in range(10)
    ]
    assert null == pytest.approx(sum(tops) / 10, rel=0.03)


def test_a_name_is_given_once() -> None:
    register_measure(top_value)

    def other(singular_values: Tensor) -> Tensor:
        return singular_values.sum(dim=-1)

    other.__name__ = "top_value"
    with pytest.raises(ValueError, match=r"`top_value` is already registered\. Choose another name"):
        register_measure(other)
    assert get_measure("top_value").fn is top_value


def test_the_same_function_may_register_twice() -> None:
    # a notebook cell that runs again makes a new object of the same name; the last one counts
    for scale in (1.0, 2.0):

        @register_measure
        def scaled(singular_values: Tensor, scale: float = scale) -> Tensor:
            return scale * singular_values[..., 0]

    assert get_measure("scaled").fn(torch.ones(1)) == 2


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown measure 'efective_rank'\. Choose from: .*effective_rank.*srank"):
        get_measure("efective_rank")


def test_measures_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        get_measure("effective_rank").name = "x"


def test_losses() -> None:
    class MyLoss(nn.Module):
        pass

    assert register_loss(MyLoss) is MyLoss
    assert LOSSES["MyLoss"] is MyLoss

    other = type("MyLoss", (nn.Module,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match="`MyLoss` is already registered"):
        register_loss(other)
