"""Per-sample gradients by ``vmap``: of any model, each sample a batch of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any, NamedTuple

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from lightning_collapse.penalties.support.output_gradients import Columns
from lightning_collapse.penalties.support.sample_gradients import Power, apply_power, dense
from lightning_collapse.penalties.support.sample_sums import column_weight, is_near, mixed_column, sample_weights

TRIALS = 64
"""How many ways to take a batch apart are tried."""
Axes = tuple[int | None, ...]
"""Of each tensor of a batch the axis of the samples; ``None`` of what all samples share, such as a table."""


class _Sums(NamedTuple):
    """Over samples and columns, by name: of a power, and of the gradients themselves, weighted."""

    powers: dict[str, Tensor]
    weighted: dict[str, Tensor]


class OneByOne:
    """Every sample a batch of its own: several at a time by ``torch.func.vmap``, or in a loop where that fails.

    Of the tensors of a batch those with as many rows as there are samples, or columns, are cut; but a table may have
    as many rows by accident. So the sum over samples, each with a weight of its own, is compared with autograd on
    every batch, and other ways to cut are tried before samples are found to depend on each other.

    Args:
        model: In eval mode.
        outputs: How it is called on a batch.
        parameters: All whose gradients are wanted from one method or another, by name.
        chunk_size: Samples at a time.

    Attributes:
        method: ``"vmap"`` or ``"loop"``.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Callable[[Any, Any], Tensor],
        parameters: Mapping[str, Tensor],
        chunk_size: int,
    ) -> None:
        self.model, self.outputs, self.parameters, self.chunk_size = model, outputs, parameters, chunk_size
        self.method = "vmap"
        self._called = Called(model, outputs)
        self._axes: Axes = ()

    def __call__(
        self, names: Sequence[str], batch: Any, columns: Columns, samples: int, rows: int, power: Power
    ) -> dict[str, Tensor]:
        """Sums over columns and the first ``rows`` of ``samples``, by name of the parameter.

        Raises:
            ValueError: If samples are not independent.
        """
        truth = self._truth(batch, columns, rows)
        scale = torch.stack([torch.linalg.vector_norm(gradient) for gradient in truth.values()]).norm()
        refusal: ValueError | None = None
        for axes in self._ways(batch, samples):
            try:
                sums, method = self._sums(names, batch, axes, columns, rows, power)
            except Exception as error:  # of the user's model, on what is no batch
                refusal = refusal or self._refusal(names, f" (on a sample alone the model raises {error!r:.200})")
                continue
            zeros = {name: torch.zeros_like(truth[name]) for name in names}
            found = zeros | sums.weighted
            wrong = [n for n in names if not is_near(found[n], truth[n], scale, self.parameters[n].dtype)]
            if not wrong:
                self._axes, self.method = axes, method
                return sums.powers
            refusal = refusal or self._refusal(wrong)
        assert refusal is not None  # a batch can be taken in one way at least
        raise refusal

    def _truth(self, batch: Any, columns: Columns, rows: int) -> dict[str, Tensor]:
        """What autograd says of the whole batch."""
        outputs = self.outputs(self.model, batch)
        column = (mixed_column(columns, rows) * sample_weights(outputs)).to(outputs.dtype)
        found = torch.autograd.grad(outputs, list(self.parameters.values()), column, allow_unused=True)
        pairs = zip(self.parameters.items(), found, strict=True)
        return {n: dense(torch.zeros_like(p, requires_grad=False) if g is None else g) for (n, p), g in pairs}

    def _ways(self, batch: Any, samples: int) -> Iterator[Axes]:
        """Ways to take a batch apart, the likely ones first."""
        tensors: list[Tensor] = []
        apply_to_collection(batch, Tensor, tensors.append)
        options = [
            [*(axis for axis in range(min(tensor.ndim, 2)) if tensor.shape[axis] == samples), None]
            for tensor in tensors
        ]
        ways = list(islice(product(*options), TRIALS))
        return iter(sorted(ways, key=lambda axes: axes != self._axes))

    def _sums(
        self, names: Sequence[str], batch: Any, axes: Axes, columns: Columns, rows: int, power: Power
    ) -> tuple[_Sums, str]:
        parameters = {name: self.parameters[name] for name in names}
        if self.method == "vmap":
            try:
                return self._summed(self._vmapped, parameters, batch, axes, columns, rows, power), "vmap"
            except (RuntimeError, NotImplementedError, ValueError, TypeError):
                pass  # recurrent kernels, control flow that depends on data, and the like
        return self._summed(self._looped, parameters, batch, axes, columns, rows, power), "loop"

    def _summed(
        self,
        method: Callable[..., _Sums],
        parameters: Mapping[str, Tensor],
        batch: Any,
        axes: Axes,
        columns: Columns,
        rows: int,
        power: Power,
    ) -> _Sums:
        totals = _Sums({}, {})
        weights = sample_weights(columns.make(0)).flatten()
        for start in range(0, rows, self.chunk_size):
            part = slice(start, min(start + self.chunk_size, rows))
            cut = torch.stack([columns.make(k)[part] for k in range(columns.number)], dim=1)
            for total, found in zip(
                totals, method(parameters, batch, axes, part, cut, weights[part], power), strict=True
            ):
                _add(total, found)
        return totals

    def _vmapped(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any,
        axes: Axes,
        part: slice,
        cut: Tensor,
        weights: Tensor,
        power: Power,
    ) -> _Sums:
        tensors: list[Tensor] = []
        apply_to_collection(_cut(batch, axes, part), Tensor, tensors.append)
        leaves = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}

        def one(columns: Tensor, weight: Tensor, *values: Tensor) -> _Sums:
            given = iter([v if axis is None else v.unsqueeze(axis) for v, axis in zip(values, axes, strict=True)])
            sample = apply_to_collection(batch, Tensor, lambda _: next(given))
            output, pull, *_ = vjp(lambda weights: functional_call(self._called, weights, (sample,)), leaves)
            return _reduced((pull(column)[0] for column in columns.to(output.dtype).unsqueeze(1)), weight, power)

        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", "There is a performance drop")
            found = vmap(one, in_dims=(0, 0, *axes), randomness="different")(cut, weights, *tensors)
        powers, weighted = (
            {name.removeprefix("model."): value.sum(dim=0) for name, value in sums.items()} for sums in found
        )
        return _Sums(powers, weighted)

    def _looped(
        self,
        parameters: Mapping[str, Tensor],
        batch: Any,
        axes: Axes,
        part: slice,
        cut: Tensor,
        weights: Tensor,
        power: Power,
    ) -> _Sums:
        totals = _Sums({}, {})
        leaves = list(parameters.values())
        for i, (columns, weight) in enumerate(zip(cut, weights, strict=True), part.start):
            output = self.outputs(self.model, _cut(batch, axes, slice(i, i + 1)))
            pulled = []
            for k, column in enumerate(columns.to(output.dtype)):
                keep = k + 1 < len(columns)
                gradients = torch.autograd.grad(output, leaves, column[None], retain_graph=keep, allow_unused=True)
                pulled.append({n: g for n, g in zip(parameters, gradients, strict=True) if g is not None})
            for total, found in zip(totals, _reduced(pulled, weight, power), strict=True):
                _add(total, found)
        return totals

    def _refusal(self, names: Sequence[str], cause: str = "") -> ValueError:
        modules = dict.fromkeys(f"`{name.rpartition('.')[0] or type(self.model).__name__}`" for name in names)
        return ValueError(
            f"samples are not independent: gradients of {', '.join(modules)} on a batch are not the sum of those of its"
            f" samples, each alone{cause}. Statistics of a batch, edges between samples and random numbers do that."
            " Choose an output that depends on one sample with `outputs=`; for the diagonal `estimator='batched'` takes"
            " batches as they are, and `SynapticIntelligence` and `RWalk` read no data at all."
        )


class Called(nn.Module):
    """A model that is called as ``outputs`` says."""

    def __init__(self, model: nn.Module, outputs: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    @override
    def forward(self, batch: Any) -> Tensor:
        return self.outputs(self.model, batch)


def _reduced(gradients: Iterable[Mapping[str, Tensor]], weight: Tensor, power: Power) -> _Sums:
    """Sums over the columns of a sample."""
    totals = _Sums({}, {})
    for k, found in enumerate(gradients):
        own = {name: dense(gradient) for name, gradient in found.items()}
        _add(totals.powers, {name: apply_power(gradient, power) for name, gradient in own.items()})
        _add(totals.weighted, {name: gradient * (weight * column_weight(k)) for name, gradient in own.items()})
    return totals


def _add(totals: dict[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, value in found.items():
        totals[name] = totals[name] + value if name in totals else value


def _cut(batch: Any, axes: Axes, part: slice) -> Any:
    """The same of some samples only."""
    given = iter(axes)

    def own(tensor: Tensor) -> Tensor:
        axis = next(given)
        return tensor if axis is None else tensor.narrow(axis, part.start, part.stop - part.start)

    return apply_to_collection(batch, Tensor, own)
