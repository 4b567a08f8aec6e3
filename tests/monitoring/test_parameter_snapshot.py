"""How far tensors have gone: complex ones too, and codes of weights are no numbers."""

import pytest
import torch

from lightning_collapse.monitoring.parameter_snapshot import ParameterSnapshot, absolute_sums


def tensors():
    return {
        "codes": torch.ones(3, dtype=torch.uint8),
        "complex": torch.tensor([3 + 4j, 0]),
        "real": torch.tensor([1.0, -2.0]),
    }


@pytest.mark.parametrize(("order", "expected"), [(1, [0.0, 7.0, 3.0]), (2, [0.0, 25.0, 5.0])])
@pytest.mark.parametrize("move", [False, True])
def test_change(order, expected, move):
    named = tensors()
    snapshot = ParameterSnapshot({name: torch.zeros_like(tensor) for name, tensor in named.items()})
    torch.testing.assert_close(snapshot.change(named, order, move).tolist(), expected)
    torch.testing.assert_close(snapshot.change(named, order).tolist(), [0.0] * 3 if move else expected)


def test_state_goes_into_another():
    named = tensors()
    saved = ParameterSnapshot(named).state_dict()
    assert list(saved) == ["complex", "real"]
    other = ParameterSnapshot({name: torch.zeros_like(tensor) for name, tensor in named.items()}, saved)
    assert not other.change(named, 1).any()


def test_absolute_sums():
    assert absolute_sums(list(tensors().values())).tolist() == [0.0, 7.0, 3.0]
    assert absolute_sums([torch.ones(2, dtype=torch.int8)]).tolist() == [0.0]
    assert absolute_sums([]).tolist() == [0.0]
