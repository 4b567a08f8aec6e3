"""Augmented shortcuts: paths around attention that keep tokens apart, with block-circulant weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_finite, require_whole


class BlockCirculant(nn.Module):
    r"""Linear map of ``D x D`` with ``blocks * D`` weights, by the fast Fourier transform.

    The matrix has ``blocks x blocks`` blocks, each circulant, :math:`W_{ij} = w_{(i - j) \bmod n}` with
    ``n = D / blocks``: a product with it is a circular convolution. The matrix itself is never made.

    Args:
        dim: Width ``D`` of input and output.
        blocks: Blocks per side, of which ``dim`` is a multiple; the authors' number by default.
        zero: Whether weight and bias begin at zero.

    Attributes:
        weight: First columns of the blocks, shape ``(blocks, blocks, D / blocks)``.
        bias: Shape ``(D,)``.

    Raises:
        ValueError: If ``blocks`` does not divide ``dim``.

    References:
        Tang et al., *Augmented Shortcuts for Vision Transformers*, NeurIPS 2021. https://arxiv.org/abs/2106.15941,
        code at https://github.com/huawei-noah/Efficient-AI-Backbones.

    Example:
        >>> layer = BlockCirculant(dim=3, blocks=1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[[0.0, 1.0, 0.0]]])), layer.bias.data.zero_()
        >>> layer(torch.tensor([1.0, 2.0, 3.0])).detach().round(decimals=4)  # moved by one
        tensor([3., 1., 2.])
    """

    def __init__(self, dim: int, blocks: int = 4, zero: bool = False) -> None:
        super().__init__()
        require_whole(1, dim=dim, blocks=blocks)
        if dim % blocks:
            raise ValueError(f"`dim` must be a multiple of `blocks`, got {dim} and {blocks}. Choose a divisor.")
        self.zero = zero
        self.weight = nn.Parameter(torch.empty(blocks, blocks, dim // blocks))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly up to ``1 / sqrt(D)``, as the authors do, or make them zero."""
        bound = 0.0 if self.zero else len(self.bias) ** -0.5
        self.weight.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``, in the dtype of the features; computed in at least ``float32``."""
        return _circulant(features, self.weight, self.bias).to(features.dtype)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(model)``."""
        return f"dim={len(self.bias)}, blocks={len(self.weight)}"


class AugmentedShortcut(nn.Module):
    r"""Residual sum with paths beside the identity: each is a block-circulant map and a GELU, token by token.

    .. math:: X' = s \Big(X + F(H) + \sum_i \operatorname{GELU}(H \Theta_i)\Big), \qquad H = \operatorname{norm}(X)

    Attention averages tokens; the paths do not, and the diversity of tokens, their distance from the mean, stays above
    what the identity alone would keep. In one's own block ``x = self.shortcut(x, self.attention(h), h)``, the same
    after the MLP. Of the paper's released forms this is the one called ``circulant2``.

    A layer begins as published, which is not what a trained block computes. With ``paths=1, scale=1.0, zero=True`` it
    begins as the plain residual sum, exactly, and its weights have a gradient.

    Args:
        dim: Width ``D``.
        paths: How many; the authors' number by default.
        blocks: Blocks per side of each map.
        scale: Factor ``s`` of the sum; the authors' by default.
        zero: Whether weights and biases begin at zero.

    Raises:
        ValueError: If ``blocks`` does not divide ``dim``, ``paths`` is no positive integer, ``scale`` is not finite, or
            several paths are to begin at zero.

    References:
        Tang et al., *Augmented Shortcuts for Vision Transformers*, NeurIPS 2021. https://arxiv.org/abs/2106.15941,
        code at https://github.com/huawei-noah/Efficient-AI-Backbones.

    Example:
        >>> shortcut = AugmentedShortcut(dim=8, paths=1, scale=1.0, zero=True)
        >>> x, attended = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
        >>> torch.equal(shortcut(x, attended, nn.functional.layer_norm(x, (8,))), x + attended)
        True
    """

    def __init__(self, dim: int, paths: int = 2, blocks: int = 4, scale: float = 0.75, zero: bool = False) -> None:
        super().__init__()
        require_whole(1, paths=paths)
        require_finite(scale=scale)
        if zero and paths > 1:
            raise ValueError(f"`paths` must be 1 with `zero=True`, got {paths}: from zero all would learn the same.")
        self.scale = scale
        self.paths = nn.ModuleList(BlockCirculant(dim, blocks, zero) for _ in range(paths))

    def forward(self, residual: Tensor, branch: Tensor, normed: Tensor) -> Tensor:
        """What the next layer receives, ``(..., D)``.

        Args:
            residual: The stream ``X``, shape ``(..., D)``.
            branch: What attention or the MLP returns, of the same shape.
            normed: What it received: the stream behind the norm.
        """
        return self.scale * (residual + branch + self.around(normed))

    def around(self, normed: Tensor) -> Tensor:
        """The sum of the paths alone, ``(..., D)``."""
        return sum((functional.gelu(path(normed)) for path in self.paths[1:]), functional.gelu(self.paths[0](normed)))

    def extra_repr(self) -> str:
        """Show the factor in ``print(model)``."""
        return f"scale={self.scale}"


@full_precision
def _circulant(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    blocks, _, width = weight.shape
    spectrum = torch.fft.rfft(features.reshape(*features.shape[:-1], blocks, width))
    product = torch.einsum("...jf,ijf->...if", spectrum, torch.fft.rfft(weight))
    moved: Tensor = torch.fft.irfft(product, n=width).flatten(-2)
    return moved + bias
