"""Jacobian regularizers: how far the Jacobian of a vector field is from symmetric, and how long it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor], Tensor]
"""What maps a state to as many numbers in the same shape; a module is one."""


def jacobian_homeostasis(field: Field, state: Tensor, probes: Tensor) -> Tensor:
    r"""How far the Jacobian of a vector field is from symmetric, by random probes [1].

    .. math::
        \frac{1}{d}\, E_\varepsilon \big[ \|J \varepsilon\|^2 - \varepsilon^T J^2 \varepsilon \big]
        = \frac{1}{2 d} \|J - J^T\|_F^2
        = \frac{1}{2 d}\, E_\varepsilon \|(J - J^T) \varepsilon\|^2

    for probes with covariance :math:`I`. The first form is the published one, the last is what is computed, in as many
    products: no draw of it is below 0, and where the Jacobian is symmetric its gradient is exactly 0, while that of the
    first form is zero on average only.

    Args:
        field: A function of the state, such as a recurrent block or the update of an equilibrium network. It is called
            once, and must allow second derivatives (third ones to train with).
        state: Where, shape ``(N, ...)`` for a field that acts on every sample alone (``d`` is the size of one, and the
            mean over samples is taken), or any shape for one that does not. The published one is the fixed point
            without targets. No gradient flows to it.
        probes: Shape ``(P, *state.shape)``, standard normal or of signs.

    Returns:
        A scalar, at least ``float32``, 0 for a symmetric Jacobian; differentiable in whatever the field holds. Of a
        field in half precision it has a floor, the rounding of its two products.

    Raises:
        ValueError: If shapes do not fit, or the field returns another shape.

    References:
        [1] Laborieux & Zenke, *Improving equilibrium propagation without weight symmetry through Jacobian homeostasis*,
        ICLR 2024. https://arxiv.org/abs/2309.02214, code at https://github.com/Laborieux-Axel/generalized-holo-ep.

    Example:
        >>> matrix = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
        >>> probes = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # as many as dimensions, orthogonal: exact
        >>> jacobian_homeostasis(lambda state: matrix @ state, torch.zeros(2), probes)  # (3 - 1)^2 / 2
        tensor(2.)
    """
    if not len(probes) or probes.shape[1:] != state.shape:
        raise ValueError(
            f"`probes` must have the shape (P, {', '.join(map(str, state.shape))}), P of the state's shape, got"
            f" {tuple(probes.shape)}."
        )
    here, value = _value(field, state)
    if value.shape != state.shape:
        raise ValueError(
            f"`field` must return the shape of the state, {tuple(state.shape)}, got {tuple(value.shape)}: only a square"
            " Jacobian can be symmetric. For others there is `jacobian_norm`."
        )
    # a product with the Jacobian is the derivative of one with its transpose: all modules allow that
    dual = torch.zeros_like(value, requires_grad=True)
    transposed = _product(value, here, dual)
    parts = [(_product(transposed, dual, e), _product(value, here, e)) for e in probes]
    squares = [(_wide(forward) - _wide(backward)).square().sum() for forward, backward in parts]
    return torch.stack(squares).mean() / (2 * state.numel())


def jacobian_norm(field: Field, state: Tensor, probes: Tensor) -> Tensor:
    r"""The squared Frobenius norm of a Jacobian, by random probes (contractive regularization) [1], [2].

    .. math:: \frac{1}{N} \|J\|_F^2 = \frac{1}{N}\, E_\varepsilon \|J^T \varepsilon\|^2

    Args:
        field: A function of the state that acts on every sample alone; it may change the number of features.
        state: Where, shape ``(N, ...)``. No gradient flows to it.
        probes: Shape ``(P, *field(state).shape)``, standard normal or of signs.

    Returns:
        A scalar, at least ``float32``; differentiable in whatever the field holds.

    Raises:
        ValueError: If there is no probe.

    References:
        [1] Rifai et al., *Contractive auto-encoders: explicit invariance during feature extraction*, ICML 2011.

        [2] Hoffman, Roberts & Yaida, *Robust learning with Jacobian regularization*, 2019.
        https://arxiv.org/abs/1908.02729

    Example:
        >>> matrix = torch.tensor([[1.0, 2.0, 2.0]])
        >>> jacobian_norm(lambda state: state @ matrix.T, torch.zeros(5, 3), torch.ones(1, 5, 1))
        tensor(9.)
    """
    if not len(probes):
        raise ValueError("`probes` is empty. One or more are needed, shape `(P, *field(state).shape)`.")
    here, value = _value(field, state)
    return torch.stack([_wide(_product(value, here, e)).square().sum() for e in probes]).mean() / len(state)


def _value(field: Field, state: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():  # in validation too
        here = state.detach().requires_grad_()
        return here, field(here)


def _product(of: Tensor, to: Tensor, vector: Tensor) -> Tensor:
    """The vector times the derivative of the one tensor with respect to the other, itself with gradient."""
    [product] = torch.autograd.grad(of, to, vector.to(of.dtype), create_graph=True, materialize_grads=True)
    return product


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
