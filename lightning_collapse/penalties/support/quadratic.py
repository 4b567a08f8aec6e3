"""Quadratic penalty: a pull of each weight toward where it was, as strong as it matters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters, Penalty
from lightning_collapse.penalties.support.consolidation import is_finite
from lightning_collapse.penalties.support.shards import add_to_gradients, copy_of, largest, total
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.modules import clean_name
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.sharding import local


class QuadraticPenalty(Penalty):
    r"""What penalties with an importance :math:`S_{k,i}` of every weight :math:`i` for every task :math:`k` share.

    .. math:: w f \sum_k \sum_i S_{k,i} (\theta_i - \theta^*_{k,i})^2

    with :math:`w` the ``weight`` and :math:`f` 1 or 1/2, as published. The sum over tasks is exact and its memory does
    not grow with them: with :math:`S = \sum_k S_k`, :math:`d` the distance to the latest :math:`\theta^*_T`,
    :math:`m = \sum_k S_k (\theta^*_k - \theta^*_T)` and :math:`q = \sum_k S_k \cdot (\theta^*_k - \theta^*_T)^2` it is
    :math:`S \cdot d^2 - 2 m \cdot d + q`. When the anchor moves by :math:`D`, then :math:`m' = m - S D` and
    :math:`q' = q - 2 m \cdot D + S \cdot D^2`; differences to the latest anchor lose no digits to cancellation.

    A parameter without gradient keeps its memory and gets no pull.

    Attributes:
        factor: :math:`f`.
        known_by: Kind of memory that every parameter has which is pulled.
    """

    factor: ClassVar[float] = 1.0
    known_by: ClassVar[str] = "importance"

    def __init__(self, weight: float) -> None:
        super().__init__(weight)
        self._offsets: dict[str, Tensor] = {}

    @property
    def strength(self) -> float:
        """Factor of the sum over tasks."""
        return self.weight * self.factor

    @override
    def start(self, parameters: Parameters) -> None:
        self.state.place(parameters, follow=("anchor", "mark"))
        self._offsets = {
            name: q.to(local(parameters[name]).device) for name, q in self._offsets.items() if name in parameters
        }

    @override
    @torch.no_grad()
    def add_gradients(self, parameters: Parameters, scale: Tensor | None = None) -> None:
        table = self.state[self.known_by]
        pulled = {name: p for name, p in parameters.items() if name in table and p.requires_grad}
        if not pulled or not self.strength:
            return
        pulls = self._distances(pulled)
        importances = self._importances(pulled)
        if importances is not None:
            foreach.mul_(pulls, importances)
        if self.state["moment"]:
            foreach.sub_(pulls, self._parts("moment", pulled))
        add_to_gradients(list(pulled.values()), pulls, 2 * self.strength, scale)

    @override
    def value(self, parameters: Parameters) -> Tensor:
        known = {name: parameter for name, parameter in parameters.items() if name in self.state[self.known_by]}
        if not known:
            return _nothing(parameters)
        distances = self._distances(known)
        importances = self._importances(known)
        terms = distances if importances is None else list(foreach.mul(distances, importances))
        if self.state["moment"]:
            terms = list(foreach.sub(terms, foreach.mul(self._parts("moment", known), 2.0)))
        value = total([product.sum() for product in foreach.mul(terms, distances)], known.values())
        offsets = [self._offsets[name] for name in known if name in self._offsets]
        if offsets:
            value = value + torch.stack(offsets).sum().to(value)
        return self.strength * value.clamp_min(0)  # a sum of squares, but for rounding

    @override
    @torch.no_grad()
    def curvature(self, parameters: Parameters) -> Tensor | None:
        table = self.state[self.known_by]
        pulled = {name: p for name, p in parameters.items() if name in table and p.requires_grad}
        if not pulled:
            return None
        importances = self._importances(pulled) or [torch.ones_like(part) for part in self._parts("anchor", pulled)]
        highest = [part.max() if part.numel() else part.new_zeros(()) for part in importances]
        return 2 * self.strength * largest(highest, pulled.values())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.state.whole(), "offsets": {name: q.clone() for name, q in self._offsets.items()}}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.state.load(state_dict["memory"])
        self._offsets = {name: q.clone() for name, q in state_dict["offsets"].items()}

    def _parameters_of(self, model: nn.Module) -> dict[str, Tensor]:
        """Those that :meth:`start` was told of.

        Raises:
            ValueError: If it was not called.
        """
        named = {clean_name(name): parameter for name, parameter in model.named_parameters()}
        known: dict[str, Tensor] = {name: p for name, p in named.items() if name in self.state.layouts}
        if not known:
            raise ValueError(
                f"`{type(self).__name__}` knows no parameter of {type(model).__name__}. Call"
                " `penalty.start(dict(model.named_parameters()))` before the first step of a task."
            )
        return known

    @torch.no_grad()
    def _remember(
        self, parameters: Parameters, importance: Mapping[str, Tensor], kept: float = 1.0, every_anchor: bool = False
    ) -> None:
        """Anchor the parameters where they are, with the importance of a task added to ``kept`` times that of before.

        One that is not finite, of a model that has diverged, is left out with a warning. Collective.

        Args:
            parameters: All.
            importance: This process's parts, by name; 0 where there is none.
            kept: What is left of the importance that was there.
            every_anchor: Whether earlier tasks keep their own anchors.
        """
        if not is_finite(self, importance.values()):
            return
        anchors, importances, moments = (self.state[kind] for kind in ("anchor", "importance", "moment"))
        for name, parameter in parameters.items():
            if name not in importance and name not in importances:
                continue
            now = copy_of(parameter)
            before = importances.get(name)
            if before is None:
                importances[name] = torch.zeros_like(now)
            elif every_anchor:
                self._move(name, parameter, now - anchors[name], before)
            if every_anchor:
                moments.setdefault(name, torch.zeros_like(now))
            importances[name] = kept * importances[name]
            if name in importance:
                importances[name] += importance[name]
            anchors[name] = now

    def _move(self, name: str, parameter: Tensor, by: Tensor, importance: Tensor) -> None:
        moment = self.state["moment"][name]
        change = (by * (importance * by - 2 * moment)).to(accumulation_dtype(by.device)).sum()
        self._offsets[name] = self._offsets.get(name, change.new_zeros(())) + total([change], [parameter])
        self.state["moment"][name] = moment - importance * by

    def _distances(self, parameters: Parameters) -> list[Tensor]:
        here = [local(parameter) for parameter in parameters.values()]
        return list(foreach.sub(here, self._parts("anchor", parameters)))

    def _importances(self, parameters: Parameters) -> list[Tensor] | None:
        """One for each parameter, or ``None`` for 1."""
        return self._parts("importance", parameters)

    def _take_anchors(self, parameters: Parameters) -> None:
        """Anchor where they are now those that have no anchor yet; frozen ones wait, for they stay where they are."""
        anchors = self.state["anchor"]
        new = {name: p for name, p in parameters.items() if name in self.state.layouts and name not in anchors}
        new = {name: parameter for name, parameter in new.items() if not _is_frozen(parameter)}
        anchors.update({name: copy_of(parameter) for name, parameter in new.items()})

    def _parts(self, kind: str, parameters: Parameters) -> list[Tensor]:
        table = self.state[kind]
        return [table[name] for name in parameters]


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _nothing(parameters: Parameters) -> Tensor:
    for parameter in parameters.values():
        here = local(parameter)
        return torch.zeros((), dtype=torch.promote_types(here.dtype, torch.float32), device=here.device)
    return torch.zeros(())
