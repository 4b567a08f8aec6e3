"""LayerScale and ReZero: every residual branch is multiplied by a learned gain, per channel or as a whole."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_collapse.layers.conversion import Start, convert_modules
from lightning_collapse.layers.reparametrized import Reparametrized
from lightning_collapse.utilities.arguments import require_finite, require_whole
from lightning_collapse.utilities.module_tree import is_transposed
from lightning_collapse.utilities.modules import find_modules
from lightning_collapse.utilities.registry import register_layer

_ENDS = re.compile(
    r"\.(\d+)\.(.*\.)?(out_proj|linear2|proj|fc2|o_proj|down_proj|c_proj|o|wo|to_out|dense_4h_to_h|output\.dense)$"
)


def layer_scale_init(depth: int) -> float:
    """What the gains of LayerScale start from in a network that is not trained yet.

    Args:
        depth: Number of blocks.

    Returns:
        0.1 up to 18 blocks, 1e-5 up to 24, 1e-6 above.

    References:
        Touvron et al., *Going Deeper with Image Transformers*, ICCV 2021. https://arxiv.org/abs/2103.17239

    Example:
        >>> layer_scale_init(12), layer_scale_init(24), layer_scale_init(36)
        (0.1, 1e-05, 1e-06)
    """
    require_whole(1, depth=depth)
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


class _GainedBranch(Reparametrized):
    """The last linear layer of a residual branch, whose outputs are multiplied by gains."""

    adds = ("gain", "columns")
    converts = "the last linear layers of residual branches, by their usual names or those in `branches`"
    gain: nn.Parameter
    columns: bool

    def effective(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter times the gains of the outputs."""
        gain: Tensor = self.gain
        if not self.columns:
            gain = gain.view(-1, *[1] * (parameter.ndim - 1))
        return (parameter * gain).to(parameter.dtype)


@register_layer
class LayerScale(_GainedBranch):
    r"""The last linear layer of a residual branch, with one gain per channel: :math:`x + \operatorname{diag}(g) F(x)`.

    Small gains make a deep stack start near the identity. They multiply the rows of weight and bias, which is the same,
    costs no pass over the activations and works inside of fused kernels. Under 16-bit autocast (``float16``) products
    below 6e-8 are 0: there 1e-5 is as good as :class:`ReZero`.

    Attributes:
        gain: g, shape ``(O,)``; give it no weight decay, see :meth:`added_parameters`.

    References:
        Touvron et al., *Going Deeper with Image Transformers*, ICCV 2021. https://arxiv.org/abs/2103.17239

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
        >>> LayerScale.convert_(encoder, init=layer_scale_init(2))
        ['layers.0.self_attn.out_proj', 'layers.0.linear2', 'layers.1.self_attn.out_proj', 'layers.1.linear2']
    """

    resists = "deep stacks that do not train"
    cost = "a product with the weight per pass; none after `revert_`"
    source = "Touvron et al. 2021, arXiv 2103.17239"

    @classmethod
    def convert_(
        cls,
        model: nn.Module,
        init: float = 1.0,
        branches: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> list[str]:
        """Convert the last linear layer of every residual branch in place.

        Args:
            model: Changed in place.
            init: What all gains start from: 1 changes nothing, :func:`layer_scale_init` says what the authors give
                networks that are not trained yet.
            branches: Names of these layers, or glob patterns of them; by default those in numbered blocks with the
                names that models have for them (``out_proj``, ``linear2``, ``proj``, ``fc2``, ``o_proj``,
                ``down_proj``, ``c_proj``, ``output.dense`` ...).
            exclude: The same, of those that stay as they are.

        Returns:
            Names of the layers that were converted.

        Raises:
            ValueError: If an argument is wrong, or there is nothing to convert.
            ConversionError: If a layer cannot be converted.
        """
        require_finite(init=init)
        look = partial(_look, start=partial(_start, init=init), named=branches is not None)
        return convert_modules(model, cls, look, branches, exclude)


@register_layer
class ReZero(_GainedBranch):
    """The last linear layer of a residual branch, with one gain: ``x + g F(x)``.

    At 0, as published for networks that are not trained yet and have no norms, the first step moves gains alone.

    Attributes:
        gain: g, shape ``(1,)``; give it no weight decay, see :meth:`added_parameters`.

    References:
        Bachlechner et al., *ReZero is All You Need: Fast Convergence at Large Depth*, UAI 2021.
        https://arxiv.org/abs/2003.04887

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
        >>> names = ReZero.convert_(encoder, init=0.0, blocks=["layers.*"])
        >>> list(ReZero.added_parameters(encoder))
        ['layers.0.self_attn.out_proj.gain', 'layers.1.self_attn.out_proj.gain']
    """

    resists = "deep stacks that do not train"
    cost = "a product with the weight per pass; none after `revert_`"
    source = "Bachlechner et al. 2021, arXiv 2003.04887"

    @classmethod
    def convert_(
        cls,
        model: nn.Module,
        init: float = 1.0,
        branches: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        blocks: Sequence[str] | None = None,
    ) -> list[str]:
        """Convert the last linear layer of every residual branch in place.

        Args:
            model: Changed in place.
            init: What all gains start from: 1 changes nothing, 0 is the authors'.
            branches: As in :meth:`LayerScale.convert_`.
            exclude: As there.
            blocks: Names of blocks, or glob patterns of them, in which all branches share one gain, as in the authors'
                code; by default each has its own.

        Returns:
            Names of the layers that were converted.

        Raises:
            ValueError: If an argument is wrong, or there is nothing to convert.
            ConversionError: If a layer cannot be converted.
        """
        require_finite(init=init)
        shared: dict[int, list[nn.Parameter]] = {}
        for block in find_modules(model, blocks).values() if blocks else ():
            gain: list[nn.Parameter] = []
            for module in block.modules():
                shared.setdefault(id(module), gain)  # a pattern may match a block and what is in it
        start = partial(_start, init=init, single=True, shared=shared)
        look = partial(_look, start=start, named=branches is not None)
        return convert_modules(model, cls, look, branches, exclude)


def _look(name: str, module: nn.Module, start: Any, named: bool) -> Start | str | None:
    if not isinstance(module, nn.Linear) and not is_transposed(module):
        alone = named and next(module.children(), None) is None and next(module.parameters(), None) is not None
        return f"it is a {type(module).__name__}, and a branch ends in a linear layer. Name that" if alone else None
    return partial(start, columns=is_transposed(module)) if named or _ENDS.search(f".{name}") else None


def _start(
    layer: Any, columns: bool, init: float, single: bool = False, shared: Mapping[int, list[nn.Parameter]] | None = None
) -> None:
    layer.columns = columns
    weight: Tensor = layer._parameters["weight"]
    gains = (shared or {}).get(id(layer), [])
    if not gains:
        size = 1 if single else weight.shape[-1 if columns else 0]
        gains.append(nn.Parameter(weight.detach().new_full((size,), init)))
    layer.gain = gains[0]
