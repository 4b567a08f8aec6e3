"""Rank-one Fisher information: along the mean gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_collapse.penalties.support.coherence import Coherence
from lightning_collapse.penalties.support.fisher_pass import FisherPass, Outputs
from lightning_collapse.penalties.support.output_gradients import Columns, Likelihood, check_estimator, output_columns
from lightning_collapse.penalties.support.sample_gradients import wide
from lightning_collapse.penalties.support.vmap_gradients import Called
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.sharding import on_whole_weights
from lightning_collapse.utilities.targets import targets_of


class RankOneFisher(NamedTuple):
    r"""The approximation :math:`F \approx c\,\mu\mu^\top`, of all processes.

    Attributes:
        mean: Mean gradient :math:`\mu` by name of the parameter, of its shape, at least ``float32``.
        coefficient: The number :math:`c`, a scalar; 0 where the mean is zero.
        count: Number of samples.
        rank_one_shares: By name of the module, and for ``"all"``: which share of the trace of the Fisher information
            lies along the mean, from the first samples, see
            :func:`~lightning_collapse.functional.sample_gradients.rank_one_share`. Modules whose gradients of samples
            have no rule are left out, and then ``"all"`` is, too.
    """

    mean: dict[str, Tensor]
    coefficient: Tensor
    count: int  # type: ignore[assignment]  # hides `tuple.count`, as intended
    rank_one_shares: dict[str, Tensor] = {}  # noqa: RUF012 -- never changed


@on_whole_weights
def rank_one_fisher(
    model: nn.Module,
    loader: Loader,
    *,
    likelihood: Likelihood = "categorical",
    losses: Callable[[Any, Any], Tensor] | None = None,
    n_samples: int | None = None,
    outputs: Outputs | None = None,
    labels: Callable[[Any], Tensor] | None = None,
    parameters: Sequence[str] | None = None,
) -> RankOneFisher:
    r"""Mean gradient and the second moment of gradients along it: all of the Fisher if gradients are collinear.

    .. math:: \mu = \mathbb{E}_n[g_n], \qquad c = \frac{\mathbb{E}_n[(\mu^\top g_n)^2]}{\|\mu\|^4}, \qquad
        g_n = -\nabla_\theta \log p(y_n \mid x_n)

    with the given labels: over those that the model itself would draw the mean gradient is zero. The loader is read
    twice. The first time brings :math:`\mu`; the second needs no gradient of a sample: forward-mode differentiation
    along :math:`\mu` gives the change of all outputs of a batch at once, and its product with the gradient of the loss
    with respect to the outputs is :math:`\mu^\top g_n`. Where an operation has no forward mode the same comes from two
    backward passes. Collective: every process must call it, with its own data.

    Args:
        model: Returns logits ``(B, C)`` or ``(B, T, C)``, for a Gaussian any ``(B, ...)``; it is left as it was.
        loader: Batches, or a function that returns them; both times the same.
        likelihood: ``"categorical"``, or ``"gaussian"`` of unit variance around the outputs.
        losses: Losses of samples, ``(B,)``, of a model and a batch, in place of the three arguments that say how
            outputs and labels make one: for a diffusion model, say. Random numbers are the same both times.
        n_samples: How many samples, of all processes together: each takes its share, the first of its loader.
        outputs: How the model is called on a batch; by default on the first of a pair, or with what a mapping holds
            beside the targets.
        labels: Labels of a batch; by default the second of a pair, or what a mapping calls targets or labels.
        parameters: Glob patterns of parameter names; all that require a gradient by default.

    Returns:
        Mean gradient, coefficient and number of samples.

    Raises:
        ValueError: If an argument is none of the above, the loader can be read only once or has no samples, outputs
            or labels have another shape, or parameters are sharded otherwise than by ``fully_shard``.

    References:
        Wang et al., *Avoid Catastrophic Forgetting with Rank-1 Fisher from Diffusion Models*, ICLR 2026.
        https://arxiv.org/abs/2509.23593

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> batch = torch.ones(2, 1), torch.tensor([[1.0], [3.0]])
        >>> found = rank_one_fisher(model, [batch], likelihood="gaussian")
        >>> found.mean["weight"], found.coefficient  # gradients -1 and -3: c is their second moment over 4
        (tensor([[-2.]]), tensor(1.2500))
    """
    check_estimator("empirical", likelihood)
    if isinstance(loader, Iterator):
        raise ValueError("`loader` is read twice, and an iterator cannot be. Pass a function that returns the batches.")
    over = FisherPass(model, loader, losses or outputs, parameters, n_samples)
    labels_of = labels or targets_of

    def column_of(batch: Any, values: Tensor) -> Tensor:
        if losses is None:
            given = labels_of(batch)
            given = given.to(over.device) if isinstance(given, Tensor) else None
            return output_columns(values, given, "empirical", likelihood).make(0)
        if values.ndim != 1:
            raise ValueError(f"`losses` must return one loss per sample, (B,), it returned {tuple(values.shape)}.")
        return torch.ones_like(wide(values))

    mean, count, shares = _mean(over, column_of)
    norm = torch.stack([torch.linalg.vector_norm(value) for value in mean.values()]).norm()
    tangents = _Tangents(over, {name: value / norm.clamp_min(_tiny(norm)) for name, value in mean.items()})
    second = torch.zeros_like(norm)
    with preserved_state(model):
        for batch, both, rows in over.each(tangents):
            values, change = both.unbind(dim=1)
            along = (change * column_of(batch, values))[:rows]  # the gradient of each loss along the mean, in parts
            second += along.flatten(1).sum(dim=1).square().sum() if along.ndim > 1 else along.square().sum()
    [second], _ = over.reduced([second], count)
    coefficient = second / count / norm.square().clamp_min(_tiny(norm))
    return RankOneFisher(mean, coefficient.masked_fill(norm == 0, 0.0), count, shares)


class _Tangents:
    """Outputs of a batch and their change along a direction in the space of parameters, ``(B, 2, ...)``."""

    def __init__(self, over: FisherPass, direction: Mapping[str, Tensor]) -> None:
        self.model, self.outputs = over.model, over.outputs
        self.parameters = over.parameters
        self.direction = {name: value.to(over.parameters[name].dtype) for name, value in direction.items()}
        self._called = Called(over.model, over.outputs)
        self._forward_mode = True

    def __call__(self, batch: Any) -> Tensor:
        if self._forward_mode:
            states = torch.get_rng_state()
            try:
                return self._forward(batch)
            except (RuntimeError, NotImplementedError):
                self._forward_mode = False  # recurrent kernels and custom functions have none
                torch.set_rng_state(states)
        return self._backward(batch)

    def _forward(self, batch: Any) -> Tensor:
        leaves = {f"model.{name}": parameter.detach() for name, parameter in self.parameters.items()}
        direction = {f"model.{name}": value for name, value in self.direction.items()}
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)  # that torch itself calls
            values, change = jvp(lambda p: functional_call(self._called, p, (batch,)), (leaves,), (direction,))[:2]
        return torch.stack([wide(values.detach()), wide(change.detach())], dim=1)

    def _backward(self, batch: Any) -> Tensor:
        """The gradient is linear in what is sent back, with the transposed Jacobian: its derivative is the change."""
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
            values = self.outputs(self.model, batch)
            sent = torch.zeros_like(values, requires_grad=True)
            leaves = list(self.parameters.values())
            found = torch.autograd.grad(values, leaves, sent, create_graph=True, allow_unused=True)
            pairs = zip(found, self.direction.values(), strict=True)
            along = torch.stack([(gradient * d).sum() for gradient, d in pairs if gradient is not None]).sum()
            [change] = torch.autograd.grad(along, sent)
        return torch.stack([wide(values.detach()), wide(change)], dim=1)


def _mean(
    over: FisherPass, column_of: Callable[[Any, Tensor], Tensor]
) -> tuple[dict[str, Tensor], int, dict[str, Tensor]]:
    """The mean gradient, the number of samples, and rank-one shares where norms of sample gradients have a rule."""
    count, totals, coherence = 0, over.zeros(), Coherence(over.zeros())
    with over.engine() as engine:
        for batch, outputs, rows in over.each(engine.forward):
            count += rows
            if coherence.complete:
                for name, gradient in over.gradients(outputs, column_of(batch, outputs), rows).items():
                    totals[name] += gradient
                continue
            engine.sums = totals
            for found in engine.by_rule(outputs, Columns(1, partial(_column, column_of, batch, outputs)), rows):
                for name, gradients in found:
                    coherence.squares[name] += gradients.square_norms()
            coherence.count = count
            coherence.sums = {name: total.clone() for name, total in totals.items()}
    sums, [samples] = over.reduced(list(totals.values()), count)
    ruled = [name for name, how in over.agreed(engine.methods).items() if how in ("rule", "unused")]
    mean = {name: value / samples for name, value in zip(totals, sums, strict=True)}
    return mean, samples, coherence.shares(over.reduced, ruled)


def _column(column_of: Callable[[Any, Tensor], Tensor], batch: Any, outputs: Tensor, _: int) -> Tensor:
    return column_of(batch, outputs)


def _tiny(number: Tensor) -> float:
    return torch.finfo(number.dtype).tiny
