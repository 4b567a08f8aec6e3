"""Inverse-Lipschitz decoder: latents that differ are decoded to outputs that differ at least so much."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_finite, require_positive, require_whole


class InverseLipschitzDecoder(nn.Module):
    r"""A decoder that cannot ignore its latent: two outputs are at least L times as far apart as their latents.

    .. math:: f = B_2 \circ E \circ B_1, \qquad B_i(x) = \nabla g_i(x) + \sqrt L\, x + c_i

    with two Brenier maps, gradients of input-convex networks :math:`g_i`, which are monotone, and a fixed isometry
    :math:`E` from the latent's dimensions to the output's. A linear decoder of gain :math:`L` and noise :math:`s^2`
    keeps a divergence of :math:`\tfrac12 (q - 1 - \ln q)` nats per unit with :math:`q = \beta s^2 / (L^2 + \beta s^2)`,
    however large the weight :math:`\beta`. A large :math:`L` costs flexibility and a divergence that nothing of the
    input needs: begin with one and lower it, ``decoder.set_lipschitz(LinearRamp(2.0, 0.5, steps=1000)(step))``.

    The gradients are written out, so that there is no derivative within the forward pass: it runs without gradients, in
    one compiled graph, and can be differentiated twice. It is computed in at least ``float32``, whatever the autocast,
    since the rounding of half precision breaks the bound for near pairs. Half weights keep it but for their rounding.
    A training step takes 2 (one layer) to 4 times (two) that of a plain decoder of as many layers and as wide.

    Args:
        latent_dim: Units ``K`` of the latent.
        output_dim: Width ``D`` of the output, ``K`` or more.
        hidden: Width of the convex networks.
        depth: How many layers they have.
        lipschitz: L, in units of the output per unit of the latent.

    Attributes:
        lipschitz: Buffer with L, saved with the model; ``set_lipschitz`` changes it.

    Raises:
        ValueError: If an argument is out of range, or the output is narrower than the latent.

    References:
        Kinoshita et al., *Controlling posterior collapse by an inverse Lipschitz constraint on the decoder network*,
        ICML 2023, https://arxiv.org/abs/2304.12770; maps: Wang et al., *Posterior collapse and latent variable
        non-identifiability*, NeurIPS 2021, https://arxiv.org/abs/2301.00537. Softplus and the start are ours.

    Example:
        >>> decoder = InverseLipschitzDecoder(latent_dim=2, output_dim=5, hidden=16, lipschitz=0.5)
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> first, second = decoder(z)
        >>> bool((first - second).norm() >= 0.5)
        True
    """

    isometry: Tensor
    lipschitz: Tensor

    def __init__(
        self, latent_dim: int, output_dim: int, hidden: int = 256, depth: int = 2, lipschitz: float = 1.0
    ) -> None:
        super().__init__()
        require_whole(1, latent_dim=latent_dim, output_dim=output_dim, hidden=hidden, depth=depth)
        if output_dim < latent_dim:
            raise ValueError(
                f"`output_dim` must be at least `latent_dim` {latent_dim}, got {output_dim}: no map to fewer dimensions"
                " tells all latents apart."
            )
        self._start = lipschitz
        self.latent = _BrenierMap(latent_dim, hidden, depth)
        self.output = _BrenierMap(output_dim, hidden, depth)
        self.register_buffer("isometry", torch.empty(output_dim, latent_dim))
        self.register_buffer("lipschitz", torch.empty(()))
        self.set_lipschitz(lipschitz)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the isometry anew; also, as that of its parts, what fills a layer built on the ``meta`` device."""
        self.lipschitz.fill_(self._start)
        if not self.isometry.is_meta:  # and in single precision: decompositions have no half one
            self.isometry.copy_(nn.init.orthogonal_(torch.empty_like(self.isometry, dtype=torch.float32)))

    @torch.no_grad()
    def set_lipschitz(self, lipschitz: float) -> None:
        """Set :math:`L`, without a wait for the device or a new compilation; of a schedule at every step.

        Raises:
            ValueError: If it is not positive or not finite.
        """
        require_positive(lipschitz=lipschitz)
        require_finite(lipschitz=lipschitz)
        self._start = lipschitz
        self.lipschitz.fill_(lipschitz)

    @full_precision
    def forward(self, latents: Tensor) -> Tensor:
        """Outputs ``(..., D)``, at least ``float32``, of latents ``(..., K)``.

        Raises:
            ValueError: If the latents have another width.
        """
        if latents.shape[-1] != self.isometry.shape[1] or not latents.is_floating_point():
            raise ValueError(
                f"`latents` must be floating point of shape (..., {self.isometry.shape[1]}), got {latents.dtype} of"
                f" shape {tuple(latents.shape)}. Pass samples of the posterior, and not its moments."
            )
        root = self.lipschitz.sqrt()
        points = self.latent(latents, root)
        outputs: Tensor = self.output(points @ self.isometry.mT.to(points.dtype), root)
        return outputs

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        output_dim, latent_dim = self.isometry.shape
        return f"latent_dim={latent_dim}, output_dim={output_dim}, lipschitz={self._start}"


class _BrenierMap(nn.Module):
    """``B(x) = grad g(x) + root * x + c`` with a convex ``g``, of softplus layers that see the input and each other."""

    def __init__(self, dim: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(nn.Linear(dim, hidden) for _ in range(depth))
        self.raw_links = nn.ParameterList(nn.Parameter(torch.empty(hidden, hidden)) for _ in range(depth - 1))
        self.raw_readout = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def forward(self, x: Tensor, root: Tensor) -> Tensor:
        weights = [parameter for layer in self.inputs for parameter in layer.parameters()]
        return _brenier_map(x, root, self.bias, self.raw_readout, *self.raw_links, *weights)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        hidden, dim = len(self.raw_readout), len(self.bias)
        for link in self.raw_links:
            link.fill_(_inverse_softplus(1 / hidden))
        # weights of variance 1 / (3 dim) and a sigmoid of slope 1/4: the map begins near the identity
        self.raw_readout.fill_(_inverse_softplus(12 * dim / (hidden * len(self.inputs))))
        self.bias.zero_()


@full_precision
def _brenier_map(x: Tensor, root: Tensor, bias: Tensor, raw_readout: Tensor, *rest: Tensor) -> Tensor:
    """Forward through ``g`` and back to its input; what links layers is not negative, as the softplus of a number."""
    depth = (len(rest) + 1) // 3
    links, weights, biases = rest[: depth - 1], rest[depth - 1 :: 2], rest[depth::2]
    raw = [functional.linear(x, weights[0], biases[0])]
    for link, weight, offset in zip(links, weights[1:], biases[1:], strict=True):
        raw.append(functional.linear(x, weight, offset) + functional.softplus(raw[-1]) @ functional.softplus(link).mT)
    slope = functional.softplus(raw_readout) * raw[-1].sigmoid()
    result = root * x + bias + slope @ weights[-1]
    for k in range(depth - 2, -1, -1):
        slope = (slope @ functional.softplus(links[k])) * raw[k].sigmoid()
        result = result + slope @ weights[k]
    return result


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value)) if value < 20 else value
