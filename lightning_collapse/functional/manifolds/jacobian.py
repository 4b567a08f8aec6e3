"""Input-output Jacobians: the singular values of what a network does to small changes of its input."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

ACROSS_SAMPLES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class JacobianIsometry(NamedTuple):
    """How near a network is to keeping distances, of every input.

    Attributes:
        mean_square: Mean of the squared singular values, shape ``(N,)``.
        spread: Standard deviation of the squared singular values over their mean, ``(N,)``.
    """

    mean_square: Tensor
    spread: Tensor


def jacobian_spectra(model: nn.Module, x: Tensor, chunk_size: int = 1) -> Tensor:
    """Singular values of each input's own Jacobian.

    Args:
        model: Takes ``(N, ...)``, returns ``(N, ...)``; left as it is. What draws random numbers must be in eval mode.
        x: Inputs, shape ``(N, ...)``, floating-point.
        chunk_size: Inputs at a time: the memory is that of so many Jacobians, each a backward pass per output.

    Returns:
        Descending, shape ``(N, K)`` with ``K`` the smaller of inputs and outputs, at least ``float32``, without a
        graph; NaN for an input with NaN.

    Raises:
        ValueError: If a batch normalization uses the statistics of the batch: samples then have no Jacobian of their
            own.

    Example:
        >>> linear = nn.Linear(2, 2, bias=False)
        >>> _ = linear.weight.data.copy_(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))
        >>> jacobian_spectra(linear, torch.ones(1, 2))
        tensor([[2., 1.]])
    """
    for name, module in model.named_modules():
        if isinstance(module, ACROSS_SAMPLES) and (module.training or module.running_mean is None):
            raise ValueError(
                f"`model` must treat samples one by one, but {type(module).__name__} {name!r} uses the statistics of"
                " the batch. Call `model.eval()` first, or replace the layer."
            )
    state = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    def embed(sample: Tensor) -> Tensor:
        output: Tensor = functional_call(model, state, (sample.unsqueeze(0),))
        return output.flatten()

    def spectrum(sample: Tensor) -> Tensor:
        jacobian = jacrev(embed)(sample).flatten(1)
        finite = jacobian.isfinite().all()
        safe = torch.where(finite, jacobian, 0.0).to(torch.promote_types(jacobian.dtype, torch.float32))
        return torch.where(finite, torch.linalg.svdvals(safe), torch.nan)

    with torch.autocast(x.device.type, enabled=False):
        values: Tensor = vmap(spectrum, chunk_size=chunk_size)(x.detach())
    return values


def jacobian_isometry(model: nn.Module, x: Tensor, chunk_size: int = 1) -> JacobianIsometry:
    r"""Dynamical isometry: mean and spread of the squared singular values of the input-output Jacobian.

    .. math:: \mu = \tfrac1K \sum_k \sigma_k^2, \quad s = \sqrt{\tfrac1K \sum_k (\sigma_k^2 - \mu)^2} \,/\, \mu

    A mean far from 1 is a network whose signal vanishes or explodes with depth; at a mean of 1 a large spread still
    has a few directions explode and the others vanish. Gaussian weights have a spread that grows with the root of the
    depth, orthogonal ones with linear or nearly linear units have none.

    Args:
        model: As in :func:`jacobian_spectra`.
        x: Inputs, shape ``(N, ...)``.
        chunk_size: Inputs at a time.

    Returns:
        For each input; the mean is 0 to infinity (isometry: 1), the spread 0 (isometry, up to scale) to
        ``sqrt(K - 1)`` (one direction is left), NaN where everything vanishes.

    Raises:
        ValueError: As :func:`jacobian_spectra`.

    References:
        Saxe et al., 2013, https://arxiv.org/abs/1312.6120; Pennington et al., *Resurrecting the sigmoid in deep
        learning through dynamical isometry*, NeurIPS 2017. https://arxiv.org/abs/1711.04735

    Example:
        >>> found = jacobian_isometry(nn.Flatten(), torch.ones(2, 3))
        >>> found.mean_square.tolist(), found.spread.tolist()
        ([1.0, 1.0], [0.0, 0.0])
    """
    squares = jacobian_spectra(model, x, chunk_size).square()
    mean = squares.mean(dim=-1)
    spread = squares.std(dim=-1, correction=0) / torch.where(mean > 0, mean, torch.nan)
    return JacobianIsometry(mean, spread)
