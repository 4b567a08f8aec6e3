"""Virgo initialization of graph networks: weights with which neither activations nor gradients shrink with depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_collapse.spectral.precision import accumulation_dtype

Direction = Literal["forward", "backward", "both"]


@torch.no_grad()
def virgo_variances(
    adjacency: Tensor,
    features: Tensor,
    hidden: int,
    depth: int,
    classes: int,
    direction: Direction = "both",
) -> Tensor:
    r"""Variance of the weights of each layer of a graph convolutional network with rectifiers.

    With :math:`c_l = \|\hat A^l h\|^2`, in the forward rule for the mean feature :math:`h` of each node

    .. math:: v_1 = \frac{2}{m_\text{in}}, \quad v_l = \frac{2}{m_\text{hid}} \frac{c_{l-1}}{c_l}

    and in the backward rule for :math:`h = \mathbf 1`, counted from the last layer, the same with
    :math:`N / ((C - 1) c_1)` for the first. Both together are their harmonic mean. The numbers and where they begin are
    those of the authors' code.

    Args:
        adjacency: Normalized adjacency :math:`\hat A` of the graph with self-loops, ``(N, N)``, dense or sparse.
        features: Of the nodes, ``(N, m_in)``.
        hidden: Width of hidden layers.
        depth: Layers ``L``.
        classes: Outputs of the last layer, 2 or more.
        direction: Which rule.

    Returns:
        Shape ``(L,)``, positive, first layer first.

    Raises:
        ValueError: On an argument out of range.

    References:
        Li et al., *On the Initialization of Graph Neural Networks*, ICML 2023. https://arxiv.org/abs/2312.02622

    Example:
        >>> virgo_variances(torch.eye(8), torch.ones(8, 4), hidden=16, depth=3, classes=2, direction="forward")
        tensor([0.5000, 0.1250, 0.1250], dtype=torch.float64)
    """
    if min(hidden, depth) < 1 or classes < 2 or direction not in get_args(Direction):
        raise ValueError(
            "`hidden` and `depth` must be at least 1, `classes` 2 and `direction` one of"
            f" {get_args(Direction)}, got {hidden}, {depth}, {classes} and {direction!r}."
        )
    wide = accumulation_dtype(features.device)
    means = features.to(wide).mean(dim=1)
    ahead, back = (_energies(adjacency.to(wide), start, depth) for start in (means, torch.ones_like(means)))
    first = torch.full_like(ahead[:1], 2 / features.shape[1])
    forward = torch.cat([first, 2 / hidden * ahead[:-1] / ahead[1:]])
    last = len(features) / ((classes - 1) * back[:1])
    backward = torch.cat([last, 2 / hidden * back[:-1] / back[1:]]).flip(0)
    if direction != "both":
        return forward if direction == "forward" else backward
    return 2 / (1 / forward + 1 / backward)


@torch.no_grad()
def virgo_(weights: Sequence[Tensor], variances: Tensor) -> None:
    """Draw the weights of the layers anew, uniformly with the given variances, see :func:`virgo_variances`.

    Before training: it waits for the device once.

    Args:
        weights: One for each layer, changed in place.
        variances: Shape ``(L,)``.

    Example:
        >>> layers = [nn.Linear(64, 64, bias=False) for _ in range(2)]
        >>> virgo_([layer.weight for layer in layers], torch.tensor([0.03, 0.03]))
        >>> 0.02 < layers[0].weight.var() < 0.04
        tensor(True)
    """
    for weight, variance in zip(weights, variances.tolist(), strict=True):
        nn.init.uniform_(weight, -((3 * variance) ** 0.5), (3 * variance) ** 0.5)


def _energies(adjacency: Tensor, start: Tensor, depth: int) -> Tensor:
    """Squared norms after one, two ... products, ``(L,)``."""
    column, found = start.unsqueeze(1), []
    for _ in range(depth):
        column = adjacency @ column
        found.append(column.square().sum())
    return torch.stack(found)
