"""Diagonal Fisher information: how much the likelihood of a model needs each of its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_collapse.penalties.support.coherence import Coherence
from lightning_collapse.penalties.support.fisher_pass import FisherPass, Outputs, Sums
from lightning_collapse.penalties.support.output_gradients import (
    Columns,
    Estimator,
    Likelihood,
    check_estimator,
    output_columns,
)
from lightning_collapse.utilities.distributed import world_size
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.sharding import on_whole_weights
from lightning_collapse.utilities.targets import targets_of

Labels = Callable[[Any], Tensor]


class DiagonalFisher(NamedTuple):
    """The diagonal of a Fisher information, of all processes.

    Attributes:
        values: By name of the parameter, of its shape, not negative, at least ``float32``.
        count: Number of samples.
        methods: How each was computed: ``"rule"`` from what its layer received and was sent back, ``"vmap"`` or
            ``"loop"`` sample by sample, ``"batch"`` from gradients of batches; ``"unused"`` took no part and is zero.
        rank_one_shares: Of ``"empirical"``, by name of the module and for ``"all"``: which share of the trace lies
            along the mean gradient, from the first samples, see
            :func:`~lightning_collapse.functional.sample_gradients.rank_one_share`.
    """

    values: dict[str, Tensor]
    count: int  # type: ignore[assignment]  # hides `tuple.count`, as intended
    methods: dict[str, str]
    rank_one_shares: dict[str, Tensor] = {}  # noqa: RUF012 -- never changed


@on_whole_weights
def diagonal_fisher(
    model: nn.Module,
    loader: Loader,
    estimator: Estimator = "exact",
    *,
    likelihood: Likelihood = "categorical",
    n_samples: int | None = None,
    outputs: Outputs | None = None,
    labels: Labels | None = None,
    parameters: Sequence[str] | None = None,
    chunk_size: int = 32,
    seed: int = 0,
) -> DiagonalFisher:
    r"""Diagonal of the Fisher information, from gradients of single samples: independent of the batch size.

    .. math:: F_i = \frac{1}{N} \sum_n \mathbb{E}_{y}\Big[\Big(\frac{\partial \log p(y \mid x_n)}{\partial
        \theta_i}\Big)^2\Big]

    - ``"exact"``: the expectation over the model's own distribution, by one backward pass less than there are classes
      (as many as outputs for a Gaussian).
    - ``"sample"``: one label drawn from it.
    - ``"empirical"``: the given label.
    - ``"batched"``: the squared gradient of the mean loss of a batch, averaged over batches. It depends on the batch
      size, near an optimum it is :math:`(N-B)/(B(N-1))` of ``"empirical"`` [1]: only to compare with code that does so.
    - ``"logits_reversal"``: the given label, and :math:`-z` in place of the logits (EWC-DR [2]). Per sample, as the
      paper's expectation is; its reference code squares the gradient of a batch, and cuts at 1e-4.

    One forward pass per batch in eval mode, and backward passes that make no gradient of weights: one per column of
    the output, and one or two to see whose gradient is whose. The model, its ``.grad`` and all random states are as
    before. Collective: every process must call it, with its own part of the data, which may be of any size.

    Args:
        model: Returns logits ``(B, C)``, or ``(B, T, C)`` where a sample is a sequence and its log-likelihood the sum
            over its positions (not for ``"exact"``); for a Gaussian ``(B, ...)``. Batches are moved to its device.
        loader: Batches, or a function that returns them.
        estimator: See above.
        likelihood: ``"categorical"`` with the model's outputs as logits, or ``"gaussian"`` of unit variance around
            them.
        n_samples: How many samples, of all processes together: each takes its share, the first of its loader.
        outputs: How the model is called on a batch; by default on the first of a pair, or with what a mapping holds
            beside the targets.
        labels: Labels of a batch, ``(B,)`` or ``(B, T)``, -100 where none counts; by default the second of a pair, or
            what a mapping calls targets or labels.
        parameters: Glob patterns of parameter names; all that require a gradient by default.
        chunk_size: Samples at a time where gradients of samples are computed one by one.
        seed: Of the labels that ``"sample"`` draws, from a generator of its own.

    Returns:
        Values, number of samples, and how each value was found.

    Raises:
        ValueError: If an argument is none of the above, the outputs or labels have another shape, no sample was
            there, samples depend on each other (not for ``"batched"``), or parameters are sharded otherwise than by
            ``fully_shard``.

    References:
        [1] van de Ven, *On the Computation of the Fisher Information in Continual Learning*, ICLR blog post 2025.
        https://arxiv.org/abs/2502.11756

        [2] Liu & Chang, *Elastic Weight Consolidation Done Right for Continual Learning*, CVPR 2026.
        https://arxiv.org/abs/2603.18596

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> diagonal_fisher(model, [torch.tensor([[2.0, 1.0]])]).values["weight"]  # p (1 - p) x ** 2
        tensor([[1.0000, 0.2500],
                [1.0000, 0.2500]])
    """
    check_estimator(estimator, likelihood)
    over = FisherPass(model, loader, outputs, parameters, n_samples, chunk_size)
    rank = dist.get_rank() if world_size() > 1 else 0
    generator = torch.Generator(over.device).manual_seed(seed + rank)
    labels_of = labels or targets_of

    def columns_of(batch: Any, outputs: Tensor) -> Columns:
        given = labels_of(batch)
        given = given.to(over.device) if isinstance(given, Tensor) else None
        return output_columns(outputs, given, estimator, likelihood, generator)

    if estimator == "batched":
        sums = _of_batches(over, columns_of)
        methods = {name: "unused" if how == "unused" else "batch" for name, how in sums.methods.items()}
        return DiagonalFisher(_divided(sums.values, sums.batches), sums.samples, methods)
    coherence = Coherence(over.zeros()) if estimator == "empirical" else None
    sums = over.sums(columns_of, "squares", coherence)
    shares = {} if coherence is None else coherence.shares(over.reduced)
    return DiagonalFisher(_divided(sums.values, sums.samples), sums.samples, sums.methods, shares)


def _of_batches(over: FisherPass, columns_of: Callable[[Any, Tensor], Columns]) -> Sums:
    count, batches, totals = 0, 0, over.zeros()
    methods = dict.fromkeys(totals, "unused")
    for found, rows in over.batch_gradients(lambda batch, outputs: columns_of(batch, outputs).make(0)):
        for name, gradient in found.items():
            totals[name] += (gradient / rows).square()
            methods[name] = "rule"
        count, batches = count + rows, batches + 1
    return over.summed(totals, count, batches, methods)


def _divided(values: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    return {name: value / by for name, value in values.items()}
