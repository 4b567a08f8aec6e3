"""Inverse powers of a covariance, with a gradient that bears equal eigenvalues, and Newton's iteration (IterNorm)."""

from typing import Any

import torch
from torch import Tensor

from lightning_collapse.losses.support.products import product
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.differentiable_once import differentiable_once

SMALLEST = 1e-8  # traces and eigenvalues below it are raised to it


def symmetric_power(covariance: Tensor, power: float) -> Tensor:
    r"""The matrix :math:`C^{-p}`, with eigenvalues raised to what the precision can tell from zero.

    Its gradient is made of divided differences of :math:`\lambda^{-p}`, which stay finite where eigenvalues are equal;
    no gradient passes through eigenvectors. On CUDA the decomposition waits for the device.

    Args:
        covariance: Symmetric and positive semi-definite, shape ``(..., M, M)``.
        power: The exponent :math:`p`.

    Returns:
        Shape ``(..., M, M)``; it can be differentiated once.

    Example:
        >>> symmetric_power(4 * torch.eye(2), 0.5)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    result: Tensor = _Power.apply(covariance, power)  # type: ignore[no-untyped-call]
    return result


def iter_norm(covariance: Tensor, iterations: int) -> Tensor:
    r"""Newton's iteration towards :math:`C^{-1/2}`, stopped early on purpose.

    .. math:: P_0 = I, \quad P_{k+1} = \tfrac{3}{2} P_k - \tfrac{1}{2} P_k^3\, C / \operatorname{tr} C, \quad
        \Phi = P_T / \sqrt{\operatorname{tr} C}

    An eigenvalue that is a share :math:`x` of the trace becomes :math:`\varphi_T(x)`, the ``T``-fold composition of
    :math:`\varphi(x) = x (1.5 - 0.5 x)^2`, in :math:`\Phi C \Phi`.

    Args:
        covariance: Symmetric and positive semi-definite, shape ``(..., M, M)``.
        iterations: ``T``, of the order of ten at most: rounding errors grow with it.

    Returns:
        Shape ``(..., M, M)``.
    """
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None].clamp_min(SMALLEST)
    share = covariance / trace
    root = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device).expand_as(covariance)
    for _ in range(iterations):
        root = 1.5 * root - 0.5 * product(product(product(root, root), root), share)
    return root * trace.rsqrt()


class _Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, covariance: Tensor, power: float) -> Tensor:
        # the solver raises on what is not finite; the rows themselves still carry it into the loss
        matrix = covariance.nan_to_num(0.0, 0.0, 0.0).to(accumulation_dtype(covariance.device))
        values, vectors = torch.linalg.eigh(matrix)
        precision = covariance.shape[-1] * torch.finfo(covariance.dtype).eps
        floor = precision * values[..., -1:].clamp_min(0) + SMALLEST
        ctx.power = power
        raised = values.maximum(floor)
        ctx.save_for_backward(raised, vectors, values > floor)
        result: Tensor = (vectors * raised.pow(-power).unsqueeze(-2)) @ vectors.mT
        return result.to(covariance.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        values, vectors, free = ctx.saved_tensors
        return _power_gradient(grads[0], values, vectors, free, ctx.power), None


@full_precision  # the backward pass may run under autocast
def _power_gradient(grad: Tensor, values: Tensor, vectors: Tensor, free: Tensor, power: float) -> Tensor:
    """Daleckii and Krein: in the eigenbasis, the gradient times the divided differences."""
    here = values.unsqueeze(-1)
    ratio = values.unsqueeze(-2) / here - 1
    # (g(b) - g(a)) / (b - a) without a difference of nearly equal numbers
    slope = torch.where(ratio == 0, -power, torch.expm1(-power * ratio.log1p()) / ratio)
    differences = slope * here.pow(-power - 1) * (free.unsqueeze(-1) | free.unsqueeze(-2))
    inner = vectors.mT @ grad.to(vectors.dtype) @ vectors
    result: Tensor = vectors @ ((inner + inner.mT) / 2 * differences) @ vectors.mT
    return result.to(grad.dtype)
