"""Online structured Laplace (KFAC-EWC): elastic weight consolidation with Kronecker factors of whole layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import pad
from typing_extensions import override

from lightning_collapse.penalties.base import Parameters, Penalty
from lightning_collapse.penalties.diagonal_fisher import Labels
from lightning_collapse.penalties.kronecker_factors import kronecker_factors
from lightning_collapse.penalties.support.consolidation import (
    check_loader,
    check_unsharded,
    choose_estimator,
    is_finite,
    names_of,
)
from lightning_collapse.penalties.support.fisher_pass import Outputs
from lightning_collapse.penalties.support.kronecker_sum import nearest_kronecker_product
from lightning_collapse.penalties.support.output_gradients import Estimator, Likelihood, check_estimator
from lightning_collapse.penalties.support.shards import add_to_gradients, copy_of, wide
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.registry import register_penalty

Pair = tuple[Tensor, Tensor]
ITERATIONS = 50
"""Of the power iteration: it is short of the largest eigenvalue by percents at most, which a warning may be."""


class _Layer(NamedTuple):
    """Factors ``(I + 1, I + 1)`` and ``(O, O)`` of every task; without a bias the last row and column are zero."""

    bias: str
    pairs: list[Pair]


@register_penalty
class KFACEWC(Penalty):
    r"""Elastic weight consolidation with a Kronecker-factored Fisher information: online structured Laplace [1].

    .. math:: \frac{w}{2} \sum_l \sum_k \big\langle D_l, G_{k,l} D_l A_{k,l} \big\rangle, \quad
        D_l = [W_l, b_l] - [W_l, b_l]^*

    with :math:`A_{k,l} \otimes G_{k,l}` the Fisher information of layer :math:`l` at the end of task :math:`k`, see
    :func:`~lightning_collapse.penalties.kronecker_factors`, and one anchor, the latest: the mode of a posterior whose
    precision is the sum over tasks, as in the paper. An anchor for every task would count old tasks once more with
    each new one [2]. The sum is no Kronecker product itself, so that the factors of every task are kept, which is
    exact; with ``max_factors`` memory is bounded, and the two oldest pairs become the Kronecker product that is nearest
    to their sum in the Frobenius norm, as in [3]. The paper's prior is left to weight decay.

    Normalizations, embeddings and whatever else has no factors is left free, and named in the log once;
    ``WeightPenalty(EWC(), parameters=[...])`` beside it holds these.

    Args:
        weight: ``w``. 1 is the paper's natural value, where the loss is a mean over as many samples as an old task had;
            it tunes it.
        estimator: Which labels the Fisher information is over, see ``kronecker_factors``; ``None`` is ``"exact"`` for
            at most 20 outputs and ``"sample"`` for more, or for sequences.
        n_samples: How many samples of a task it reads; ``None`` for all.
        max_factors: How many pairs of factors a layer keeps; ``None`` for one from every task.
        likelihood: Of the outputs.
        outputs: The model's outputs on a batch, ``outputs(model, batch)``; by default the model is called on the
            inputs.
        labels: Labels of a batch, for estimators that read them.

    Raises:
        ValueError: If an argument is out of range; at the start if parameters are sharded.

    References:
        [1] Ritter, Botev & Barber, *Online structured Laplace approximations for overcoming catastrophic forgetting*,
        NeurIPS 2018. https://arxiv.org/abs/1805.07810

        [2] Huszár, *On quadratic penalties in elastic weight consolidation*, 2017. https://arxiv.org/abs/1712.03847

        [3] Kao et al., *Natural continual learning: success is a journey, not (just) a destination*, NeurIPS 2021.
        https://arxiv.org/abs/2106.08085

    Example::

        trainer = Trainer(callbacks=[WeightPenalty(KFACEWC(weight=1.0))])
    """

    remembers = "Kronecker factors of the Fisher information of linear layers and convolutions"
    source = "Ritter et al., NeurIPS 2018, arXiv 1805.07810"
    needs_data = True

    def __init__(
        self,
        weight: float = 1.0,
        estimator: Estimator | None = None,
        n_samples: int | None = 500,
        max_factors: int | None = None,
        likelihood: Likelihood = "categorical",
        outputs: Outputs | None = None,
        labels: Labels | None = None,
    ) -> None:
        super().__init__(weight)
        check_estimator(estimator or "exact", likelihood)
        if estimator == "batched":
            raise ValueError("`estimator='batched'` is of the diagonal only; the others are of single samples.")
        for name, number in (("n_samples", n_samples), ("max_factors", max_factors)):
            if number is not None:
                require_whole(1, **{name: number})
        self.estimator = estimator
        self.n_samples = n_samples
        self.max_factors = max_factors
        self.likelihood = likelihood
        self.outputs = outputs
        self.labels = labels
        self._layers: dict[str, _Layer] = {}
        self._everything: Parameters = {}
        self._left_out: list[str] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_everything": {}}  # the parameters of a running fit

    @override
    def start(self, parameters: Parameters) -> None:
        check_unsharded(self, parameters)
        shapes = {name: self.state.layouts[name].shape for name in self.state["anchor"]}
        parameters = self.state.place(parameters, follow=("anchor",))
        layers = {name: layer for name, layer in self._layers.items() if name in parameters}
        self._layers = {}
        for name, (bias, pairs) in layers.items():
            placed = [_grown(pair, shapes[name], parameters[name]) for pair in pairs]
            self._layers[name] = _Layer(bias, placed) if bias in parameters else _Layer("", _without_bias(placed))
        covered = {*self._layers, *(layer.bias for layer in self._layers.values())}
        self.state.tables["anchor"] = {n: a for n, a in self.state["anchor"].items() if n in covered}
        self._everything = parameters

    @override
    @torch.no_grad()
    def add_gradients(self, parameters: Parameters, scale: Tensor | None = None) -> None:
        if not self.weight:
            return
        pulled, pulls = [], []
        for name, layer in self._layers_of(parameters):
            pull = _curved(self._distance(name, layer, parameters), layer.pairs)
            for part, matrix in ((name, pull[:, :-1]), (layer.bias, pull[:, -1])):
                if part in parameters and parameters[part].requires_grad:
                    pulled.append(parameters[part])
                    pulls.append(matrix.reshape(parameters[part].shape))
        if pulled:
            add_to_gradients(pulled, pulls, self.weight, scale)

    @override
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        """Factor the Fisher information where the model stands, and anchor it there. Collective.

        Raises:
            ValueError: If there are no data, or no layer has factors.
        """
        loader = check_loader(self, loader)
        if not is_finite(self, self._everything.values()):
            return
        names = names_of(model, self._everything)
        estimator: Estimator | None = self.estimator
        if estimator is None:
            estimator, loader = choose_estimator(model, loader, self.outputs)
        found = kronecker_factors(
            model,
            loader,
            estimator,
            likelihood=self.likelihood,
            n_samples=self.n_samples,
            outputs=self.outputs,
            labels=self.labels,
            parameters=list(names),
        )
        if not is_finite(self, [part for factor in found.factors.values() for part in factor[:2]]):
            return
        self._tell([names[name] for name in found.left_out])
        for raw, factor in found.factors.items():
            name, bias = names[raw], names[factor.bias] if factor.bias is not None else ""
            inputs = factor.inputs if bias else pad(factor.inputs, (0, 1, 0, 1))
            known = self._layers.get(name, _Layer(bias, []))
            pairs = [*known.pairs, (inputs, factor.gradients)]
            while self.max_factors is not None and len(pairs) > self.max_factors:
                pairs[:2] = [nearest_kronecker_product(*pairs[:2])]
            self._layers[name] = _Layer(known.bias or bias, pairs)
        covered = {*self._layers, *(layer.bias for layer in self._layers.values() if layer.bias)}
        self.state.tables["anchor"] = {name: copy_of(self._everything[name]) for name in covered}

    @override
    def value(self, parameters: Parameters) -> Tensor:
        terms = []
        for name, layer in self._layers_of(parameters):
            distance = self._distance(name, layer, parameters)
            terms.append((distance * _curved(distance, layer.pairs)).sum().clamp_min(0))  # but for rounding
        if not terms:
            parameter = next(iter(parameters.values()))
            return torch.zeros((), dtype=wide(parameter), device=parameter.device)
        return self.weight / 2 * torch.stack(terms).sum()

    @override
    @torch.no_grad()
    def curvature(self, parameters: Parameters) -> Tensor | None:
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        found = [
            _largest_eigenvalue(layer.pairs, name in trained, layer.bias in trained)
            for name, layer in self._layers_of({name: parameters[name] for name in trained})
        ]
        return self.weight * torch.stack(found).max() if found else None

    @override
    def state_dict(self) -> dict[str, Any]:
        layers = {  # pairs by the name of the weight and that of the bias
            name: {layer.bias: [[part.clone() for part in pair] for pair in layer.pairs]}
            for name, layer in self._layers.items()
        }
        return {"memory": self.state.whole(), "layers": layers}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.state.load(state_dict["memory"])
        self._layers = {
            name: _Layer(bias, [(a.clone(), g.clone()) for a, g in pairs])
            for name, layer in state_dict["layers"].items()
            for bias, pairs in layer.items()
        }

    def _layers_of(self, parameters: Parameters) -> Iterable[tuple[str, _Layer]]:
        return [(name, layer) for name, layer in self._layers.items() if name in parameters or layer.bias in parameters]

    def _distance(self, name: str, layer: _Layer, parameters: Parameters) -> Tensor:
        """Of weight and bias from their anchor, ``(O, I + 1)``; one of them may be another optimizer's."""
        anchors = self.state["anchor"]
        parts = {n: parameters.get(n, self._everything[n]) - anchors[n] for n in (name, layer.bias) if n}
        weight = parts[name].flatten(1)
        bias = parts[layer.bias].unsqueeze(1) if layer.bias else weight.new_zeros(len(weight), 1)
        return torch.cat([weight, bias], dim=1)

    def _tell(self, left_out: list[str]) -> None:
        if left_out and left_out != self._left_out:
            self._left_out = left_out
            rank_zero_info(
                f"`KFACEWC` leaves parameters free that have no Kronecker factors: {', '.join(left_out)}."
                " `WeightPenalty(EWC(), parameters=[...])` beside it would hold them."
            )


