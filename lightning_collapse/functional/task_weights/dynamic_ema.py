"""Dynamic exponential moving average (LCIA): how much of the old average stays, from gradients and distances."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision

Form = Literal["paper", "released"]
FORMS = ("paper", "released")


@full_precision
def dynamic_ema_decay(
    gradient: Tensor, gradient_change: Tensor, weight_change: Tensor, distance: Tensor, form: Form = "paper"
) -> tuple[Tensor, Tensor]:
    r"""The factor of the old average in :math:`\theta^*_t = \beta_t \theta^*_{t-1} + (1 - \beta_t) \theta_t`.

    .. math:: \beta_t = \frac{(\|g_t\|_1 + 1)\, \|\theta_t - \theta_{t-1}\|_1}
        {\|\theta_t - \theta^*_{t-1}\|_1\, \|g_t - g_{t-1}\|_1}, \qquad
        1 - \beta_t = \frac{2\, (\|g_t\|_1 + 1)}{\|\theta_t - \theta^*_{t-1}\|_1\, \|g_t - g_{t-1}\|_1}
        \;\text{(released)}

    The paper's is the stationary point of :math:`L(\theta^*_t) - L(\theta_t) + \theta^*_t - \theta^*_{t-1}` over
    :math:`\beta`, to second order in one dimension, with the curvature from a difference quotient. The authors' code
    lacks the step in that quotient, and gives the **new** weights what it finds. Where a value is not between 0 and 1,
    the old average gets 0.99, in both. The 1 is added to a norm of gradients, so the factor depends on the scale of the
    loss and on the number of entries.

    Args:
        gradient: :math:`\|g_t\|_1` per tensor, any shape.
        gradient_change: :math:`\|g_t - g_{t-1}\|_1`, same shape.
        weight_change: :math:`\|\theta_t - \theta_{t-1}\|_1`, same shape; not used by the released form.
        distance: :math:`\|\theta_t - \theta^*_{t-1}\|_1`, same shape.
        form: ``"paper"`` or ``"released"``.

    Returns:
        The factors, above 0 and below 1, and where 0.99 was taken.

    Raises:
        ValueError: If ``form`` is another.

    References:
        Qiao et al., *Large continual instruction assistant*, ICML 2025, https://arxiv.org/abs/2410.10868; released
        form: the code at https://github.com/JingyangQiao/CoIN.

    Example:
        >>> one = torch.ones(())
        >>> dynamic_ema_decay(one, 4 * one, one, one), dynamic_ema_decay(one, one, one, one)
        ((tensor(0.5000), tensor(False)), (tensor(0.9900), tensor(True)))
    """
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {FORMS}, got {form!r}.")
    step = weight_change if form == "paper" else 2.0
    share = (gradient + 1) / distance * (step / gradient_change)
    usable = (share > 0) & (share < 1)
    decay = share if form == "paper" else 1 - share
    return torch.where(usable, decay, 0.99), ~usable
