"""Max-norm constraint (weight balancing): no row of a weight grows longer than a radius."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.constraints.constraint import Constraint
from lightning_collapse.callbacks.constraints.layer_weights import layer_weights
from lightning_collapse.utilities.arguments import check_layers, require_positive
from lightning_collapse.utilities.weight_matrices import whole


class MaxNorm(Constraint):
    r"""Projects every row of the weights onto a ball, after each optimizer step.

    .. math:: w \leftarrow w \cdot \min(1,\, \delta / \|w\|)

    A row is all that leads to one output of a linear or convolutional layer. Frequent classes cannot have much longer
    rows than rare ones [1], and units cannot lean on one large weight [2]. Rows inside the ball keep every bit, rows of
    zeros too. Biases stay. Published are the last layer, retrained with a weight decay of 0.1, [1] and all hidden
    layers with a squared length of 15 at most, beside dropout [2].

    Works with all that :class:`~lightning_collapse.Constraint` works with; nothing waits for the device. Radii that
    were measured are in the state, so that a resumed run goes on with them.

    Args:
        radius: δ. ``None`` measures one per layer when the fit starts: the shortest row, and a tenth of what the
            longest has more [1].
        layers: Names of modules, or glob patterns of them, each with all inside it; by default every linear and
            convolutional layer.

    Raises:
        ValueError: If ``radius`` is not positive, or ``layers`` is no list of names.
        MisconfigurationException: When the fit starts, if a pattern matches nothing, there is no weight, or its rows
            are all zeros and so have no radius; as :class:`~lightning_collapse.Constraint` besides.

    References:
        [1] Alshammari et al., *Long-Tailed Recognition via Weight Balancing*, CVPR 2022.
        https://arxiv.org/abs/2203.14197; radius of the authors' code.
        [2] Hinton et al., *Improving neural networks by preventing co-adaptation of feature detectors*, 2012.
        https://arxiv.org/abs/1207.0580

    Example::

        trainer = Trainer(callbacks=[MaxNorm(layers=["head"])])  # after `SGD(head.parameters(), weight_decay=0.1)`
    """

    def __init__(self, radius: float | None = None, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        if radius is not None:
            require_positive(radius=radius)
        check_layers(layers, "all linear and convolutional layers")
        self.radius = radius
        self.layers = layers
        self._radii: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] = {}
        self._dims: dict[str, tuple[int, ...]] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(radius=self.radius, layers=self.layers)

    @override
    def choose(self, pl_module: LightningModule) -> Mapping[str, Tensor]:
        found = layer_weights(pl_module, self.layers, "MaxNorm")
        rows = {name: 1 if turned else 0 for name, (_, turned) in found.items()}
        self._dims = {n: tuple(i for i in range(w.ndim) if i != rows[n]) for n, (w, _) in found.items()}
        return {name: weight for name, (weight, _) in found.items()}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        kept = self._restored
        self._radii = {n: kept[n] if n in kept else self._measure(n, w) for n, w in self._weights.items()}
        self._restored = {}

    @override
    def apply(self, name: str, weight: Tensor) -> None:
        radius = self._radii[name]
        if radius.device != weight.device:  # of a checkpoint, once
            radius = self._radii[name] = radius.to(weight.device)
        lengths = self._lengths(name, weight)
        radius = radius.to(lengths.dtype)
        # a product with 1 changes no bit, and a length that is no number is not above the radius
        weight.mul_(torch.where(lengths > radius, radius / lengths, 1.0).to(weight.dtype))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"radii": {name: radius.to("cpu", copy=True) for name, radius in self._radii.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict["radii"])
        if self._weights:  # strategies that restore when the fit has started
            self._radii |= self._restored

    @torch.no_grad()
    def _measure(self, name: str, weight: Tensor) -> Tensor:
        """The radius of a layer, 0-dimensional. Collective where weights are sharded."""
        if self.radius is not None:
            return torch.tensor(self.radius, dtype=torch.float32, device=weight.device)
        lengths = whole(self._lengths(name, weight))
        radius = lengths.min() + 0.1 * (lengths.max() - lengths.min())
        if not radius > 0:
            raise MisconfigurationException(
                f"`MaxNorm`: the rows of `{name}` are all zeros, or not finite, which leaves no radius. Name one:"
                " `MaxNorm(radius=1.0)`."
            )
        return radius

    def _lengths(self, name: str, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        lengths: Tensor = torch.linalg.vector_norm(weight.detach(), dim=self._dims[name], keepdim=True, dtype=wide)
        return lengths
