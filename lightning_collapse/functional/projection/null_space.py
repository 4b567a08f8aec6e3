"""Approximate null space: input directions in which the inputs of all old tasks have next to no energy."""

import torch
from torch import Tensor

from lightning_collapse.spectral.eigenvalues import eigenvectors
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision


@torch.no_grad()
@full_precision
def null_space(second_moment: Tensor, factor: float = 10.0) -> tuple[Tensor, Tensor]:
    r"""Splits directions of inputs: in the null space are those with eigenvalues :math:`\lambda \le a \lambda_{min}`.

    The criterion [1] is relative to the smallest eigenvalue, so that three cases need words. If it is 0 (fewer inputs
    than the layer is wide, or units that are dead), the null space is the exact one, of all eigenvalues that are 0: as
    far as the precision tells, not above :math:`D \epsilon\, \mathrm{tr}`. If no eigenvalue is beyond ``factor`` times
    the smallest, as of white inputs, nothing is protected. There is always one direction in it at least, the last.

    Args:
        second_moment: Sum over inputs of all tasks :math:`\sum x x^\top`, not centered, ``(D, D)``; any scale.
        factor: :math:`a`, at least 1; in [1] 10, and 30 for 20 tasks.

    Returns:
        Orthonormal columns outside of the null space, ``(D, K)``, descending by eigenvalue, and inside, ``(D, D - K)``;
        in ``float64`` where the device has it. Of a matrix that is not finite nothing is outside.

    Raises:
        ValueError: If ``factor`` is below 1.

    References:
        [1] Wang, Li, Sun & Xu, *Training Networks in Null Space of Feature Covariance for Continual Learning*, CVPR
        2021. https://arxiv.org/abs/2103.07113

    Example:
        >>> protected, null = null_space(torch.tensor([40.0, 11.0, 10.0, 1.0]).diag())
        >>> protected.abs().T
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.]], dtype=torch.float64)
        >>> null_space(torch.tensor([40.0, 11.0, 10.0, 0.0]).diag())[1].shape
        torch.Size([4, 1])
    """
    if not factor >= 1:
        raise ValueError(f"`factor` must be at least 1, got {factor}. Below it not even the least direction is free.")
    moment = second_moment.to(accumulation_dtype(second_moment.device))
    values, vectors = eigenvectors(moment)
    rounding = len(values) * torch.finfo(values.dtype).eps * moment.trace()
    outside = int((values > torch.maximum(factor * values[-1], rounding)).sum())
    return vectors[:, :outside], vectors[:, outside:]


@torch.no_grad()
@full_precision
def null_share(second_moment: Tensor, directions: Tensor) -> Tensor:
    r"""Share of inputs' energy outside of protected directions, :math:`1 - \mathrm{tr}(B^\top M B) / \mathrm{tr}\, M`.

    With the directions of :func:`null_space` it is :math:`R`, the sum of eigenvalues of the null space over that of
    all; its authors find it at most 0.05 in the networks that they train. It bounds what old outputs can change by:
    for an update :math:`\Delta` off :math:`B`, the mean of :math:`\|\Delta x\|^2` is at most
    :math:`\|\Delta\|^2 R\, \mathrm{E} \|x\|^2`.

    Args:
        second_moment: :math:`M`, of inputs, not centered, ``(D, D)``; any scale.
        directions: :math:`B`, orthonormal columns, ``(D, K)``.

    Returns:
        Scalar, 0 (nothing is lost) to 1; 0 where there are no inputs.

    References:
        Wang et al., CVPR 2021. https://arxiv.org/abs/2103.07113

    Example:
        >>> null_share(torch.tensor([40.0, 11.0, 10.0, 1.0]).diag(), torch.eye(4)[:, :3])
        tensor(0.0161)
    """
    basis = directions.to(second_moment)
    total = second_moment.trace()
    share = 1 - (basis * (second_moment @ basis)).sum() / torch.where(total == 0, 1, total)
    return torch.where(total == 0, 0, share.clamp(0, 1))
