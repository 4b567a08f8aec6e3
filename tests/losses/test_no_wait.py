"""No loss waits for the device, but those whose decompositions do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_collapse.callbacks import MaxNorm, ParsevalStep
from lightning_collapse.functional import align_gradients
from lightning_collapse.layers import (
    CosineClassifier,
    DirectPredictor,
    ETFClassifier,
    FedETFHead,
    NestedDropout,
    VBLLClassifier,
)
from lightning_collapse.losses import (
    VBLL,
    BalancedSoftmax,
    BatchHardTriplet,
    ConR,
    DotRegression,
    HAFrameLoss,
    JacobianHomeostasis,
    LongTailCollapse,
    SpreadLoss,
    SupCon,
)
from lightning_collapse.penalties import SoftOrthogonality
from lightning_collapse.spectral import neighbors
from lightning_collapse.utilities.registry import LOSSES
from tests.losses.cases import CASES


class NoWait(TorchDispatchMode):
    """Refuses what reads a tensor on the host, and constants that travel from there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"), func
        if func.name() == "aten::index.Tensor":
            assert all(index is None or index.dtype != torch.bool for index in args[1])
        return func(*args, **(kwargs or {}))


def test_it_would_be_seen() -> None:
    rows = torch.randn(4, 2)
    offences: list[Callable[[], Any]] = [
        lambda: rows[rows[:, 0] > 0],
        lambda: rows.sum().item(),
        lambda: rows.new_tensor([1.0]),
        lambda: bool(rows.sum() > 0),
    ]
    for offence in offences:
        with pytest.raises(AssertionError), NoWait():
            offence()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses(name: str) -> None:
    case, loss = CASES[name], LOSSES[name](**CASES[name].arguments)
    shape = next(iter(case.shapes.values()))
    inputs = [view.float().requires_grad_() for view in case.active(shape, loss.views)]
    with NoWait():
        loss(*inputs).backward()


def test_neighbours_on_an_accelerator() -> None:
    """A processor has nothing to wait for, and a search of its own."""
    rows = torch.randn(20, 3)
    with NoWait():
        neighbors._search(rows, 2, torch.arange(20), torch.zeros(20, dtype=torch.bool))


@pytest.mark.parametrize(
    "loss",
    [
        BalancedSoftmax([3, 2, 1]),
        LongTailCollapse(3, 3),
        DotRegression(ETFClassifier(3, 3), lengths="batch"),
        HAFrameLoss(ETFClassifier(3, 3)),
        VBLL(VBLLClassifier(3, 3, "dense"), 10),
        *(SupCon(), SpreadLoss(), BatchHardTriplet(), ConR(nn.Linear(3, 1))),
    ],
)
def test_losses_with_labels(loss: nn.Module) -> None:
    labels = torch.tensor([0, 1, 2, -100, 1, 1])
    features = [torch.randn(6, 3, requires_grad=True) for _ in range(loss.views)]
    with NoWait():
        loss(*features, labels).backward()


@pytest.mark.parametrize(
    "layer",
    [
        ETFClassifier(4, 3),
        FedETFHead(4, 3),
        DirectPredictor(4, "direct_copy"),
        CosineClassifier(4, 3),
        NestedDropout(4, sigma=2.0),
    ],
)
def test_layers(layer: nn.Module) -> None:
    features = torch.randn(6, 4, requires_grad=True)
    with NoWait():
        layer(features).sum().backward()
        if isinstance(layer, DirectPredictor):
            layer.update(features)


def test_projections() -> None:
    model, constraint = nn.Sequential(nn.Linear(4, 3)), MaxNorm(0.1)
    weights = dict(constraint.choose(model))
    constraint._radii = {"0": torch.tensor(0.1)}
    with NoWait(), torch.no_grad():
        constraint.apply("0", weights["0"])
        align_gradients([weights["0"]], [-weights["0"]])
    constraint = ParsevalStep(0.1, rows=0.5)
    weights = dict(constraint.choose(model))
    with NoWait(), torch.no_grad():
        constraint.apply("0", weights["0"])


@pytest.mark.parametrize(("kind", "released"), [("SO", False), ("MC", False), ("SRIP", False), ("SRIP", True)])
def test_orthogonality(kind: Any, released: bool) -> None:
    parameters = dict(nn.Linear(4, 3).named_parameters())
    penalty = SoftOrthogonality(1.0, kind, released)
    penalty.start(parameters)
    with NoWait():
        penalty.value(parameters)
        penalty.add_gradients(parameters)
        penalty.after_step(parameters)


def test_homeostasis() -> None:
    block, loss, state = nn.Linear(4, 4), JacobianHomeostasis(), torch.randn(2, 4)
    with NoWait():
        loss(block, state).backward()
