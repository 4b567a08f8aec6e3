"""What the README says of exact collapse: which losses part rows that are all equal."""

import pytest
import torch

from lightning_collapse.utilities.registry import LOSSES
from tests.losses.cases import CASES

PARTING = {"EffectiveRankHinge", "LogDetBarrier", "MMCR", "VISReg"}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_which_losses_part_equal_rows(name: str) -> None:
    case, loss = CASES[name], LOSSES[name](**CASES[name].arguments)
    rows, dim = next(iter(case.shapes.values()))
    views = [torch.linspace(1, 2, dim, dtype=torch.float64).repeat(rows, 1).requires_grad_() for _ in range(loss.views)]
    loss(*views).backward()
    gradient = torch.stack([view.grad for view in views if view.grad is not None])
    spread = (gradient - gradient.mean(dim=1, keepdim=True)).norm()
    assert (spread > 1e-6) == (name in PARTING)
