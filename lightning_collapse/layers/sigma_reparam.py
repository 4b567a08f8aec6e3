"""Sigma-reparametrization: every weight is divided by its spectral norm and multiplied by a learned one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_collapse.functional.spectral_reparam import (
    power_step,
    singular_vectors,
    spectral_estimate,
    spectral_reparam,
)
from lightning_collapse.layers.conversion import Start, convert_modules, unreadable
from lightning_collapse.layers.reparametrized import Reparametrized
from lightning_collapse.utilities.arguments import require_one_of
from lightning_collapse.utilities.module_tree import is_transposed
from lightning_collapse.utilities.registry import register_layer
from lightning_collapse.utilities.weight_matrices import whole

Init = Literal["identity", "unit"]
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


@register_layer
class SigmaReparam(Reparametrized):
    r"""A linear or convolutional layer of the weight :math:`\hat W = (\gamma / \sigma) W`.

    :math:`\sigma` is the spectral norm of :math:`W` and :math:`\gamma` a learned scalar, so that attention logits grow
    no faster than :math:`\gamma` does and attention does not become one-hot in a few steps. The authors train with it
    without warm-up, weight decay or norms before the layers.

    :math:`\sigma = u^\top W v`, in ``float32`` at least, with the gradient through :math:`W`. The vectors come from an
    exact decomposition, and follow by one power step per optimizer step, outside of the forward pass: put
    :class:`~lightning_collapse.callbacks.SigmaReparamUpdate` into the trainer, or call :meth:`update_` after
    ``optimizer.step()``. A state without vectors loads: they are computed, and :math:`\gamma` with them, so that the
    layer does what the plain one did.

    A power step per update follows weights of which an update changes little: within 1 % for those of unit variance and
    Adam at 1e-3. With ``nn.Linear``'s own small ones, of which that changes over 1 % at a step, another direction can
    overtake, and :math:`\sigma` was seen 23 % too small for a while: ``update_(exact=True)`` now and then.

    All of ``nn.Linear``, convolutions, Hugging Face's ``Conv1D`` and the packed projection of
    ``nn.MultiheadAttention``; queries, keys and values in one weight have one :math:`\sigma`.

    Attributes:
        gamma: γ, shape ``(1,)``; give it no weight decay, see :meth:`added_parameters`.
        u: Left vector, ``(O,)``, at least ``float32`` whatever the model is cast to.
        v: Right vector, ``(I,)``.

    References:
        Zhai et al., *Stabilizing Transformer Training by Preventing Attention Entropy Collapse*, ICML 2023.
        https://arxiv.org/abs/2303.06296, code at https://github.com/apple/ml-sigma-reparam. There :math:`\sigma` moves
        inside of the forward pass, which activation checkpointing would run twice.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> SigmaReparam.convert_(net), list(SigmaReparam.added_parameters(net))
        (['0', '2'], ['0.gamma', '2.gamma'])
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> SigmaReparam.update_(net)
        >>> SigmaReparam.revert_(net)
        ['0', '2']
    """

    adds = ("gamma", "u", "v", "reparametrized")
    converts = "linear and convolutional layers"
    resists = "attention entropy collapse, exploding logits"
    cost = "a matrix-vector product per pass, two per step"
    source = "Zhai et al. 2023, arXiv 2303.06296"
    gamma: nn.Parameter
    u: Tensor
    v: Tensor
    reparametrized: str

    @classmethod
    def convert_(
        cls,
        model: nn.Module,
        init: Init = "identity",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> list[str]:
        r"""Convert layers in place, before the optimizer is made, and before ``fully_shard`` or DDP.

        Args:
            model: Changed in place.
            init: ``"identity"``: :math:`\gamma = \sigma`, so that no output changes, as in the authors' vision code;
                ``"unit"``: :math:`\gamma = 1`, as in the paper, which changes what the model computes.
            include: Names of modules, or glob patterns of them, each with all inside it; all by default.
            exclude: The same, of those that stay as they are. The authors convert all linear layers.

        Returns:
            Names of the modules that were converted.

        Raises:
            ValueError: If an argument is wrong, or there is nothing to convert.
            ConversionError: If a layer cannot be converted; see
                :func:`~lightning_collapse.layers.convert_modules`, and a weight of zeros has no direction.
        """
        require_one_of(get_args(Init), init=init)
        return convert_modules(model, cls, partial(_look, init=init), include, exclude)

    @classmethod
    def update_(cls, model: nn.Module, weights: Iterable[Tensor] | None = None, exact: bool = False) -> None:
        """Have the vectors follow the weights: call it once after each step of the optimizer.

        On sharded weights it is collective: every process must call it.

        Args:
            model: The model.
            weights: Those that have moved; all by default.
            exact: Compute them anew, where weights have moved far: averaged, merged or copied ones.
        """
        moved = None if weights is None else {id(weight) for weight in weights}
        for layer in model.modules():
            if isinstance(layer, cls) and (moved is None or id(layer.raw) in moved):
                layer.follow(layer.raw, exact)

    @property
    def raw(self) -> Tensor:
        """The parameter W, sharded if it is."""
        return self._parameters[self.reparametrized]  # type: ignore[return-value]

    @torch.no_grad()
    def follow(self, weight: Tensor, exact: bool = False) -> None:
        """One power step of the vectors for a value of the weight, or exact ones. Collective if it is sharded."""
        weight = whole(weight)
        new = singular_vectors(weight) if exact else power_step(weight, self.u, self.v)
        for vector, value in zip((self.u, self.v), new, strict=True):
            vector.copy_(value)

    def effective(self, name: str, parameter: Tensor) -> Tensor:
        """The weight over its spectral norm, times γ."""
        if name != self.reparametrized:
            return parameter
        # copies: DDP writes buffers before each forward pass, of which there may be two before one backward pass
        return spectral_reparam(parameter, self.gamma, self.u.clone(), self.v.clone()).to(parameter.dtype)

    @torch.no_grad()
    def keep_function(self) -> None:
        """Set γ so that the layer does what one with its weight would. Collective if that is sharded."""
        self.gamma.fill_(float(self._sigma()))

    def _sigma(self) -> Tensor:
        return spectral_estimate(whole(self.raw), self.u, self.v)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.u, self.v
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.u.dtype.itemsize < 4:  # the model was cast to half precision
            self.u, self.v = (vector.to(self.u.device) for vector in exact)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + self.reparametrized not in state_dict:
            return
        _, _, missing, _, errors = rest
        if any(prefix + name not in state_dict for name in ("u", "v")):
            self.follow(self.raw, exact=True)
            if prefix + "gamma" not in state_dict:
                self.keep_function()
            filled = {prefix + name for name in self.adds}
            missing[:] = [key for key in missing if key not in filled]
        elif not self._sigma() > 0:
            errors.append(
                f"`{prefix}u` and `{prefix}v` do not belong to `{prefix}{self.reparametrized}`. Leave both out of the"
                " state, and they are computed."
            )


def _look(name: str, module: nn.Module, init: Init) -> Start | str | None:
    if not isinstance(module, _KINDS) and not is_transposed(module):
        return None
    attribute = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
    weight = module._parameters.get(attribute)
    if weight is None:
        return f"it has no parameter `{attribute}`: separate ones (`kdim`), or one that is computed. Make it plain"
    if not unreadable(weight) and not (weight.any() and weight.isfinite().all()):
        return f"its `{attribute}` is 0, or not finite, and has no spectral norm to divide by. Initialize it first"
    return partial(_start, attribute=attribute, init=init)


def _start(layer: Any, attribute: str, init: Init) -> None:
    layer.reparametrized = attribute
    weight = layer.raw
    for name, vector in zip(("u", "v"), singular_vectors(weight), strict=True):
        layer.register_buffer(name, vector)
    layer.gamma = nn.Parameter(weight.new_ones(1), requires_grad=weight.requires_grad)
    if init == "identity":
        layer.keep_function()