@full_precision
def _curved(distance: Tensor, pairs: list[Pair]) -> Tensor:
    terms = [gradients @ (distance @ inputs) for inputs, gradients in pairs]
    return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]


@full_precision
def _largest_eigenvalue(pairs: list[Pair], weight: bool, bias: bool) -> Tensor:
    """Of the sum of Kronecker products, over changes of the weight, the bias or both; by power iteration."""
    inputs, gradients = pairs[0]
    columns = inputs.new_full((len(inputs),), float(weight))
    columns[-1] = float(bias)
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(len(gradients), len(inputs), generator=generator).to(inputs) * columns
    norm = change.new_ones(())
    for _ in range(ITERATIONS):
        change = _curved(change / torch.linalg.vector_norm(change).clamp_min(torch.finfo(change.dtype).tiny), pairs)
        change = change * columns
        norm = torch.linalg.vector_norm(change)
    return norm


def _grown(pair: Pair, old: tuple[int, ...], parameter: Tensor) -> Pair:
    """Factors on the device of the weight, zero in what the weight has grown by."""
    inputs, gradients = (part.to(parameter.device, wide(parameter)) for part in pair)
    new = tuple(parameter.shape)
    if new == old:
        return inputs, gradients
    each = torch.arange(parameter[0].numel(), device=parameter.device).view(new[1:])
    where = torch.cat([each[tuple(slice(size) for size in old[1:])].flatten(), each.new_tensor([each.numel()])])
    grown = inputs.new_zeros(each.numel() + 1, each.numel() + 1)
    grown[where.unsqueeze(1), where] = inputs
    return grown, pad(gradients, (0, new[0] - old[0], 0, new[0] - old[0]))


def _without_bias(pairs: list[Pair]) -> list[Pair]:
    return [(pad(inputs[:-1, :-1], (0, 1, 0, 1)), gradients) for inputs, gradients in pairs]
