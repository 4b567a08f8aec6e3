"""Losses without labels that no battery of losses has: what a process reads of a part of a batch, and its gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_collapse.losses import (
    DeepSVDD,
    PairWeights,
    flip_consistency,
    interpolation_consistency,
    sdc_terms,
    token_relation_terms,
)
from lightning_collapse.utilities.distributed import world_size

ROWS = 12


def readings(split: slice) -> dict[str, Any]:
    """Values, and gradients as data-parallel training averages them, of some of the rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, 8, generator=generator, dtype=torch.float64)
    six = torch.randn(6, ROWS, 2, 5, 3, generator=generator, dtype=torch.float64)
    weight = (torch.randn(8, 8, generator=generator, dtype=torch.float64) / 8).requires_grad_()

    def network(x: Tensor) -> Tensor:
        return (x.flatten(1) @ weight).tanh()

    mine, tokens = rows[split], six[:, split]
    student = [x * weight[0, 0] for x in tokens[:3]]
    image = mine.view(-1, 1, 1, 8).expand(-1, 1, 8, 8).mean(dim=2, keepdim=True)
    svdd = {"soft": DeepSVDD(soft_boundary=0.3), "Mahalanobis": DeepSVDD(momentum=0.9)}
    values = {
        "SDC": sum(sdc_terms(mine, mine @ weight, scope="global").values()),
        "tokens": sum(token_relation_terms(*student, *tokens[3:]).values()),
        **{name: sum(loss(factor * mine @ weight + 3) for factor in (1, 2)) for name, loss in svdd.items()},
    }
    found = {name: (value.detach(), _averaged(value, weight)) for name, value in values.items()}
    drawn = interpolation_consistency(network, mine, mine.flip(1)), flip_consistency(network, image)
    found["drawn"] = torch.stack(drawn).detach()  # of each process's own draws: the same number on both
    return found


def pair_weights(split: slice) -> list[Tensor]:
    """Weights of all samples after two epochs of which this process saw a part, and what it remembers."""
    losses = torch.ones(2, ROWS) + torch.arange(ROWS) / 100
    losses[:, 3] = 9.0
    weights = PairWeights(ROWS, 1, high=2.0)
    for epoch in range(2):
        weights(losses[epoch, split], torch.arange(ROWS)[split])
        weights.end_epoch()
    return [weights.eval()(losses[1], torch.arange(ROWS)), weights.memory, weights.population]


def _averaged(value: Tensor, weight: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(value, weight)
    if world_size() > 1:
        dist.all_reduce(grad)
    return grad / world_size()
