"""L2 starting point (L2-SP): a pull toward pretrained weights while they are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import inf

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters
from lightning_collapse.penalties.support.quadratic import QuadraticPenalty
from lightning_collapse.penalties.support.shards import copy_of
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.registry import register_penalty


@register_penalty
class L2SP(QuadraticPenalty):
    r"""Weight decay whose zero is the starting point, for the weights that were pretrained [1].

    .. math:: \frac{\alpha}{2} \|\theta_S - \theta_S^0\|^2 + \frac{\beta}{2} \|\theta_{\bar S}\|^2

    with :math:`\theta_S^0` the weights at the very first start and :math:`\theta_{\bar S}` those that are new: named
    as such, or first seen at a later start, or what a parameter has grown by. It acts from the first step. Turn the
    weight decay of the optimizer off.

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

    @property
    @override
    def strength(self) -> float:
        return self.factor  # both weights are in the importances

    @override
    def start(self, parameters: Parameters) -> None:
        first = not self.state["pretrained"]
        if first:
            self._check(parameters)
        parameters = self.state.place(parameters)  # zero where it has grown: not pretrained, and pulled to zero
        anchors, pretrained = self.state["anchor"], self.state["pretrained"]
        for name, parameter in parameters.items():
            if name not in pretrained:
                old = first and not any(fnmatchcase(name, pattern) for pattern in self.new)
                here = copy_of(parameter)
                anchors[name] = here if old else torch.zeros_like(here)
                pretrained[name] = torch.full_like(here, float(old))

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
