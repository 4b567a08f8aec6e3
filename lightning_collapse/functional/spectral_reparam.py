"""Spectral reparametrization (sigma-reparam): a weight divided by its spectral norm, times a learned one."""

import torch
from torch import Tensor

from lightning_collapse.spectral.power_iteration import top_singular_pair
from lightning_collapse.spectral.precision import full_precision


@full_precision
def spectral_reparam(weight: Tensor, gain: Tensor, left: Tensor, right: Tensor) -> Tensor:
    r"""A weight whose spectral norm is the gain, once the vectors are its singular ones.

    .. math:: \hat W = \frac{\gamma}{\sigma} W, \qquad \sigma = u^\top W v

    The gradient goes through :math:`\sigma` too, so that :math:`\langle \partial L / \partial W, W \rangle = 0` for any
    vectors: the length of :math:`W` does nothing, and weight decay on it only changes the size of steps.

    Args:
        weight: Shape ``(O, ...)``, a matrix ``(O, I)`` once its last dimensions are one.
        gain: γ, shape ``(1,)``.
        left: u of length 1, shape ``(O,)``; constant.
        right: v of length 1, shape ``(I,)``; constant.

    Returns:
        The shape of ``weight``, at least ``float32``.

    References:
        Zhai et al., *Stabilizing Transformer Training by Preventing Attention Entropy Collapse*, ICML 2023.
        https://arxiv.org/abs/2303.06296

    Example:
        >>> weight = torch.diag(torch.tensor([1.0, 4.0]))
        >>> spectral_reparam(weight, torch.tensor([2.0]), *singular_vectors(weight))
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]])
    """
    return weight * (gain / spectral_estimate(weight, left, right))


@full_precision
def spectral_estimate(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    r"""The estimate :math:`\sigma = u^\top W v` of a spectral norm, from below.

    Args:
        weight: Shape ``(O, ...)``.
        left: u of length 1, shape ``(O,)``.
        right: v of length 1, shape ``(I,)``.

    Returns:
        Scalar, at least ``float32``: the spectral norm where these are the singular vectors, and not positive where
        they are those of another weight.

    Example:
        >>> spectral_estimate(torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
        tensor(4.)
    """
    return torch.dot(left, weight.flatten(1) @ right)


@torch.no_grad()
def singular_vectors(weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""The vectors u and v that :func:`spectral_reparam` starts from, those of the largest singular value.

    Computed in ``float64`` where the device has it, exactly where the smaller side is at most 2048; waits for the
    device. A cold power step would leave :math:`\sigma` a quarter too small.

    Args:
        weight: Shape ``(O, ...)``.

    Returns:
        Unit vectors ``(O,)`` and ``(I,)``, at least ``float32``; not finite where the weight is 0 or not finite.

    Example:
        >>> singular_vectors(torch.tensor([[0.0, -2.0], [0.0, 0.0]]))
        (tensor([-1.,  0.]), tensor([0., 1.]))
    """
    matrix = weight.detach().flatten(1)
    right = top_singular_pair(matrix).direction
    product = matrix.to(right) @ right
    left = product / torch.linalg.vector_norm(product)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return left.to(dtype), right.to(dtype)


@torch.no_grad()
@full_precision
def power_step(weight: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    r"""Vectors that follow a weight which has moved a little: :math:`u' = Wv / \|Wv\|`, :math:`v' = W^\top u' / \|.\|`.

    Args:
        weight: Shape ``(O, ...)``.
        left: u, shape ``(O,)``.
        right: v, shape ``(I,)``.

    Returns:
        The new u and v; the old ones where the new are not finite. Nothing waits for the device.

    Example:
        >>> weight, vector = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([0.6, 0.8])
        >>> power_step(weight, vector, vector)[1]
        tensor([0.0830, 0.9965])
    """
    matrix = weight.flatten(1)
    first = matrix @ right
    first = first / torch.linalg.vector_norm(first)
    second = matrix.T @ first
    second = second / torch.linalg.vector_norm(second)
    usable = second.isfinite().all()
    return torch.where(usable, first, left), torch.where(usable, second, right)
