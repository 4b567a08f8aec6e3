"""Series activation: a sum of shifted and scaled copies of an activation function."""

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.arguments import require_whole

SHARE = 1e-3
"""What the second copy begins with, where a copy that began at zero would have no gradient."""


class SeriesActivation(nn.Module):
    r"""Several copies of an activation, with a learned slope and shift each.

    .. math:: f(x) = \sum_{i=1}^{n} \sigma(a_i x + b_i)

    It gives the MLP of a transformer more nonlinearity for few parameters: an MLP that is nearly linear passes the
    collapse of tokens on. It begins as the activation itself, with :math:`a = (1, 0, \dots)` and :math:`b = 0`; for
    ReLU with :math:`a = (1 - \epsilon, \epsilon, 0, \dots)` and :math:`\epsilon` of 0.001, which is the same function,
    since the slope at zero gives a copy no gradient there. How the authors begin is not known.

    Args:
        activation: An elementwise module ``σ`` with ``σ(0) = 0``: GELU, SiLU, ReLU, Tanh ...
        terms: Number ``n`` of copies; the authors' by default.
        channels: Width ``C`` of the last dimension, for slopes and shifts of each channel; ``None`` for one of each.

    Attributes:
        slope: :math:`a`, shape ``(n, C)`` or ``(n, 1)``. Give both parameters no weight decay.
        shift: :math:`b`, of the same shape.

    Raises:
        ValueError: If the activation is not zero at zero, or a copy of it could not learn: its slope at zero is zero,
            and it is not positively homogeneous as ReLU is.

    References:
        Wang et al., *PanGu-π: Enhancing Language Model Architectures via Nonlinearity Compensation*, 2023.
        https://arxiv.org/abs/2312.17276

    Example:
        >>> activation, x = SeriesActivation(nn.GELU()), torch.randn(4, 8)
        >>> torch.equal(activation(x), nn.functional.gelu(x))
        True
    """

    def __init__(self, activation: nn.Module, terms: int = 2, channels: int | None = None) -> None:
        super().__init__()
        require_whole(1, terms=terms)
        if channels is not None:
            require_whole(1, channels=channels)
        self.activation = activation
        self._share = _share_of_the_second(activation) if terms > 1 else 0.0
        self.slope = nn.Parameter(torch.empty(terms, channels or 1))
        self.shift = nn.Parameter(torch.empty(terms, channels or 1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make it the activation itself; also what fills a layer built on the ``meta`` device."""
        self.shift.zero_()
        self.slope.zero_()
        self.slope[0] = 1 - self._share
        self.slope[1:2] = self._share

    def forward(self, features: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        (slope, shift), *others = zip(self.slope, self.shift, strict=True)
        total: Tensor = self.activation(features * slope + shift)
        for slope, shift in others:
            total = total + self.activation(features * slope + shift)
        return total

    def extra_repr(self) -> str:
        """Show the sizes in ``print(model)``."""
        terms, channels = self.slope.shape
        return f"terms={terms}, channels={channels if channels > 1 else None}"


def _share_of_the_second(activation: nn.Module) -> float:
    """0, or :data:`SHARE` for one without a slope at zero; on the CPU, and without a trace in the model.

    Raises:
        ValueError: If a sum of copies could not begin as the activation, or not learn.
    """
    name = type(activation).__name__
    with torch.device("cpu"), torch.enable_grad():
        zero = torch.zeros(1, requires_grad=True)
        value = activation(zero * 1)  # a copy, for those that work in place
        if value.shape != zero.shape or value.detach().abs().max() > 0:
            raise ValueError(f"`activation` must map 0 to 0, got {name}: a sum of copies would begin elsewhere.")
        (slope,) = torch.autograd.grad(value.sum(), zero)
        points = torch.linspace(-8, 8, 65)
        if slope.abs().max() > 0:
            return 0.0
        if not torch.allclose(activation(SHARE * points), SHARE * activation(points.clone()), rtol=1e-5, atol=1e-9):
            raise ValueError(f"`activation` {name} is flat at 0 and not homogeneous: a copy of it would never learn.")
    return SHARE
