"""Series activation: a sum of shifted and scaled copies of an activation function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_collapse.layers.conversion import ConvertedModule, Start, convert_modules, unreadable
from lightning_collapse.utilities.activations import is_activation
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.copies import bare_copy
from lightning_collapse.utilities.private_torch import FUSED_IN_EVAL
from lightning_collapse.utilities.registry import register_layer

SHARE = 1e-3
"""What the second copy begins with, where a copy that began at zero would have no gradient."""


@register_layer
class SeriesActivation(ConvertedModule):
    r"""Several copies of an activation, with a learned slope and shift each.

    .. math:: f(x) = \sum_{i=1}^{n} \sigma(a_i x + b_i)

    It gives the MLP of a transformer more nonlinearity for few parameters: an MLP that is nearly linear passes the
    collapse of tokens on. It begins as the activation itself, with :math:`a = (1, 0, \dots)` and :math:`b = 0`; for
    ReLU with :math:`a = (1 - \epsilon, \epsilon, 0, \dots)` and :math:`\epsilon` of 0.001, which is the same function:
    there a copy of slope 0 has no gradient. How the authors begin is not known. There is no way back.

    Attributes:
        slope: :math:`a`, shape ``(n, C)`` or ``(n, 1)``. Give both no weight decay, see :meth:`added_parameters`.
        shift: :math:`b`, of the same shape.

    References:
        Wang et al., *PanGu-π: Enhancing Language Model Architectures via Nonlinearity Compensation*, 2023.
        https://arxiv.org/abs/2312.17276

    Example:
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(3, 4)
        >>> before = net(x)
        >>> SeriesActivation.convert_(net), torch.equal(net(x), before)
        (['1'], True)
    """

    adds = ("slope", "shift")
    converts = "activation functions that are modules"
    resists = "tokens that become alike with depth"
    cost = "the activation `terms` times"
    source = "Wang et al. 2023, arXiv 2312.17276"
    slope: nn.Parameter
    shift: nn.Parameter

    @classmethod
    def convert_(
        cls,
        model: nn.Module,
        terms: int = 2,
        channels: int | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> list[str]:
        """Convert activations in place, before the optimizer is made, and before ``fully_shard`` or DDP.

        Args:
            model: Changed in place.
            terms: Number ``n`` of copies; the authors' by default.
            channels: Width ``C`` of the last dimension, for slopes and shifts of each channel; ``None`` for one of all.
            include: Names of modules, or glob patterns of them, each with all inside it; all by default.
            exclude: The same, of those that stay as they are.

        Returns:
            Names of the modules that were converted. One that is used in several places is one.

        Raises:
            ValueError: If an argument is wrong, or there is nothing to convert.
            ConversionError: If an activation is not zero at zero, a copy of it could not learn, or torch's transformer
                layer leaves it out in evaluation; and see :func:`~lightning_collapse.layers.convert_modules`.
        """
        require_whole(2, terms=terms)
        if channels is not None:
            require_whole(1, channels=channels)
        fused = {id(m) for layer in model.modules() if isinstance(layer, FUSED_IN_EVAL) for m in layer.children()}
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

        def look(name: str, module: nn.Module) -> Start | str | None:
            if not isinstance(module, cls) and not is_activation(module):
                return None
            if id(module) in fused:
                return "torch's transformer layer leaves it out in evaluation. Write the layer out"
            if reason := unreadable(like):
                return f"the model is {reason}"
            share = _share_of_the_second(module)
            start: Start = lambda layer: layer.begin(share, like.new_zeros(terms, channels or 1))  # noqa: E731
            return share if isinstance(share, str) else start

        return convert_modules(model, cls, look, include, exclude)

    def begin(self, share: float, zeros: Tensor) -> None:
        """Add slopes and shifts with which it is the activation itself; ``share`` goes to the second copy."""
        self.slope, self.shift = nn.Parameter(zeros.clone()), nn.Parameter(zeros)
        with torch.no_grad():
            self.slope[:2] = zeros.new_tensor([[1 - share], [share]])

    def forward(self, features: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``."""
        plain = super().forward
        total: Tensor = plain(features * self.slope[0] + self.shift[0])
        for slope, shift in zip(self.slope[1:], self.shift[1:], strict=True):
            total = total + plain(features * slope + shift)
        return total

    def why_not_fold(self) -> str:
        """A sum of copies is no single one."""
        return "a sum of activations is none of its terms. Keep it"


def _share_of_the_second(module: nn.Module) -> float | str:
    """0, or :data:`SHARE` for one without a slope at zero; or why a sum of copies could not begin, or not learn."""
    activation = bare_copy(module).to("cpu", torch.float32)
    with torch.enable_grad():
        zero = torch.zeros(1, requires_grad=True)
        value = activation(zero * 1)  # a copy, for those that work in place
        (slope,) = torch.autograd.grad(value.sum(), zero)
        points = torch.linspace(-8, 8, 65)
        scaled, exact = activation(SHARE * points), SHARE * activation(points.clone())
    if value.detach().abs() > 0:
        return "it is not 0 at 0: a sum of copies would begin elsewhere"
    if slope.abs() > 0:
        return 0.0
    if not torch.allclose(scaled, exact, rtol=1e-5, atol=1e-9):
        return "it is flat at 0 and not homogeneous: a copy of it would never learn"
    return SHARE
