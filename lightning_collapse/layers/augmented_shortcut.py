"""Augmented shortcuts: paths around attention that keep tokens apart, with block-circulant weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from lightning_collapse.layers.conversion import ConvertedModule, Start, convert_modules
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import check_layers, require_finite, require_whole
from lightning_collapse.utilities.modules import find_modules
from lightning_collapse.utilities.private_torch import FUSED_IN_EVAL
from lightning_collapse.utilities.registry import register_layer

_SOURCE = "Tang et al., NeurIPS 2021, arXiv 2106.15941"


class AugmentedShortcut(nn.Module):
    r"""Residual sum with paths beside the identity: each is a block-circulant map and a GELU, token by token.

    .. math:: X' = s \big(X + F(H) + \sum_i \operatorname{GELU}(H \Theta_i + b_i)\big), \quad H = \operatorname{norm}(X)

    Attention averages tokens; the paths do not, and the distance of tokens from their mean stays above what the
    identity alone would keep. In one's own block ``x = self.shortcut(x, self.attention(h), h)``, and the same of the
    MLP. It is the authors' ``circulant2``, and no identity: in a trained network see :class:`AugmentedBranch`.

    The matrix has ``blocks x blocks`` blocks, each circulant, :math:`W_{ij} = w_{(i - j) \bmod n}` with
    ``n = D / blocks``: ``blocks * D`` weights. The product is a fast Fourier transform; the matrix is never made.

    Args:
        dim: Width ``D``.
        paths: How many; the authors' number by default, and so are the others.
        blocks: Blocks per side of each map, of which ``dim`` is a multiple.
        scale: Factor ``s`` of the sum.

    Attributes:
        weight: First columns of the blocks, shape ``(paths, blocks, blocks, D / blocks)``.
        bias: Shape ``(paths, D)``.

    Raises:
        ValueError: If an argument is out of range, or ``blocks`` does not divide ``dim``.

    References:
        Tang et al., *Augmented Shortcuts for Vision Transformers*, NeurIPS 2021. https://arxiv.org/abs/2106.15941,
        code at https://github.com/huawei-noah/Efficient-AI-Backbones.

    Example:
        >>> shortcut, x = AugmentedShortcut(dim=8), torch.randn(1, 5, 8)
        >>> shortcut(x, branch=torch.zeros_like(x), normed=nn.functional.layer_norm(x, (8,))).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int, paths: int = 2, blocks: int = 4, scale: float = 0.75) -> None:
        super().__init__()
        _require_divisor(dim, blocks)
        require_whole(1, paths=paths)
        require_finite(scale=scale)
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(paths, blocks, blocks, dim // blocks))
        self.bias = nn.Parameter(torch.empty(paths, dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights and biases uniformly up to ``1 / sqrt(D)``, as the authors do."""
        bound = self.bias.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)

    def forward(self, residual: Tensor, branch: Tensor, normed: Tensor) -> Tensor:
        """The next stream ``(..., D)``, from the stream, what attention or the MLP returns, and what it received."""
        return self.scale * (residual + branch + _paths(normed, self.weight, self.bias).to(normed.dtype))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        paths, blocks, _, width = self.weight.shape
        return f"dim={blocks * width}, paths={paths}, blocks={blocks}, scale={self.scale}"


@register_layer
class AugmentedBranch(ConvertedModule):
    r"""An attention or MLP with a path beside it, which begins at zero: ``F(H) + GELU(H Theta + b)``.

    In a pre-norm block ``x = x + self.attention(self.norm(x))`` that is an :class:`AugmentedShortcut` of one path and
    factor 1. No output changes, and the weights have a gradient. Several paths would be one: from zero they receive
    equal gradients for ever. There is no way back. To begin at zero is ours.

    Attributes:
        circulant: Shape ``(1, blocks, blocks, D / blocks)``. Give both no weight decay.
        circulant_bias: Shape ``(1, D)``.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        ...     def forward(self, x):
        ...         return x + self.mlp(self.norm(x))
        >>> net, x = nn.Sequential(Block(), Block()), torch.randn(1, 5, 8)
        >>> before = net(x)
        >>> AugmentedBranch.convert_(net, branches=["*.mlp"], dim=8), torch.equal(net(x), before)
        (['0.mlp', '1.mlp'], True)
    """

    adds = ("circulant", "circulant_bias")
    converts = "attention and MLPs that are named"
    resists = "tokens that become alike with depth"
    cost = "a Fourier transform of every token"
    source = _SOURCE
    circulant: nn.Parameter
    circulant_bias: nn.Parameter

    @classmethod
    def convert_(
        cls,
        model: nn.Module,
        branches: Sequence[str],
        dim: int,
        blocks: int = 4,
        exclude: Sequence[str] | None = None,
    ) -> list[str]:
        """Convert branches in place, before the optimizer is made, and before ``fully_shard`` or DDP.

        Args:
            model: Changed in place.
            branches: Names of the branches themselves, or glob patterns: modules whose first argument is the stream
                behind a norm, and that return, alone or first, what is added to the stream.
            dim: Width ``D`` of the stream.
            blocks: Blocks per side of the map.
            exclude: Names of modules, or glob patterns of them, each with all inside it, that stay as they are.

        Returns:
            Names of the modules that were converted.

        Raises:
            ValueError: If an argument is wrong, or a pattern matches nothing.
            ConversionError: If a module is part of torch's transformer layers, which leave it out in evaluation; and
                see :func:`~lightning_collapse.layers.convert_modules`.
        """
        _require_divisor(dim, blocks)
        check_layers(branches, "nothing", "branches")
        chosen = {id(module) for module in find_modules(model, branches).values()}
        fused = {id(m) for layer in model.modules() if isinstance(layer, FUSED_IN_EVAL) for m in layer.children()}
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

        def look(name: str, module: nn.Module) -> Start | str | None:
            if id(module) in chosen & fused:
                return "torch's transformer layer leaves it out in evaluation. Write the layer out"
            shape = 1, blocks, blocks, dim // blocks
            start = lambda branch: branch.begin(like.new_zeros(shape), like.new_zeros(1, dim))  # noqa: E731
            return start if id(module) in chosen else None

        return convert_modules(model, cls, look, exclude=exclude)

    def begin(self, circulant: Tensor, bias: Tensor) -> None:
        """Add the weights of the path."""
        self.circulant, self.circulant_bias = nn.Parameter(circulant), nn.Parameter(bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, with the path added to it, or to the first of several."""
        normed = args[0] if args else next(iter(kwargs.values()))
        path = _paths(normed, self.circulant, self.circulant_bias).to(normed.dtype)
        output = super().forward(*args, **kwargs)
        return (output[0] + path, *output[1:]) if isinstance(output, tuple) else output + path

    def why_not_fold(self) -> str:
        """No weights of the module do what a path around it does."""
        return "no weights of its own do what the path does. Keep it"


@full_precision
def _paths(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum of all paths, ``(..., D)``: products with circulant blocks are circular convolutions."""
    _, blocks, _, width = weight.shape
    if features.shape[-1] != bias.shape[1]:
        raise ValueError(f"`dim` is {bias.shape[1]}, and what the branch received has {features.shape[-1]} features.")
    spectrum = torch.fft.rfft(features.reshape(*features.shape[:-1], blocks, width))
    product = torch.einsum("...jf,pijf->...pif", spectrum, torch.fft.rfft(weight))
    return gelu(torch.fft.irfft(product, n=width).flatten(-2) + bias).sum(dim=-2)


def _require_divisor(dim: int, blocks: int) -> None:
    require_whole(1, dim=dim, blocks=blocks)
    if dim % blocks:
        raise ValueError(f"`dim` must be a multiple of `blocks`, got {dim} and {blocks}. Choose a divisor.")
