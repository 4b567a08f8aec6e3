"""Mode strengths: how much of each direction of a linear task a deep linear network has learned, and when."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision


class ModeStrengths(NamedTuple):
    """By mode, strongest first, each of shape ``(K,)``.

    Attributes:
        learned: What the network has of each mode.
        target: What there is to learn, the singular values of the task.
    """

    learned: Tensor
    target: Tensor


@torch.no_grad()
@full_precision
def mode_strengths(weight: Tensor, cross_covariance: Tensor) -> ModeStrengths:
    r"""Strengths :math:`a_i = u_i^\top W v_i` in the singular basis of the input-output correlation of the task.

    .. math:: \Sigma_{yx} = \tfrac1n Y^\top X = \sum_i s_i u_i v_i^\top

    With whitened inputs gradient descent takes :math:`a_i` from 0 to :math:`s_i` in a sigmoid, strong modes first;
    between two of them the loss has a plateau. See :func:`mode_strength_at`.

    Args:
        weight: The map as a whole, shape ``(o, i)``: the product of the layers, last one first.
        cross_covariance: Shape ``(o, i)``.

    Returns:
        Strengths and targets, ``K = min(o, i)``.

    Raises:
        ValueError: If the shapes differ.

    References:
        Saxe, McClelland & Ganguli, *Exact solutions to the nonlinear dynamics of learning in deep linear neural
        networks*, ICLR 2014. https://arxiv.org/abs/1312.6120

    Example:
        >>> task = torch.diag(torch.tensor([4.0, 2.0]))
        >>> mode_strengths(torch.diag(torch.tensor([3.0, 0.5])), task)
        ModeStrengths(learned=tensor([3.0000, 0.5000]), target=tensor([4., 2.]))
    """
    if weight.ndim != 2 or weight.shape != cross_covariance.shape:
        raise ValueError(
            f"`weight` and `cross_covariance` must have one shape (o, i), got {tuple(weight.shape)} and"
            f" {tuple(cross_covariance.shape)}."
        )
    left, target, right = torch.linalg.svd(cross_covariance, full_matrices=False)
    return ModeStrengths(((left.T @ weight) * right).sum(dim=1), target)


def mode_strength_at(times: Sequence[float] | Tensor, target: float, start: float, tau: float = 1.0) -> Tensor:
    r"""Strength of a mode of a two-layer linear network over time, from balanced weights aligned with it.

    .. math:: a(t) = \frac{s\, e^{2 s t / \tau}}{e^{2 s t / \tau} - 1 + s / a_0}

    solves :math:`\tau \dot a = 2 a (s - a)`.

    Args:
        times: In units of ``tau``'s: steps, where ``tau`` is one over the learning rate of :math:`\tfrac12` the mean
            squared error.
        target: Its singular value ``s``.
        start: ``a_0``, above 0 and below ``target``.
        tau: Time constant.

    Returns:
        ``float64``, as many as ``times``.

    Raises:
        ValueError: If ``start`` is not between 0 and ``target``.

    References:
        Saxe et al., ICLR 2014. https://arxiv.org/abs/1312.6120

    Example:
        >>> mode_strength_at([0.0, mode_half_time(2.0, 0.01)], target=2.0, start=0.01)
        tensor([0.0100, 1.0000], dtype=torch.float64)
    """
    _check(target, start)
    t = torch.as_tensor(times, dtype=torch.float64)
    return target / (1 + (target / start - 1) * (-2 * target * t / tau).exp())


def mode_half_time(target: float, start: float, tau: float = 1.0) -> float:
    r"""When a mode has half of its strength: :math:`\frac{\tau}{2 s} \ln(s / a_0 - 1)`; see :func:`mode_strength_at`.

    Args:
        target: Its singular value ``s``.
        start: ``a_0``, above 0 and below ``target``.
        tau: Time constant.

    Returns:
        The time; negative for a mode that begins beyond its half.

    Raises:
        ValueError: If ``start`` is not between 0 and ``target``.

    Example:
        >>> [round(s * mode_half_time(s, 1e-6), 2) for s in (4.0, 2.0, 1.0, 0.5)]
        [7.6, 7.25, 6.91, 6.56]
    """
    _check(target, start)
    return tau / (2 * target) * log(target / start - 1)


def _check(target: float, start: float) -> None:
    if not 0 < start < target:
        raise ValueError(f"`start` must be above 0 and below `target`, {target}, got {start}.")
