"""Logit-level distillation: logits as a teacher has them, class by class, which probabilities do not tell."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of, require_positive

Form = Literal["log_cosh", "binary_kl"]


@full_precision
def logit_distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 2.0, form: Form = "log_cosh"
) -> Tensor:
    r"""A match of each logit with that of a teacher, for a head of its own.

    .. math:: \tfrac{T^2}{N} \sum_{ic} \log \cosh \frac{s_{ic} - t_{ic}}{2 T}
        = \tfrac{T^2}{N} \sum_{ic} \operatorname{KL}\big(\tfrac12 \,\|\, \sigma((s_{ic} - t_{ic}) / T)\big)

    near :math:`(s - t)^2 / 8` for small gaps, with a slope of ``T / 2`` at most, so that outliers do not rule. On one
    head with the cross-entropy it does harm: see :class:`~lightning_collapse.layers.AuxiliaryHead`, and
    :func:`~lightning_collapse.functional.align_gradients` for the features.

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        logits: Of the student, shape ``(N, C)``; ``N`` may differ between processes.
        teacher_logits: The same shape, constants; they get no gradient.
        temperature: ``T``; 2 in the authors' scripts.
        form: ``"log_cosh"`` as the authors' code trains, there with sigmoids that are clamped; ``"binary_kl"`` for the
            paper's :math:`\operatorname{KL}(\sigma(t / T) \,\|\, \sigma(s / T))`, whose pull fades where the teacher is
            sure.

    Returns:
        Scalar, at least ``float32``, 0 or more, the value on the global batch.

    Raises:
        ValueError: If one is not a matrix, their shapes differ, an argument is out of range, or if there is no row over
            all processes.

    References:
        Yang et al., *Dual-Head Knowledge Distillation*, 2024. https://arxiv.org/abs/2411.08937

    Example:
        >>> student, teacher = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> logit_distillation_loss(student, teacher)  # 4 log cosh 1
        tensor(1.7351)
    """
    require_positive(temperature=temperature)
    require_one_of(get_args(Form), form=form)
    pair = {"logits": logits, "teacher_logits": teacher_logits.detach()}
    student, teacher = (view / temperature for view in separate_views("logit_distillation_loss", **pair))
    if form == "log_cosh":
        half = (student - teacher) / 2
        values = torch.logaddexp(half, -half) - math.log(2)
    else:
        both = torch.stack([teacher, -teacher]), torch.stack([student, -student])
        log_p, log_q = (logsigmoid(signs) for signs in both)
        values = (log_p.exp() * (log_p - log_q)).sum(dim=0)
    return temperature**2 * mean_of_rows("logit_distillation_loss", values.sum(dim=1, keepdim=True)).squeeze(0)
