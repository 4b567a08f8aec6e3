"""L2 starting point (L2-SP): a pull toward pretrained weights while they are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters
from lightning_collapse.penalties.support.quadratic import QuadraticPenalty
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.registry import register_penalty


@register_penalty
class L2SP(QuadraticPenalty):
    r"""Weight decay whose zero is the starting point, for the weights that were pretrained [1].

    .. math:: \frac{\alpha}{2} \|\theta_S - \theta_S^0\|^2 + \frac{\beta}{2} \|\theta_{\bar S}\|^2

    with :math:`\theta_S^0` the weights at the very first start and :math:`\theta_{\bar S}` those that are new: named
    as such, or first seen at a later start, or what a parameter has grown by. It acts from the first step, and a frozen
    one is not copied before it is trained. Turn the weight decay of the optimizer off.

    Args:
        weight: α. The paper chooses it by cross-validation.
        new_weight: β.
        new: Glob patterns of names of parameters that are not pretrained, such as ``["head.*"]``.

    Raises:
        ValueError: If a weight is negative or not finite; at the first start if a pattern matches nothing.

    References:
        [1] Li, Grandvalet & Davoine, *Explicit inductive bias for transfer learning with convolutional networks*,
        ICML 2018. https://arxiv.org/abs/1802.01483

    Example:
        >>> import torch
        >>> weights = {"body": torch.ones(2, requires_grad=True), "head": torch.ones(2, requires_grad=True)}
        >>> penalty = L2SP(weight=0.1, new_weight=0.01, new=["head"])
        >>> penalty.start(weights)
        >>> penalty.add_gradients(weights)
        >>> weights["body"].grad, weights["head"].grad
        (tensor([0., 0.]), tensor([0.0100, 0.0100]))
    """

    remembers = "pretrained weights, while the new ones decay"
    source = "Li et al., ICML 2018, arXiv 1802.01483"
    factor = 0.5
    known_by = "pretrained"

    def __init__(self, weight: float = 0.1, new_weight: float = 0.01, new: Sequence[str] = ()) -> None:
        super().__init__(weight)
        if not 0 <= new_weight < inf:
            raise ValueError(f"`new_weight` must be finite and not negative, got {new_weight}.")
        self.new_weight = new_weight
        self.new = new
        self._waiting: dict[str, tuple[int, ...]] = {}  # frozen since the very first start, and their shapes then

    @property
    @override
    def strength(self) -> float:
        return self.factor  # both weights are in the importances

    @override
    def start(self, parameters: Parameters) -> None:
        first = not (self.state["pretrained"] or self._waiting)
        if first:
            self._check(parameters)
        parameters = self.state.place(parameters)  # zero where it has grown: not pretrained, and pulled to zero
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._waiting = shapes if first else {n: shape for n, shape in self._waiting.items() if n in parameters}
        self._take_anchors(parameters)

    @override
    def add_gradients(self, parameters: Parameters, scale: Tensor | None = None) -> None:
        self._take_anchors(parameters)  # of those that were frozen until now
        super().add_gradients(parameters, scale)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"waiting": {name: list(shape) for name, shape in self._waiting.items()}}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # version 0.1.0 has none, since it copied what is frozen
        self._waiting = {name: tuple(shape) for name, shape in state_dict.get("waiting", {}).items()}

    @override
    @torch.no_grad()
    def _take_anchors(self, parameters: Parameters) -> None:
        anchors, pretrained = self.state["anchor"], self.state["pretrained"]
        super()._take_anchors(parameters)
        for name in [name for name in anchors if name not in pretrained]:
            here, layout, old = anchors[name], self.state.layouts[name], self._waiting.pop(name, None)
            if any(fnmatchcase(name, pattern) for pattern in self.new):
                old = None
            pretrained[name] = torch.full_like(here, float(old is not None))
            if old is not None and old != layout.shape:  # it has grown while it was frozen
                whole = here.new_zeros(layout.shape)
                whole[tuple(slice(size) for size in old)] = 1
                pretrained[name] = layout.own(whole)
            anchors[name] = here.masked_fill_(pretrained[name] == 0, 0.0)

    @override
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        """Nothing: the starting point stays."""

    @override
    def _importances(self, parameters: Parameters) -> list[Tensor]:
        pretrained = foreach.mul(self._parts("pretrained", parameters), self.weight - self.new_weight)
        foreach.add_(pretrained, self.new_weight)
        return list(pretrained)

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        for pattern in self.new:
            if not any(fnmatchcase(name, pattern) for name in parameters):
                raise ValueError(f"`L2SP(new=[{pattern!r}])` matches no parameter. There are: {', '.join(parameters)}.")
