"""Synaptic intelligence (SI): a penalty on weights that have lowered the loss of old tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters
from lightning_collapse.penalties.support.path_integral import PathPenalty
from lightning_collapse.penalties.support.shards import copy_of
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.registry import register_penalty


@register_penalty
class SynapticIntelligence(PathPenalty):
    r"""Importance by the path integral of the gradient over a task, at no extra pass over data [1].

    .. math:: w \sum_i \Omega_i (\theta_i - \theta^*_i)^2, \quad
        \Omega_i = \sum_k \frac{\max(\omega_{k,i}, 0)}{(\Delta_{k,i})^2 + \xi}, \quad
        \omega_{k,i} = -\sum_t g_i(t) \, (\theta_i(t+1) - \theta_i(t))

    with :math:`g` the gradient of the task alone, :math:`\theta^*` the weights at the end of the last task and
    :math:`\Delta_k` their way through task :math:`k`. No factor 1/2, as in the paper. The paper writes no maximum; its
    code has it, since a weight that has raised the loss would otherwise be pushed away.

    Args:
        weight: ``w``, in the paper ``c``; 0.1 is its value on permuted MNIST.
        damping: ξ.

    Raises:
        ValueError: If ``weight`` is negative or ``damping`` not positive.

    References:
        [1] Zenke, Poole & Ganguli, *Continual learning through synaptic intelligence*, ICML 2017.
        https://arxiv.org/abs/1703.04200

    Example::

        trainer = Trainer(callbacks=[WeightPenalty(SynapticIntelligence(weight=0.1))])
    """

    remembers = "what each weight brought on its path"
    source = "Zenke et al., ICML 2017, arXiv 1703.04200"

    def __init__(self, weight: float = 0.1, damping: float = 0.1) -> None:
        super().__init__(weight)
        if not damping > 0:
            raise ValueError(f"`damping` must be positive, got {damping}.")
        self.damping = damping

    @override
    def _take_anchors(self, parameters: Parameters) -> None:
        super()._take_anchors(parameters)
        paths, anchors = self.state["path"], self.state["anchor"]
        paths.update({name: torch.zeros_like(anchors[name]) for name in anchors if name not in paths})

    @override
    @torch.no_grad()
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        self._settle()
        self._buffers.clear()
        parameters, anchors = self._parameters_of(model), self.state["anchor"]
        paths = self.state["path"]
        self._remember(
            parameters,
            {
                name: paths[name].clamp_min(0) / ((copy_of(parameter) - anchors[name]) ** 2 + self.damping)
                for name, parameter in parameters.items()
                if name in paths
            },
        )
        foreach.zero_(list(paths.values()))

    @override
    def _advance(self, parameters: Parameters, gradients: list[Tensor], steps: list[Tensor]) -> None:
        foreach.addcmul_(self._parts("path", parameters), gradients, steps)
