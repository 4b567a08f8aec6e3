"""Update geometry: how far an optimizer step goes, how stale its second moments are, and where it becomes unstable."""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision

_TINY = 1e-30


@full_precision
def adam_rms_ratio(gradient: Tensor, second_moment: Tensor, eps: float = 1e-8) -> Tensor:
    r"""Root mean square of the gradient over what Adam takes for its size: above 1 the second moments are behind.

    .. math:: \operatorname{RMS}_t = \sqrt{\operatorname{mean}\big(g_t^2 / \max(\hat v_t, \epsilon^2)\big)}, \qquad
        \hat v_t = v_t / (1 - \beta_2^t)

    with :math:`v_t` including :math:`g_t`, as the state of an optimizer has it after the step: before it the null would
    be above 1. A one-step jump of the
    gradient by ``J`` reads :math:`J / \sqrt{\beta_2 + (1 - \beta_2) J^2}` if its magnitude is constant, less if it is
    Gaussian. Loss spikes are reported 1 to 8 iterations after the ratio of a tensor exceeds about 2.3.

    Args:
        gradient: Of one tensor, any shape, as the optimizer was given it.
        second_moment: :math:`\hat v_t`, the state ``exp_avg_sq`` corrected for its bias, same shape.
        eps: The optimizer's :math:`\epsilon`.

    Returns:
        0-dimensional, from 0 to :math:`1 / \sqrt{1 - \beta_2}`; see :func:`adam_rms_null`.

    References:
        Wortsman et al., *Stable and low-precision training for large-scale vision-language models*, NeurIPS 2023,
        https://arxiv.org/abs/2304.13013.

    Example:
        >>> adam_rms_ratio(torch.full((4,), 2.0), torch.ones(4))
        tensor(2.)
    """
    return (gradient.square() / second_moment.clamp_min(max(eps**2, _TINY))).mean().sqrt()


@lru_cache(maxsize=64)
def adam_rms_null(beta2: float) -> float:
    r"""What :func:`adam_rms_ratio` reads of independent Gaussian gradients of constant size, after many steps.

    .. math:: E\, g_t^2 / v_t = \int_0^\infty \frac{ds}{1 + 2 s w_0} \prod_{k \ge 0} \frac{1}{\sqrt{1 + 2 s w_k}},
        \quad w_k = (1 - \beta_2) \beta_2^k

    from :math:`1 / v = \int e^{-s v} ds`, exactly; the root of it for a tensor of many entries.

    Args:
        beta2: Decay :math:`\beta_2`, above 0 and below 1.

    Raises:
        ValueError: If it is out of range.

    Example:
        >>> [round(adam_rms_null(beta2), 3) for beta2 in (0.9, 0.99)]
        [0.96, 0.995]
    """
    if not 0 < beta2 < 1:
        raise ValueError(f"`beta2` must be above 0 and below 1, got {beta2}.")
    terms = min(int(40 / (1 - beta2)), 100_000)
    weights = (1 - beta2) * beta2 ** torch.arange(terms, dtype=torch.float64)
    # in the logarithm of s the integrand is smooth, and vanishes at both ends
    log_s = torch.linspace(-18, 12, 600, dtype=torch.float64)
    values = [log - 0.5 * torch.log1p(2 * log.exp() * weights).sum() for log in log_s.unbind()]
    integrand = torch.stack(values).exp() / (1 + 2 * log_s.exp() * weights[0])
    return sqrt(float(torch.trapezoid(integrand, log_s)))


def swallowed_fraction(before: Tensor, after: Tensor, gradient: Tensor | None = None) -> Tensor:
    """Share of the entries of a tensor that an optimizer step has left as they were, because its format is too coarse.

    Args:
        before: The weights before the step, any shape.
        after: After it.
        gradient: Only entries where it is not zero count; all without it.

    Returns:
        0-dimensional, 0 to 1; NaN if no entry counts. In ``bfloat16`` steps of one size of 1e-2, 1e-3, 3e-4 and 1e-4 of
        the weights are swallowed in 0, 62 to 70, 90 to 92 and 96 to 98 % of the entries.

    Example:
        >>> weights = torch.tensor([1.0, 1.0, 2.0, 1.0], dtype=torch.bfloat16)
        >>> swallowed_fraction(weights, weights + torch.tensor([0.5, 1e-3, 1e-3, 0.5], dtype=torch.bfloat16))
        tensor(0.5000)
    """
    asked = torch.ones_like(before, dtype=torch.bool) if gradient is None else gradient != 0
    return ((before == after) & asked).sum() / asked.sum()


def stability_edge(
    learning_rate: float, momentum: float = 0.0, kind: Literal["heavy ball", "average"] = "heavy ball"
) -> float:
    r"""Largest curvature that an optimizer can follow downhill: beyond it a step overshoots by more each time.

    .. math:: \frac{2 + 2 \beta}{\eta} \;\text{(heavy ball)}, \qquad \frac{2 (1 + \beta)}{(1 - \beta)\, \eta}
        \;\text{(moving average)}

    :math:`2 / \eta` for gradient descent, :math:`38 / \eta` for Adam with :math:`\beta_1 = 0.9`, there of the
    preconditioned curvature. To hover at the edge is normal; to leave it upwards is not.

    Args:
        learning_rate: :math:`\eta`, positive.
        momentum: :math:`\beta`, at least 0 and below 1.
        kind: Whether the momentum is a sum, as of ``SGD``, or an average, as of ``Adam``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Cohen et al., *Adaptive gradient methods at the edge of stability*, 2022, https://arxiv.org/abs/2207.14484.

    Example:
        >>> [round(edge, 6) for edge in (stability_edge(1), stability_edge(1, 0.9), stability_edge(1, 0.9, "average"))]
        [2.0, 3.8, 38.0]
    """
    if not learning_rate > 0 or not 0 <= momentum < 1 or kind not in ("heavy ball", "average"):
        raise ValueError(
            "`learning_rate` must be positive, `momentum` at least 0 and below 1 and `kind` 'heavy ball' or 'average',"
            f" got {learning_rate}, {momentum} and {kind!r}."
        )
    edge = (2 + 2 * momentum) / learning_rate
    return edge / (1 - momentum) if kind == "average" else edge
