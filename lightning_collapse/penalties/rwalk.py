"""Riemannian walk (RWalk): importance by Fisher information and path integral, from the training itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters
from lightning_collapse.penalties.support.path_integral import PathPenalty
from lightning_collapse.penalties.support.shards import copy_of, largest
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.registry import register_penalty


@register_penalty
class RWalk(PathPenalty):
    r"""Riemannian walk: online Fisher information plus a path integral measured by it, at no extra pass [1].

    .. math:: w \sum_i (\hat F_i + \hat s_i) (\theta_i - \theta^*_i)^2

    Every ``every_n_steps`` steps, with :math:`g` the gradient of the task on a batch,

    .. math:: s_i \leftarrow s_i + \max\Big(0, \frac{-\sum_t g_i(t) (\theta_i(t+1) - \theta_i(t))}
        {\frac12 F_i \, (\Delta\theta_i)^2 + \epsilon}\Big), \quad
        F_i \leftarrow \alpha \, \overline{g_i^2} + (1 - \alpha) F_i

    where sum, mean and :math:`\Delta\theta` are over these steps. At the end of a task its score is averaged with that
    of the tasks before, and both :math:`F` and :math:`s` are brought to the range 0 to 1 over all weights. No factor
    1/2, as in the paper. The squares are of gradients of batches, so the relation of :math:`F` to :math:`s` depends on
    the size of a batch.

    The authors' code differs: no 1/2 before :math:`F`, and the average is added to the old score.

    Args:
        weight: ``w``. The authors' code has 75000 on permuted MNIST; the default is ours, and a start.
        alpha: α, what the newest squares weigh, as in the authors' code.
        every_n_steps: Steps between two updates, as in the authors' code.
        epsilon: ε. The authors' code has 1e-32 or a damping of up to 0.1, by data set.

    Raises:
        ValueError: If an argument is out of range.

    References:
        [1] Chaudhry et al., *Riemannian walk for incremental learning: understanding forgetting and intransigence*,
        ECCV 2018. https://arxiv.org/abs/1801.10112

    Example::

        trainer = Trainer(callbacks=[WeightPenalty(RWalk(weight=1.0))])
    """

    remembers = "Fisher information along the path, and the score of the path"
    source = "Chaudhry et al., ECCV 2018, arXiv 1801.10112"
    counts_steps = True

    def __init__(self, weight: float = 1.0, alpha: float = 0.9, every_n_steps: int = 10, epsilon: float = 1e-3) -> None:
        super().__init__(weight)
        if not 0 < alpha <= 1:
            raise ValueError(f"`alpha` must be above 0 and at most 1, got {alpha}.")
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"`every_n_steps` must be a whole number of at least 1, got {every_n_steps!r}.")
        if not epsilon > 0:
            raise ValueError(f"`epsilon` must be positive, got {epsilon}.")
        self.alpha = alpha
        self.every_n_steps = every_n_steps
        self.epsilon = epsilon
        self._steps: dict[str, int] = {}  # in the running window

    @override
    def start(self, parameters: Parameters) -> None:
        super().start(parameters)
        self._steps = {name: self._steps.get(name, 0) for name in self.state.layouts}

    @override
    def _take_anchors(self, parameters: Parameters) -> None:
        super()._take_anchors(parameters)
        known = {name: p for name, p in parameters.items() if name in self.state["anchor"]}
        for kind in ("squares", "drop", "score"):
            table = self.state[kind]
            table.update({n: torch.zeros_like(copy_of(p)) for n, p in known.items() if n not in table})
        marks = self.state["mark"]
        marks.update({name: copy_of(parameter) for name, parameter in known.items() if name not in marks})

    @override
    @torch.no_grad()
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        self._settle()
        self._buffers.clear()
        parameters = self._parameters_of(model)
        self._close_window({name: parameter for name, parameter in parameters.items() if self._steps[name]})
        seen = {name: parameter for name, parameter in parameters.items() if name in self.state["fisher"]}
        past, scores = self.state["past"], self.state["score"]
        past.update({name: (past.get(name, scores[name]) + scores[name]) / 2 for name in seen})
        fishers, scored = (self._ranged(kind, seen) for kind in ("fisher", "past"))
        self._remember(parameters, {name: fishers[name] + scored[name] for name in seen}, kept=0.0)
        foreach.zero_(list(scores.values()))

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": dict(self._steps)}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._steps = dict(state_dict["steps"])

    @override
    def _advance(self, parameters: Parameters, gradients: list[Tensor], steps: list[Tensor]) -> None:
        foreach.addcmul_(self._parts("squares", parameters), gradients, gradients)
        foreach.addcmul_(self._parts("drop", parameters), gradients, steps)
        for name in parameters:
            self._steps[name] += 1
        self._close_window({n: p for n, p in parameters.items() if self._steps[n] == self.every_n_steps})

    def _close_window(self, parameters: Parameters) -> None:
        if not parameters:
            return
        squares, drops, scores, marks = (self._parts(kind, parameters) for kind in ("squares", "drop", "score", "mark"))
        foreach.div_(squares, [float(self._steps[name]) for name in parameters])
        fishers = self.state["fisher"]
        # where there is none yet it begins with the first squares, as in the authors' code
        fishers.update({name: squares[i].clone() for i, name in enumerate(parameters) if name not in fishers})
        running = self._parts("fisher", parameters)
        here = [copy_of(parameter) for parameter in parameters.values()]
        distances = foreach.sub(here, marks)
        foreach.mul_(distances, distances)
        foreach.mul_(distances, running)
        foreach.mul_(distances, 0.5)
        foreach.add_(distances, self.epsilon)
        gains = foreach.div(foreach.clamp_min(drops, 0.0), distances)
        foreach.add_(scores, gains)
        foreach.lerp_(running, squares, self.alpha)
        foreach.copy_(marks, here)
        foreach.zero_(squares)
        foreach.zero_(drops)
        self._steps.update(dict.fromkeys(parameters, 0))

    def _ranged(self, kind: str, parameters: Parameters) -> dict[str, Tensor]:
        """A table brought to the range 0 to 1 over all parameters, by its extremes."""
        parts = self._parts(kind, parameters)
        if not parts:
            return {}
        extremes = [torch.stack([part.max(), -part.min()]) if part.numel() else None for part in parts]
        found = [extreme for extreme in extremes if extreme is not None]
        top, bottom = (largest([pair[i] for pair in found], parameters.values()) for i in (0, 1))
        width = top + bottom
        width = torch.where(width > 0, width, 1.0)
        return {name: (part + bottom) / width for name, part in zip(parameters, parts, strict=True)}
