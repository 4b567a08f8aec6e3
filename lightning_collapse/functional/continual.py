"""Continual-learning metrics: what a sequence of tasks has brought and cost, from the accuracies after every task."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


@full_precision
def average_accuracy(accuracies: Tensor) -> Tensor:
    r"""Mean accuracy on the tasks so far, after the last of them.

    .. math:: \mathrm{ACC} = \frac1k \sum_{j=1}^{k} R_{k,j}

    Args:
        accuracies: :math:`R`, shape ``(k, T)`` with ``T >= k``: in row ``i`` and column ``j`` the accuracy on task
            ``j`` after training on tasks 0 to ``i``; NaN where unknown. Any score of which more is better will do.

    Returns:
        0-dimensional; NaN where a number that it needs is unknown, like everything here.

    Raises:
        ValueError: If the shape does not fit.

    References:
        Lopez-Paz & Ranzato, *Gradient episodic memory*, NeurIPS 2017. https://arxiv.org/abs/1706.08840

    Example:
        >>> average_accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.8]]))
        tensor(0.7000)
    """
    return _seen(accuracies)[-1].mean()


@full_precision
def learning_accuracy(accuracies: Tensor) -> Tensor:
    r"""Mean accuracy on every task right after it was learned.

    .. math:: \mathrm{LA} = \frac1k \sum_{j=1}^{k} R_{j,j}

    Args:
        accuracies: As for :func:`average_accuracy`.

    Returns:
        0-dimensional; a method that forgets nothing because it learns nothing reads low.

    Raises:
        ValueError: If the shape does not fit.

    References:
        Riemer et al., *Learning to learn without forgetting by maximizing transfer and minimizing interference*,
        ICLR 2019. https://arxiv.org/abs/1810.11910

    Example:
        >>> learning_accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.8]]))
        tensor(0.8500)
    """
    return _seen(accuracies).diagonal().mean()


@full_precision
def backward_transfer(accuracies: Tensor) -> Tensor:
    r"""Mean change of the accuracy on earlier tasks since each was learned.

    .. math:: \mathrm{BWT} = \frac1{k-1} \sum_{j=1}^{k-1} R_{k,j} - R_{j,j}

    Args:
        accuracies: As for :func:`average_accuracy`.

    Returns:
        0-dimensional; negative where later tasks have harmed earlier ones; NaN for a single task.

    Raises:
        ValueError: If the shape does not fit.

    References:
        Lopez-Paz & Ranzato, *Gradient episodic memory*, NeurIPS 2017. https://arxiv.org/abs/1706.08840

    Example:
        >>> backward_transfer(torch.tensor([[0.9, 0.1], [0.6, 0.8]]))
        tensor(-0.3000)
    """
    seen = _seen(accuracies)
    return (seen[-1] - seen.diagonal())[:-1].mean()


@full_precision
def forward_transfer(accuracies: Tensor, baseline: Tensor) -> Tensor:
    r"""Mean gain on every task by those before it, over a model that has learned nothing.

    .. math:: \mathrm{FWT} = \frac1{k-1} \sum_{j=2}^{k} R_{j-1,j} - b_j

    Args:
        accuracies: As for :func:`average_accuracy`; the numbers just above the diagonal are needed.
        baseline: :math:`b`, accuracies at random initialization, shape ``(T,)``.

    Returns:
        0-dimensional; NaN for a single task.

    Raises:
        ValueError: If a shape does not fit.

    References:
        Lopez-Paz & Ranzato, *Gradient episodic memory*, NeurIPS 2017. https://arxiv.org/abs/1706.08840

    Example:
        >>> forward_transfer(torch.tensor([[0.9, 0.2], [0.6, 0.8]]), torch.tensor([0.1, 0.1]))
        tensor(0.1000)
    """
    seen = _seen(accuracies)
    return (seen.diagonal(1) - _per_task(baseline, accuracies, "baseline")[1 : len(seen)]).mean()


@full_precision
def forgetting(accuracies: Tensor) -> Tensor:
    r"""Mean fall of the accuracy on earlier tasks from the best it has been.

    .. math:: F = \frac1{k-1} \sum_{j=1}^{k-1} \Big(\max_{l < k} R_{l,j} - R_{k,j}\Big)

    The maximum is over what is known, the time before the task was learned included, as published.

    Args:
        accuracies: As for :func:`average_accuracy`.

    Returns:
        0-dimensional, -1 to 1: negative where later tasks have helped; at two tasks ``-backward_transfer``, unless
        transfer made the second reading of a task its best; NaN for a single task.

    Raises:
        ValueError: If the shape does not fit.

    References:
        Chaudhry et al., *Riemannian walk for incremental learning*, ECCV 2018. https://arxiv.org/abs/1801.10112

    Example:
        >>> forgetting(torch.tensor([[0.7, 0.1, 0.1], [0.9, 0.8, 0.1], [0.6, 0.7, 0.9]]))
        tensor(0.2000)
    """
    seen = _seen(accuracies)
    before = seen[:-1, :-1]
    if not len(before):
        return seen.new_full((), torch.nan)
    known = ~before.isnan()
    best = torch.where(known, before, -torch.inf).amax(dim=0)
    return (torch.where(known.any(dim=0), best, torch.nan) - seen[-1, :-1]).mean()


@full_precision
def intransigence(accuracies: Tensor, reference: Tensor) -> Tensor:
    r"""Mean of what each task falls short of a reference when it is learned.

    .. math:: I = \frac1k \sum_{j=1}^{k} a^*_j - R_{j,j}

    The paper defines it per task, :math:`I_k = a^*_k - R_{k,k}`; this is the mean over the tasks so far.

    Args:
        accuracies: As for :func:`average_accuracy`.
        reference: :math:`a^*`, shape ``(T,)``: accuracy of a model trained on all data up to a task together.

    Returns:
        0-dimensional; negative where the sequence learns better than the reference.

    Raises:
        ValueError: If a shape does not fit.

    References:
        Chaudhry et al., *Riemannian walk for incremental learning*, ECCV 2018. https://arxiv.org/abs/1801.10112

    Example:
        >>> intransigence(torch.tensor([[0.9, 0.1], [0.6, 0.8]]), torch.tensor([0.9, 0.9]))
        tensor(0.0500)
    """
    seen = _seen(accuracies)
    return (_per_task(reference, accuracies, "reference")[: len(seen)] - seen.diagonal()).mean()


def _seen(accuracies: Tensor) -> Tensor:
    """The columns of tasks that were learned."""
    if accuracies.ndim != 2 or not 1 <= len(accuracies) <= accuracies.shape[1]:
        raise ValueError(
            f"`accuracies` must have shape (k, T) with 1 <= k <= T, a row per task learned, got"
            f" {tuple(accuracies.shape)}."
        )
    return accuracies[:, : len(accuracies)]


def _per_task(values: Tensor, accuracies: Tensor, name: str) -> Tensor:
    if values.shape != accuracies.shape[1:]:
        raise ValueError(
            f"`{name}` must have shape ({accuracies.shape[1]},), a number per task, got {tuple(values.shape)}."
        )
    return values
