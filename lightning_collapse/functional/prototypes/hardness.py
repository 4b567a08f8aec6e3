"""Hardness-aware prototype sampling (Happy): pseudo-features of old classes, more of those that are near others."""

import torch
from torch import Tensor

from lightning_collapse.functional.prototypes.scores import require_rows, unit_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_not_negative, require_positive, require_whole


@full_precision
def sampling_probabilities(prototypes: Tensor, temperature: float = 0.1) -> Tensor:
    r"""How often to draw each class: more often the nearer its prototype is to the others.

    .. math:: P(c) \propto \exp\Big(\tfrac{1}{\tau (C - 1)} \sum_{k \ne c} \cos(\mu_c, \mu_k)\Big)

    Args:
        prototypes: Shape ``(C, D)``; a row with NaN, of a class that nobody has seen, is never drawn.
        temperature: :math:`\tau`, 0.1 as published; towards infinity all classes are drawn alike.

    Returns:
        Shape ``(C,)``; zeros if there is no prototype at all.

    Raises:
        ValueError: If ``prototypes`` is no matrix with a row, or ``temperature`` not positive.

    References:
        Ma et al., *Happy: A Debiased Learning Framework for Continual Generalized Category Discovery*, NeurIPS 2024.
        https://arxiv.org/abs/2410.06535, code at https://github.com/mashijie1028/Happy-CGCD.

    Example:
        >>> sampling_probabilities(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])).argmin()
        tensor(2)
    """
    require_positive(temperature=temperature)
    require_rows(prototypes.shape[-1], prototypes=prototypes)
    there = prototypes.isfinite().all(dim=1)
    units = unit_rows(torch.where(there.unsqueeze(1), prototypes, 0.0))
    others = units @ units.sum(dim=0) - units.square().sum(dim=1)
    hardness = others / (there.sum() - 1).clamp_min(1)
    return (hardness / temperature).masked_fill(~there, -torch.inf).softmax(dim=0).nan_to_num(0.0)


@full_precision
def sample_prototypes(
    prototypes: Tensor,
    radius: float | Tensor,
    n: int,
    generator: torch.Generator | None = None,
    temperature: float = 0.1,
) -> tuple[Tensor, Tensor]:
    r"""Pseudo-features :math:`\mu_c + r \varepsilon`, :math:`\varepsilon \sim N(0, I)`, and their classes.

    Happy has prototypes of length 1 and does not divide the samples by their length. Waits for nothing.

    Args:
        prototypes: Shape ``(C, D)``, with one at least that is not NaN.
        radius: :math:`r`, see :meth:`~lightning_collapse.metrics.ClassPrototypes.radius`; 0 for the prototypes.
        n: How many.
        generator: Of all that is drawn, on the device of ``prototypes``; the global one by default.
        temperature: See :func:`sampling_probabilities`.

    Returns:
        Features ``(n, D)`` and labels ``(n,)``, constants.

    Raises:
        ValueError: If an argument is out of range or there is no prototype.

    Example:
        >>> rows, labels = sample_prototypes(torch.eye(3), radius=0.0, n=4)
        >>> bool((rows == torch.eye(3)[labels]).all())
        True
    """
    require_whole(1, n=n)
    if not isinstance(radius, Tensor):
        require_not_negative(radius=radius)
    prototypes = prototypes.detach()
    bounds = sampling_probabilities(prototypes, temperature).cumsum(dim=0)
    # not `multinomial`, which waits for the device: the first bound above a number, so no class that is not there
    drawn = torch.rand(n, generator=generator, device=bounds.device, dtype=bounds.dtype) * bounds[-1]
    below = torch.nextafter(bounds[-1], torch.zeros_like(bounds[-1]))
    labels = torch.searchsorted(bounds, drawn.minimum(below), right=True).clamp_max(len(bounds) - 1)
    noise = torch.randn(n, prototypes.shape[1], generator=generator, device=bounds.device, dtype=prototypes.dtype)
    return prototypes[labels] + radius * noise, labels
