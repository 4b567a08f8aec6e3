"""Training-free calibration (TEEN): prototypes of few samples are drawn to those of base classes that they resemble."""

import torch
from torch import Tensor

from lightning_collapse.functional.prototypes.scores import prototype_logits, require_rows, unit_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_positive


@full_precision
def teen_calibrate(new: Tensor, base: Tensor, share: float = 0.5, temperature: float = 16.0) -> Tensor:
    r"""Move new prototypes towards a mean of base prototypes, weighted by likeness.

    .. math:: (1 - a)\, \mu_c + a\, \frac{m_c}{\|m_c\|}, \quad
        m_c = \sum_b w_{cb} \mu_b, \quad w_c = \operatorname{softmax}_b(\tau \cos(\mu_c, \mu_b))

    Args:
        new: Prototypes of new classes, shape ``(K, D)``. The authors' code has those of length 1, as ``base``.
        base: Prototypes of base classes, shape ``(B, D)``; rows with NaN have no weight.
        share: :math:`a`, from 0 (nothing moves) to 1; 0.5 suits CUB, CIFAR-100 has 0.1.
        temperature: :math:`\tau`, 16 as published; towards infinity the nearest base prototype alone is left.

    Returns:
        Shape ``(K, D)``; NaN where ``base`` has no prototype at all.

    Raises:
        ValueError: If a shape does not fit, or an argument is out of range.

    References:
        Wang et al., *Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration*, NeurIPS 2023.
        https://arxiv.org/abs/2312.05229

    Example:
        >>> teen_calibrate(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]]), share=1.0)
        tensor([[0.7071, 0.7071]])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` must be between 0 and 1, got {share}. It is the part of the base classes.")
    require_positive(temperature=temperature)
    require_rows(base.shape[-1], new=new, base=base)
    weights = prototype_logits(new, base, "cosine", 1 / temperature).softmax(dim=1)
    there = base.isfinite().all(dim=1, keepdim=True)
    mixed = unit_rows(weights @ torch.where(there, base, 0.0).to(new))
    return (1 - share) * new + share * mixed
