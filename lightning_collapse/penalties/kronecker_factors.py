"""Kronecker factors (K-FAC): the Fisher information of whole layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_collapse.penalties.support.fisher_pass import FisherPass, Outputs
from lightning_collapse.penalties.support.output_gradients import Estimator, Likelihood, check_estimator, output_columns
from lightning_collapse.penalties.support.per_sample import Layer, PerSampleGradients
from lightning_collapse.penalties.support.sample_gradients import Outer, Patches, SampleGradients
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.sharding import on_whole_weights
from lightning_collapse.utilities.targets import targets_of


class KroneckerFactor(NamedTuple):
    r"""Factors of one layer: for a change :math:`D` of its weight, :math:`\operatorname{tr}(D^\top G D A)` is the form.

    Attributes:
        inputs: :math:`A`, ``(I, I)``, or ``(I + 1, I + 1)`` where there is a bias: its row and column come last. Of a
            convolution ``I`` is channels times kernel, as ``weight.flatten(1)`` has them.
        gradients: :math:`G`, ``(O, O)``.
        bias: Name of the bias, or ``None``.

    Example:
        >>> batches = [torch.tensor([[3.0, 0.0]])]
        >>> factor = kronecker_factors(nn.Linear(2, 1), batches, likelihood="gaussian").factors["weight"]
        >>> factor.inputs.shape, factor.gradients.shape, factor.bias
        (torch.Size([3, 3]), torch.Size([1, 1]), 'bias')
    """

    inputs: Tensor
    gradients: Tensor
    bias: str | None


class KroneckerFactors(NamedTuple):
    """Factors of all layers that have them, of all processes.

    Attributes:
        factors: By name of the weight.
        count: Number of samples.
        left_out: Parameters without factors: of normalizations, embeddings, grouped convolutions, recurrent layers,
            weights that are tied or used in a function, and layers whose rows are not each of one sample.
    """

    factors: dict[str, KroneckerFactor]
    count: int  # type: ignore[assignment]  # hides `tuple.count`, as intended
    left_out: list[str]


@on_whole_weights
def kronecker_factors(
    model: nn.Module,
    loader: Loader,
    estimator: Estimator = "exact",
    *,
    likelihood: Likelihood = "categorical",
    n_samples: int | None = None,
    outputs: Outputs | None = None,
    labels: Callable[[Any], Tensor] | None = None,
    parameters: Sequence[str] | None = None,
    seed: int = 0,
) -> KroneckerFactors:
    r"""Kronecker factors of the Fisher information of every linear layer and convolution (K-FAC).

    .. math:: F \approx A \otimes G, \qquad A = \frac{1}{\sum_n P_n} \sum_{n, p} \bar a_{np} \bar a_{np}^\top, \qquad
        G = \frac{1}{N} \sum_n \sum_p \mathbb{E}_y\big[g_{np} g_{np}^\top\big]

    with :math:`\bar a` the input and a one for the bias, :math:`g` the gradient of the layer's output, and positions
    :math:`p` of tokens or pixels, of which a linear layer on rows has one. For convolutions [2] puts the number of
    positions into the other factor; the product is the same. Exact where inputs and gradients are independent, as in
    linear regression. Collective: every process must call it, with its own data.

    Args:
        model: Returns logits ``(B, C)`` or ``(B, T, C)``, for a Gaussian any ``(B, ...)``; it is left as it was.
        loader: Batches, or a function that returns them.
        estimator: ``"exact"``, ``"sample"``, ``"empirical"`` or ``"logits_reversal"``, see
            :func:`~lightning_collapse.penalties.diagonal_fisher`.
        likelihood: ``"categorical"``, or ``"gaussian"`` of unit variance around the outputs.
        n_samples: How many samples, of all processes together: each takes its share, the first of its loader.
        outputs: How the model is called on a batch; by default on the first of a pair, or with what a mapping holds
            beside the targets.
        labels: Labels of a batch; by default the second of a pair, or what a mapping calls targets or labels.
        parameters: Glob patterns of parameter names; all that require a gradient by default. A layer has factors if
            its weight is among them, with a row for its bias if that is.
        seed: Of the labels that ``"sample"`` draws, from a generator of its own.

    Returns:
        Factors, number of samples, and the parameters that have none.

    Raises:
        ValueError: If an argument is none of the above, the outputs or labels have another shape, no sample was
            there, no layer has factors, or parameters are sharded otherwise than by ``fully_shard``.

    References:
        [1] Martens & Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate Curvature*, ICML 2015.
        https://arxiv.org/abs/1503.05671

        [2] Grosse & Martens, *A Kronecker-factored Approximate Fisher Matrix for Convolution Layers*, ICML 2016.
        https://arxiv.org/abs/1602.01407

    Example:
        >>> found = kronecker_factors(nn.Linear(2, 1), [torch.tensor([[3.0, 0.0]])], likelihood="gaussian")
        >>> found.factors["weight"].inputs
        tensor([[9., 0., 3.],
                [0., 0., 0.],
                [3., 0., 1.]])
        >>> found.factors["weight"].gradients
        tensor([[1.]])
    """
    check_estimator(estimator, likelihood)
    if estimator == "batched":
        raise ValueError("`estimator='batched'` is of the diagonal only; the others are of single samples.")
    over = FisherPass(model, loader, outputs, parameters, n_samples)
    rank = dist.get_rank() if world_size() > 1 else 0
    generator = torch.Generator(over.device).manual_seed(seed + rank)
    labels_of = labels or targets_of
    with over.engine() as engine:
        sums = {name: _Sums(layer, over) for layer in engine.layers if (name := _weight(layer, over)) is not None}
        count = 0
        for batch, values, rows in over.each(engine.forward):
            given = labels_of(batch)
            given = given.to(over.device) if isinstance(given, Tensor) else None
            columns = output_columns(values, given, estimator, likelihood, generator)
            for k, found in enumerate(engine.by_rule(values, columns, rows)):
                for name, gradients in found:
                    if name in sums:
                        sums[name].add(gradients, rows, first=k == 0)
            count += rows
    return _divided(over, engine, sums, count)


class _Sums:
    """Sums over samples and positions of one layer."""

    def __init__(self, layer: Layer, over: FisherPass) -> None:
        weight = over.parameters[layer.names["weight"]]
        outputs, inputs = len(weight), weight[0].numel()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.bias = layer.names.get("bias")
        # one column more for the bias, of ones: its last number counts the positions in any case
        self.inputs = weight.new_zeros(inputs + 1, inputs + 1, dtype=dtype, requires_grad=False)
        self.gradients = weight.new_zeros(outputs, outputs, dtype=dtype, requires_grad=False)

    def add(self, gradients: SampleGradients, rows: int, first: bool) -> None:
        if not isinstance(gradients, Outer | Patches):
            return
        for inputs, outputs in gradients.factors(rows):
            if first:
                a = pad(inputs.flatten(0, 1), (0, 1), value=1.0)
                self.inputs.addmm_(a.T, a)
            g = outputs.flatten(0, 1)
            self.gradients.addmm_(g.T, g)


def _weight(layer: Layer, over: FisherPass) -> str | None:
    """Name of the weight, if it is a matrix or a kernel that has factors."""
    module: Any = layer.module
    name = layer.names.get("weight")
    grouped = getattr(module, "groups", 1) != 1
    transposed = getattr(module, "nf", None) is not None
    table = isinstance(module, nn.Embedding) or over.parameters[name].ndim < 2 if name else True
    return None if grouped or transposed or table or hasattr(module, "normalized_shape") else name


def _divided(over: FisherPass, engine: PerSampleGradients, sums: dict[str, _Sums], count: int) -> KroneckerFactors:
    parts = [part for found in sums.values() for part in (found.inputs, found.gradients)]
    totals, [samples] = over.reduced(parts, count)
    methods = over.agreed(engine.methods)
    factors = {}
    for i, (name, found) in enumerate(sums.items()):
        if methods[name] != "rule":
            continue
        inputs, gradients = totals[2 * i], totals[2 * i + 1] / samples
        inputs = inputs / inputs[-1, -1]
        bias = found.bias if found.bias is not None and methods[found.bias] == "rule" else None
        factors[name] = KroneckerFactor(inputs if bias is not None else inputs[:-1, :-1], gradients, bias)
    if not factors:
        raise ValueError(f"`model`: {type(over.model).__name__} has no linear layer and no convolution to factor.")
    covered = {*factors, *(factor.bias for factor in factors.values())}
    return KroneckerFactors(factors, samples, [name for name in over.parameters if name not in covered])
