"""Consistency of a network under interpolation and under flips: two terms of manifold entropy estimation (MEE)."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.losses.support.statistics import separate_views
from lightning_collapse.utilities.arguments import require_not_negative


def interpolation_consistency(
    network: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, noise: float = 0.05
) -> Tensor:
    r"""How far a network is from mapping lines to lines; MEE calls it DIsoMap, but no distance is kept.

    .. math:: \frac{1}{N D} \sum_i \big\|f(\alpha_i x_i + (1 - \alpha_i) x'_i) - \operatorname{sg}\big[\alpha_i f(x_i)
        + (1 - \alpha_i) f(x'_i) + \epsilon_i\big]\big\|^2, \qquad \alpha_i \sim N(0, 1)

    as coded: :math:`\alpha` is normal, so that lines are followed beyond both ends. An affine network reads the square
    of ``noise``, 0.0025, on average. So does a constant one: constant outputs minimize it, and it needs a partner that
    resists collapse. There the partner is an entropy, and :math:`x, x'` are real and generated images.

    Collective: every process must call it; one all-reduce of 3 numbers. It draws from torch's random numbers.

    Args:
        network: From ``(N, ...)`` to features ``(N, D)``; called three times.
        first: Inputs, floating point, shape ``(N, ...)``; ``N`` may differ between processes.
        second: Of the same shape, in any order.
        noise: Standard deviation of :math:`\epsilon`; the authors' value.

    Returns:
        Scalar, at least ``float32``, the value on the global batch.

    Raises:
        ValueError: If the inputs are not of one shape, or the network returns no matrix; if there is no row over all
            processes.

    References:
        Liu et al., *Combating Mode Collapse in GANs via Manifold Entropy Estimation*, 2022.
        https://arxiv.org/abs/2208.12055, code at https://github.com/HaozheLiu-ST/MEE.

    Example:
        >>> affine = torch.nn.Linear(4, 2)
        >>> round(interpolation_consistency(affine, torch.randn(8, 4), torch.randn(8, 4), noise=0.0).item(), 6)
        0.0
    """
    require_not_negative(noise=noise)
    if first.shape != second.shape or not first.is_floating_point() or not second.is_floating_point():
        raise ValueError(
            "`first` and `second` of `interpolation_consistency` must be floating point of one shape, got"
            f" {first.dtype} {tuple(first.shape)} and {second.dtype} {tuple(second.shape)}. Token ids have no line"
            " between them: pass embeddings."
        )
    alpha = torch.randn(len(first), *[1] * (first.ndim - 1), device=first.device, dtype=first.dtype)
    with torch.no_grad():
        one, other = network(first), network(second)
        share = alpha.view(-1, *[1] * (one.ndim - 1))
        target = share * one + (1 - share) * other
        target = target + noise * torch.randn_like(target)
    return _distance("interpolation_consistency", network(alpha * first + (1 - alpha) * second), target)


def flip_consistency(network: Callable[[Tensor], Tensor], images: Tensor, noise: float = 0.001) -> Tensor:
    r"""How far apart a network puts images and their mirror images; MEE calls it DLLE, but nothing is locally linear.

    .. math:: \frac{1}{N D} \sum_i \|f(x_i) - \operatorname{sg} f(a(x_i))\|^2

    as coded: :math:`a` flips all images of a batch alike, upside down or left to right by a coin, and adds noise. There
    it is added up over real and generated images. Constant outputs minimize it: it needs a partner that resists
    collapse.

    Collective: every process must call it; one all-reduce of 3 numbers. It draws from torch's random numbers, and every
    process flips by its own.

    Args:
        network: From ``(N, C, H, W)`` to features ``(N, D)``; called twice.
        images: Shape ``(N, C, H, W)``; ``N`` may differ between processes.
        noise: Standard deviation of what is added; the authors' value.

    Returns:
        Scalar, at least ``float32``, the value on the global batch.

    Raises:
        ValueError: If the images are no maps, or the network returns no matrix; if there is no row over all processes.

    References:
        Liu et al., 2022. https://arxiv.org/abs/2208.12055, code at https://github.com/HaozheLiu-ST/MEE.

    Example:
        >>> pooled = flip_consistency(lambda images: images.mean(dim=(2, 3)), torch.rand(4, 3, 8, 8))
        >>> pooled < 1e-6
        tensor(True)
    """
    require_not_negative(noise=noise)
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"`images` of `flip_consistency` must be floating point of shape (N, C, H, W), got {images.dtype} of shape"
            f" {tuple(images.shape)}."
        )
    side = 2 + int(torch.randint(2, (), device="cpu"))
    with torch.no_grad():
        target = network(images.flip(side) + noise * torch.randn_like(images))
    return _distance("flip_consistency", network(images), target)


def _distance(function: str, output: Tensor, target: Tensor) -> Tensor:
    (output,), (target,) = separate_views(function, output=output), separate_views(function, target=target)
    wide = torch.promote_types(output.dtype, torch.float32)
    return mean_of_rows(function, (output.to(wide) - target.to(wide)).square().mean(dim=1, keepdim=True)).squeeze(0)
