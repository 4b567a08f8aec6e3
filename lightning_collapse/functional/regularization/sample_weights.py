"""Decorrelating sample weights (SGFD, StableNet): weights under which features depend less on one another."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_not_negative, require_positive, require_whole

MOMENTUM = 0.9


class DecorrelatingWeights(NamedTuple):
    r"""Weights of samples, and what they bring and cost.

    Attributes:
        weights: Shape ``(N,)``, positive, with sum 1: ``(weights * losses).sum()`` is the loss.
        effective_samples: :math:`1 / \sum_i w_i^2`, between 1 and ``N``. Log it: what decorrelates best may be a few
            samples alone.
        covariance: What is left of the covariances, over what equal weights have; 1 where they have none.
    """

    weights: Tensor
    effective_samples: Tensor
    covariance: Tensor


@full_precision
def decorrelating_weights(
    features: Tensor,
    penalty: float = 10.0,
    saliency: Tensor | None = None,
    n_fourier: int = 5,
    steps: int = 20,
    lr: float = 0.1,
    seed: int = 0,
) -> DecorrelatingWeights:
    r"""Weights of samples under which nonlinear functions of any two features covary less [1], [2].

    .. math::
        \min_v \; \frac{B(w)}{B(1/N)} + \lambda \sum_i w_i^2, \qquad
        B(w) = \sum_{i \ne j} S_{ij} \|\operatorname{Cov}_w(\phi(z_i), \phi(z_j))\|_F^2, \quad
        w = \operatorname{softmax}(v)

    by gradient descent with momentum from equal weights, with a tenth of the rate in the second half.
    :math:`\phi(z) = \sqrt 2 \cos(a z + b)` are random Fourier features of the standardized feature,
    :math:`a \sim N(0, 1)` and :math:`b \sim U(0, 2 \pi)`.

    Two things differ from what was released. The code of StableNet [2], and what was made of it, rescales the phases
    to a quarter of a turn, by the minimum and maximum over features: these are no random Fourier features any more. And
    that of [1] divides both terms by their present values, which is to descend
    :math:`\log B + \lambda \log \sum_i w_i^2`: one sample alone, which covaries with nothing, is its minimum for
    every λ, and only the few steps are in the way. Here the penalty has a minimum inside.

    Without a penalty the covariances fall furthest, and few samples are left. A stored batch is put beside the features
    with ``torch.cat``: take the weights of the present one, divided by their sum.

    Args:
        features: Shape ``(N, D)``, of this process; no gradient flows to them. One that is constant has no part.
        penalty: λ; 10 leaves about half of 64 samples, 1000 almost all.
        saliency: Weights ``S`` of pairs of features, shape ``(D, D)``, or of features, ``(D,)``, whose products are
            taken; all 1 by default. In [1] the softmax of how much the task's gradient sees a feature. A factor of all
            of them changes nothing.
        n_fourier: Random Fourier features of each feature; 5 in [1].
        steps: Of the descent.
        lr: Of its first half, times :math:`N / (1 + 2 \lambda / N)`, so that it means the same for any batch and λ.
        seed: Of the random features: a number that changes from step to step, the same on all processes. The random
            state of the training is left alone.

    Returns:
        Weights without gradient, at least ``float32``. It takes about ``steps * N * (D * n_fourier)**2`` products.

    Raises:
        ValueError: If an argument is out of range, or shapes do not fit.

    References:
        [1] Huang et al., *Learning generalizable agents via saliency-guided features decorrelation* (SGFD), NeurIPS
        2023. https://arxiv.org/abs/2310.05086

        [2] Zhang et al., *Deep stable learning for out-of-distribution generalization*, CVPR 2021.
        https://arxiv.org/abs/2104.07876

    Example:
        >>> shared = torch.linspace(-1, 1, 32)
        >>> found = decorrelating_weights(torch.stack([shared, shared**3], dim=1))
        >>> bool(found.covariance < 1), bool(found.effective_samples < 32), round(found.weights.sum().item(), 4)
        (True, True, 1.0)
    """
    require_not_negative(penalty=penalty)
    require_positive(lr=lr)
    require_whole(1, n_fourier=n_fourier, steps=steps)
    phases = _fourier_features(features, n_fourier, seed)
    pairs = _pairs(features, saliency).repeat_interleave(n_fourier, 0).repeat_interleave(n_fourier, 1)
    equal = torch.full_like(phases[:, 0], 1 / len(phases))
    before = _dependence(phases, equal, pairs)
    scale = before.clamp_min(torch.finfo(before.dtype).tiny)
    logits, velocity = torch.zeros_like(equal), torch.zeros_like(equal)
    rate = lr * len(phases) / (1 + 2 * penalty / len(phases))
    for step in range(steps):
        with torch.enable_grad():
            logits.requires_grad_()
            weights = logits.softmax(dim=0)
            objective = _dependence(phases, weights, pairs) / scale + penalty * weights.square().sum()
            [gradient] = torch.autograd.grad(objective, logits)
        velocity = MOMENTUM * velocity + gradient
        logits = logits.detach() - rate * (1.0 if step < steps / 2 else 0.1) * velocity
    weights = logits.softmax(dim=0)
    left = torch.where(before > 0, _dependence(phases, weights, pairs) / scale, 1.0)
    return DecorrelatingWeights(weights, 1 / weights.square().sum(), left)


def _fourier_features(features: Tensor, n_fourier: int, seed: int) -> Tensor:
    """Shape ``(N, D * n_fourier)``."""
    if features.ndim != 2 or len(features) < 2 or not features.is_floating_point():
        raise ValueError(
            f"`features` must be floating point of shape (N, D) with two rows or more, got {features.dtype}"
            f" {tuple(features.shape)}. Flatten positions first."
        )
    rows = features.detach() - features.detach().mean(dim=0)
    rows = rows / rows.square().mean(dim=0).sqrt().clamp_min(torch.finfo(rows.dtype).tiny)
    generator = torch.Generator(rows.device).manual_seed(seed)
    scale, offset = rows.new_empty(2, rows.shape[1], n_fourier)
    scale.normal_(generator=generator)
    offset.uniform_(0, 2 * math.pi, generator=generator)
    waves: Tensor = (rows.unsqueeze(2) * scale + offset).cos()
    return math.sqrt(2) * waves.flatten(1)


def _pairs(features: Tensor, saliency: Tensor | None) -> Tensor:
    dim = features.shape[1]
    pairs = features.new_ones(dim, dim) if saliency is None else saliency.detach().to(features)
    if pairs.shape == (dim,):
        pairs = torch.outer(pairs, pairs)
    if pairs.shape != (dim, dim):
        raise ValueError(
            f"`saliency` must have the shape ({dim},) or ({dim}, {dim}), one for each feature or pair of features, got"
            f" {tuple(pairs.shape)}."
        )
    return pairs - torch.diag(pairs.diagonal())


def _dependence(phases: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    centered = phases - weights @ phases
    return (pairs * ((weights.unsqueeze(1) * centered).T @ centered).square()).sum()
