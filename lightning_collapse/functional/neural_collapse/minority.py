"""Minority collapse: rare classes whose classifier rows fold onto one direction, or vanish."""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from lightning_collapse.functional.neural_collapse.class_means import in_input_precision, present_rows


@in_input_precision
def minority_cosine(rows: Tensor, counts: Tensor) -> Tensor:
    r"""Mean cosine between the rows of different minority classes.

    .. math:: \operatorname{mean}_{c \ne c'} \cos(w_c, w_{c'}), \quad
        c, c' \in \{k : 0 < n_k < \tfrac12 \max_j n_j\}

    As the imbalance of the optimum of the layer-peeled model grows, the classifier rows of all minority classes become
    parallel, and the classes cannot be told apart. The rows are not centered. Which classes are a minority is ours.
    Pairs of vanished rows count as parallel, pairs of which one has vanished as orthogonal.

    Args:
        rows: Of a classifier, or class means, shape ``(C, D)``.
        counts: Rows of data of each class, shape ``(C,)``; classes without are left out.

    Returns:
        0-dimensional; 1 (collapsed), 0 for orthogonal rows, ``-1 / (C - 1)`` in a simplex of ``C`` classes; NaN for
        fewer than two minority classes, so also where classes are balanced.

    Raises:
        ValueError: If a shape does not fit.

    References:
        Fang et al., *Minority collapse in imbalanced training*, PNAS 2021. https://arxiv.org/abs/2101.12699

    Example:
        >>> minority_cosine(torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([100, 10, 1]))
        tensor(1.)
    """
    rows, minority, _ = present_rows(rows, _rare(counts))
    length, size = torch.linalg.vector_norm(rows, dim=1), minority.sum()
    vanished = length <= torch.finfo(torch.float32).tiny
    directions = rows / torch.where(vanished, 1.0, length).unsqueeze(1)
    zeros = (vanished & minority).sum()
    # the square of a sum is the sum over all pairs
    own = (minority & ~vanished).sum()
    pairs = directions.sum(dim=0).square().sum() - own + zeros * (zeros - 1)
    return torch.where(size > 1, pairs / (size * (size - 1)), nan)


@in_input_precision
def minority_norm(rows: Tensor, counts: Tensor) -> Tensor:
    r"""Mean length of the rows of minority classes over that of the other classes.

    In the collapsed optimum of a bias-free model with squared loss it is about :math:`(n_c / n_{c'})^{1/4}` and, where
    classes are small enough, exactly zero: see :func:`~lightning_collapse.functional.orthogonal_frame`. A minority is
    what it is in :func:`minority_cosine`.

    Args:
        rows: Of a classifier, or class means, shape ``(C, D)``.
        counts: Rows of data of each class, shape ``(C,)``; classes without are left out.

    Returns:
        0-dimensional; 0 if the minority has vanished; NaN where there is none.

    Raises:
        ValueError: If a shape does not fit.

    References:
        Dang et al., ICML 2023. https://arxiv.org/abs/2301.00437

    Example:
        >>> minority_norm(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), torch.tensor([100, 10]))
        tensor(0.2500)
    """
    rows, present, _ = present_rows(rows, counts)
    length, minority = torch.linalg.vector_norm(rows, dim=1), _rare(counts) > 0
    small, large = (torch.where(which, length, 0.0).sum() / which.sum() for which in (minority, present & ~minority))
    return torch.where(minority.any(), small / large, nan)


def _rare(counts: Tensor) -> Tensor:
    """Counts of the classes that have less than half of what the largest has; zero for the others."""
    return torch.where(2 * counts < counts.max(), counts, torch.zeros_like(counts))
