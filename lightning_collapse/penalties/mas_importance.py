"""Importance of memory aware synapses (MAS): how much the output of a model needs each of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lightning_collapse.penalties.support.fisher_pass import FisherPass, Outputs
from lightning_collapse.penalties.support.output_gradients import norm_columns
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.sharding import on_whole_weights


class MASImportance(NamedTuple):
    """Importances of memory aware synapses, of all processes.

    Attributes:
        values: By name of the parameter, of its shape, not negative, at least ``float32``.
        count: Number of samples.
        methods: How each was computed, see :class:`~lightning_collapse.penalties.DiagonalFisher`.
    """

    values: dict[str, Tensor]
    count: int  # type: ignore[assignment]  # hides `tuple.count`, as intended
    methods: dict[str, str]


@on_whole_weights
def mas_importance(
    model: nn.Module,
    loader: Loader,
    *,
    n_samples: int | None = None,
    outputs: Outputs | None = None,
    parameters: Sequence[str] | None = None,
    chunk_size: int = 32,
) -> MASImportance:
    r"""Sensitivity of the squared norm of the output, sample by sample.

    .. math:: \Omega_i = \frac{1}{N} \sum_n \Big| \frac{\partial \|f(x_n)\|_2^2}{\partial \theta_i} \Big|

    Of single samples, as published; taken of the mean over a batch, signs would cancel. No label is needed, so any
    output ``(B, ...)`` will do, such as an embedding. Collective: every process must call it, with its own data.

    Args:
        model: Returns ``(B, ...)``; it is left as it was.
        loader: Batches, or a function that returns them.
        n_samples: How many samples, of all processes together: each takes its share, the first of its loader.
        outputs: How the model is called on a batch; by default on the first of a pair, or with what a mapping holds
            beside the targets.
        parameters: Glob patterns of parameter names; all that require a gradient by default.
        chunk_size: Samples at a time where gradients of samples are computed one by one.

    Returns:
        Values, number of samples, and how each value was found.

    Raises:
        ValueError: If a number is not positive, a pattern matches nothing, no sample was there, samples depend
            on each other, or parameters are sharded otherwise than by ``fully_shard``.

    References:
        Aljundi et al., *Memory Aware Synapses*, ECCV 2018, eq. 3. https://arxiv.org/abs/1711.09601

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> mas_importance(model, [torch.tensor([[1.0, 2.0], [0.0, -1.0]])]).values["weight"]  # mean of |2 (w'x) x|
        tensor([[3., 7.]])
    """
    over = FisherPass(model, loader, outputs, parameters, n_samples, chunk_size)
    sums = over.sums(lambda _, outputs: norm_columns(outputs), "absolute")
    return MASImportance(
        {name: value / sums.samples for name, value in sums.values.items()}, sums.samples, sums.methods
    )
