"""Gradients of single samples of any model: each sample is a batch of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from lightning_collapse.penalties.support.output_gradients import Columns
from lightning_collapse.penalties.support.sample_gradients import Power, apply_power, wide


class OneByOne:
    """Every sample a batch of its own: several at a time by ``torch.func.vmap``, or in a loop where that fails.

    Args:
        model: In eval mode.
        outputs: How it is called on a batch.
        chunk_size: Samples at a time.

    Attributes:
        method: ``"vmap"`` or ``"loop"``.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[Any, Any], Tensor], chunk_size: int) -> None:
        self.model, self.outputs, self.chunk_size = model, outputs, chunk_size
        self.method = "vmap"
        self._called = Called(model, outputs)

    def __call__(
        self, parameters: Mapping[str, Tensor], batch: Any, columns: Columns, samples: int, rows: int, power: Power
    ) -> Iterator[dict[str, Tensor]]:
        """Sums over columns and a few of the first ``rows`` of ``samples`` at a time, by name of the parameter."""
        for start in range(0, rows, self.chunk_size):
            stop = min(start + self.chunk_size, rows)
            cut = torch.stack([columns.make(k)[start:stop] for k in range(columns.number)], dim=1)
            if self.method == "vmap":
                try:
                    found = self._vmapped(parameters, batch, samples, slice(start, stop), cut, power)
                except (RuntimeError, NotImplementedError, ValueError, TypeError):
                    self.method = "loop"  # recurrent kernels, control flow that depends on data, and the like
                else:
                    yield found
                    continue
            rest = (_cut(batch, samples, slice(start + i, start + i + 1)) for i in range(len(cut)))
            yield self._looped(parameters, rest, cut, power)

    def _vmapped(
        self, parameters: Mapping[str, Tensor], batch: Any, samples: int, rows: slice, cut: Tensor, power: Power
    ) -> dict[str, Tensor]:
        tensors: list[Tensor] = []
        apply_to_collection(batch, Tensor, tensors.append)
        apart = [_is_apart(tensor, samples) for tensor in tensors]
        tensors = [tensor[rows] if own else tensor for tensor, own in zip(tensors, apart, strict=True)]
        leaves = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}

        def one(columns: Tensor, *values: Tensor) -> dict[str, Tensor]:
            given = iter([value.unsqueeze(0) if own else value for value, own in zip(values, apart, strict=True)])
            sample = apply_to_collection(batch, Tensor, lambda _: next(given))
            output, pull, *_ = vjp(lambda weights: functional_call(self._called, weights, (sample,)), leaves)
            return _reduced((pull(column)[0] for column in columns.to(output.dtype).unsqueeze(1)), power)

        in_dims = (0, *(0 if own else None for own in apart))
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", "There is a performance drop")
            found = vmap(one, in_dims=in_dims, randomness="different")(cut, *tensors)
        return {name.removeprefix("model."): value.sum(dim=0) for name, value in found.items()}

    def _looped(
        self, parameters: Mapping[str, Tensor], batches: Iterable[Any], cut: Tensor, power: Power
    ) -> dict[str, Tensor]:
        found = []
        for batch, columns in zip(batches, cut, strict=True):
            output = self.outputs(self.model, batch)
            for k, column in enumerate(columns.to(output.dtype)):
                keep = k + 1 < len(columns)
                leaves = list(parameters.values())
                gradients = torch.autograd.grad(output, leaves, column[None], retain_graph=keep, allow_unused=True)
                found.append({n: g for n, g in zip(parameters, gradients, strict=True) if g is not None})
        return _reduced(found, power)


class Called(nn.Module):
    """A model that is called as ``outputs`` says."""

    def __init__(self, model: nn.Module, outputs: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    @override
    def forward(self, batch: Any) -> Tensor:
        return self.outputs(self.model, batch)


def _reduced(gradients: Iterable[Mapping[str, Tensor]], power: Power) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for found in gradients:
        for name, gradient in found.items():
            value = apply_power(wide(gradient.to_dense() if gradient.is_sparse else gradient), power)
            totals[name] = totals[name] + value if name in totals else value
    return totals


def _is_apart(tensor: Tensor, samples: int) -> bool:
    """Whether a tensor of a batch has a row for every sample."""
    return tensor.ndim > 0 and len(tensor) == samples


def _cut(batch: Any, samples: int, rows: slice) -> Any:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor[rows] if _is_apart(tensor, samples) else tensor)
