"""Rank-one elastic weight consolidation: a penalty on one direction per old task, its mean gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters, Penalty
from lightning_collapse.penalties.rank_one_fisher import rank_one_fisher
from lightning_collapse.penalties.support.consolidation import check_loader, is_finite, names_of, parts_of
from lightning_collapse.penalties.support.fisher_pass import Outputs
from lightning_collapse.penalties.support.output_gradients import Likelihood
from lightning_collapse.penalties.support.shards import add_to_gradients, copy_of, total, wide
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.modules import clean_name
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.registry import register_penalty
from lightning_collapse.utilities.sharding import local


@register_penalty
class RankOneEWC(Penalty):
    r"""Elastic weight consolidation with a Fisher information of rank one for every task [1].

    .. math:: \frac{w}{2} \sum_k c_k \big(\mu_k^\top (\theta - \theta^*_k)\big)^2, \quad
        \mu_k = \mathbb{E}\, g, \quad c_k = \frac{\mathbb{E} (\mu_k^\top g)^2}{\|\mu_k\|^4}

    with :math:`g` the gradient of the loss of a sample at the end :math:`\theta^*_k` of task :math:`k`. Fit for models
    whose gradients of samples point one way, such as diffusion models; there the paper adds generative distillation,
    without which this forgets more than a diagonal. One direction is kept for every task, and one anchor in all. Of
    several optimizers that step one after the other, each gets the pull where the one before has led.

    Args:
        weight: ``w``, 15000 in the paper for all data sets.
        likelihood: Of the outputs, see ``rank_one_fisher``.
        losses: Losses of samples, ``(B,)``, of a model and a batch, in place of ``likelihood``, ``outputs`` and
            ``labels``.
        n_samples: How many samples of a task it reads; ``None`` for all.
        outputs: The model's outputs on a batch; by default the model is called on the inputs.
        labels: Labels of a batch; by default the second of a pair, or what a mapping calls so.

    Raises:
        ValueError: If an argument is out of range.

    References:
        [1] Wang et al., ICLR 2026. https://arxiv.org/abs/2509.23593

    Example::

        trainer = Trainer(callbacks=[WeightPenalty(RankOneEWC(weight=15000.0))])
    """

    remembers = "the mean gradient, and how far gradients lie along it"
    source = "Wang et al., ICLR 2026, arXiv 2509.23593"
    needs_data = True

    def __init__(
        self,
        weight: float = 15000.0,
        likelihood: Likelihood = "categorical",
        losses: Callable[[Any, Any], Tensor] | None = None,
        n_samples: int | None = None,
        outputs: Outputs | None = None,
        labels: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(weight)
        if n_samples is not None:
            require_whole(1, n_samples=n_samples)
        self.likelihood = likelihood
        self.losses = losses
        self.n_samples = n_samples
        self.outputs = outputs
        self.labels = labels
        self._coefficients: list[Tensor] = []
        self._offsets: list[Tensor] = []  # how far the latest anchor is from each, along its direction
        self._everything: Parameters = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_everything": {}}  # the parameters of a running fit

    @override
    def start(self, parameters: Parameters) -> None:
        parameters = self.state.place(parameters, follow=("anchor",))
        first = next(iter(parameters.values()))
        self._coefficients, self._offsets = (
            [number.to(first.device, wide(first)) for number in numbers]
            for numbers in (self._coefficients, self._offsets)
        )
        self._everything = parameters

    @override
    @torch.no_grad()
    def add_gradients(self, parameters: Parameters, scale: Tensor | None = None) -> None:
        anchors = self.state["anchor"]
        pulled = {name: p for name, p in parameters.items() if name in anchors and p.requires_grad}
        if not pulled or not self.weight:
            return
        pulls = [torch.zeros_like(anchors[name]) for name in pulled]
        for k, along in enumerate(self._along()):  # of all parameters, whichever the optimizer has
            directions = [self.state[f"direction{k}"][name] for name in pulled]
            foreach.add_(pulls, foreach.mul(directions, self._coefficients[k] * along))
        add_to_gradients(list(pulled.values()), pulls, self.weight, scale)

    @override
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        """Find the direction of the task where the model stands, in two passes over the data. Collective.

        Raises:
            ValueError: If there are no data.
        """
        loader = check_loader(self, loader)
        names = names_of(model, self._everything)
        options = {"losses": self.losses} if self.losses else {"outputs": self.outputs, "labels": self.labels}
        found = rank_one_fisher(
            model,
            loader,
            likelihood=self.likelihood,
            n_samples=self.n_samples,
            parameters=list(names),
            **options,
        )
        self.rank_one_shares = found.rank_one_shares
        if not is_finite(self, [*found.mean.values(), found.coefficient]):
            return
        with torch.no_grad():
            directions = parts_of({names[name]: value for name, value in found.mean.items()}, self._everything)
            self._offsets = self._along()
            for table in list(self.state.tables.values()):  # of parameters that were frozen before
                table.update({name: torch.zeros_like(v) for name, v in directions.items() if name not in table})
            named = {clean_name(name): parameter for name, parameter in model.named_parameters()}
            kept = self.state["anchor"].keys() | directions.keys()
            anchors = {name: copy_of(parameter) for name, parameter in named.items() if name in kept}
            self.state.tables["anchor"] = anchors
            zeros = {name: torch.zeros_like(anchor) for name, anchor in anchors.items()}
            self.state.tables[f"direction{len(self._coefficients)}"] = zeros | directions
            self._coefficients.append(found.coefficient)
            self._offsets.append(torch.zeros_like(found.coefficient))

    @override
    def value(self, parameters: Parameters) -> Tensor:
        terms = [c * along**2 for c, along in zip(self._coefficients, self._along(parameters), strict=True)]
        if not terms:
            parameter = next(iter(parameters.values()))
            return torch.zeros((), dtype=torch.promote_types(parameter.dtype, torch.float32), device=parameter.device)
        return self.weight / 2 * torch.stack(terms).sum()

    @override
    @torch.no_grad()
    def curvature(self, parameters: Parameters) -> Tensor | None:
        known = [n for n, p in parameters.items() if n in self.state["anchor"] and p.requires_grad]
        if not known or not self._coefficients:
            return None
        tables = [self.state[f"direction{k}"] for k in range(len(self._coefficients))]
        stacks = [torch.stack([table[name].flatten() for table in tables]) for name in known]
        gram = total([full_precision(torch.mm)(stack, stack.T) for stack in stacks], [parameters[n] for n in known])
        roots = torch.stack(self._coefficients).sqrt()
        # its largest eigenvalue is that of the sum of c_k times the outer product of a direction with itself
        largest: Tensor = torch.linalg.eigvalsh(gram * roots * roots.unsqueeze(1))[-1]
        return self.weight * largest

    @override
    def state_dict(self) -> dict[str, Any]:
        numbers = {"coefficients": self._coefficients, "offsets": self._offsets}
        return {"memory": self.state.whole()} | {kind: [n.clone() for n in found] for kind, found in numbers.items()}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.state.load(state_dict["memory"])
        self._coefficients = [number.clone() for number in state_dict["coefficients"]]
        self._offsets = [number.clone() for number in state_dict["offsets"]]

    def _along(self, parameters: Parameters | None = None) -> list[Tensor]:
        """How far the parameters are from the anchor of every task, along its direction."""
        everything, anchors = self._everything if parameters is None else parameters, self.state["anchor"]
        known = [name for name in everything if name in anchors]
        if not known:
            return []
        here = [local(everything[name]) for name in known]
        distances = foreach.sub(here, [anchors[name] for name in known])
        directions = [self.state[f"direction{k}"] for k in range(len(self._offsets))]
        products = [  # no matrix product: autocast would run it in half precision
            torch.stack([(direction[name] * distance).sum() for direction in directions])
            for name, distance in zip(known, distances, strict=True)
        ]
        return list(torch.stack(self._offsets) + total(products, [everything[name] for name in known]))
