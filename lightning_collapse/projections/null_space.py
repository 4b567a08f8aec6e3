"""Null space of the feature covariance (Adam-NSCL): weights move only where all old inputs have next to no energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override

from lightning_collapse.functional.projection import null_share, null_space
from lightning_collapse.projections.input_subspace import InputSubspace, Subspace


class NullSpace(InputSubspace):
    r"""Protects all but the approximate null space of the second moment of inputs, summed over tasks [1].

    Directions are free whose eigenvalue is at most :math:`a` times the smallest one, see
    :func:`~lightning_collapse.functional.projection.null_space`, which tells the edge cases. Every task decides anew
    from the sum over all: unlike those of :class:`GPM`, directions can become free again when the smallest eigenvalue
    has grown. The authors project what Adam does; here it is what any optimizer does.

    Their released code divides the projector by its Frobenius norm, which makes the learning rate :math:`\sqrt{k}`
    times smaller in a null space of :math:`k` directions; that is not done here. It sums means over batches in place of
    inputs, which here are read one by one.

    :meth:`readings` has ``null_share`` besides, the share of old inputs' energy in the null space. Its authors find it
    below 0.05; far above, old outputs change and ``factor`` is too large. It is no warning where it is 0: fewer inputs
    were read than the layer is wide.

    The sum is kept in double precision: ``8 * D * D`` bytes for a layer with ``D`` inputs, in memory and in every
    checkpoint. That is 0.5 MiB for 256 inputs, and 128 MiB for 4096.

    Args:
        factor: :math:`a`, at least 1; 10 in [1], 30 for 20 tasks.
        n_samples: How many samples of a task are read; the authors read all. With fewer inputs than a layer is wide the
            null space is exact for these, and too large for the others.

    Raises:
        ValueError: If an argument is out of range.

    References:
        [1] Wang, Li, Sun & Xu, *Training Networks in Null Space of Feature Covariance for Continual Learning*, CVPR
        2021. https://arxiv.org/abs/2103.07113

    Example::

        trainer = Trainer(callbacks=[Projection(NullSpace(factor=10.0))])
    """

    accumulates = True

    def __init__(self, factor: float = 10.0, n_samples: int = 1000) -> None:
        super().__init__(n_samples)
        null_space(torch.eye(1), factor)  # tells what is wrong with it
        self.factor = factor

    @override
    def grow(self, second_moment: torch.Tensor, known: Subspace) -> Subspace:
        directions, _ = null_space(second_moment, self.factor)
        return Subspace(directions, torch.ones_like(directions[0]))

    @override
    def readings(self) -> dict[str, dict[str, float]]:
        found = super().readings()
        for name, moment in self.moments.items():
            share = null_share(moment, self.subspaces[name].directions)
            found[name.rpartition(".")[0]]["null_share"] = float(share)
        return found

    @override
    def nbytes(self) -> int:
        return super().nbytes() + sum(8 * layer.width**2 for layer in self._layers.values())

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"moments": {name: moment.clone() for name, moment in self.moments.items()}}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.moments = {name: moment.clone() for name, moment in state_dict["moments"].items()}
