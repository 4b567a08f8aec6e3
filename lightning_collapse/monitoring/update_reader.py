"""Update reader: what optimizer steps do to parameters, from copies that live from before a step to after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_collapse.functional.update_geometry import adam_rms_ratio
from lightning_collapse.monitoring.optimizer_facts import Facts, facts_of, second_moment
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size
from lightning_collapse.utilities.gradients import local_part, shards_of
from lightning_collapse.utilities.parameters import why_no_number

COLUMNS = ("known", "weight", "update", "earlier", "product", "stale", "second", "lost", "asked", "bad")
"""What is summed of every parameter: whether it was read; squares of weight, update and earlier update, and the product
of the two; squares of gradients over second moments, and how many; entries that were left as they were of those that
had a gradient, in 16 bits; gradients that are not finite."""


class UpdateReader:
    """Copies the parameters of an optimizer before a step and reads what became of them after it.

    One copy of them lives during a step, and one update from a step to the next where the next one is read too, for the
    cosine of both. Sharded parameters are read where they lie. Nothing waits for the device but a learning rate that is
    a tensor.

    Args:
        parameters: Those that are watched.

    Attributes:
        facts: Of every parameter that was read, by its index.

    Example:
        >>> weights = nn.Parameter(torch.ones(2))
        >>> optimizer, reader = torch.optim.SGD([weights], lr=0.5), UpdateReader([weights])
        >>> weights.grad = torch.ones(2)
        >>> reader.before(optimizer)
        >>> optimizer.step()
        >>> reader.after(optimizer, read=True, keep=False)
        >>> round(dict(zip(COLUMNS, reader.sums(torch.device("cpu"))[0].tolist()))["update"], 6)
        0.5
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        self._copies: dict[int, Tensor] = {}
        self._earlier: dict[int, Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self.facts: dict[int, Facts] = {}

    def before(self, optimizer: Optimizer) -> None:
        """Copy what the optimizer is about to change."""
        for i, parameter, _ in self._own(optimizer):
            self._copies[i] = local_part(parameter.detach()).clone()

    @torch.no_grad()
    def after(self, optimizer: Optimizer, read: bool, keep: bool) -> None:
        """Take in what the optimizer has changed since :meth:`before`, and let the copies go.

        Args:
            optimizer: The same.
            read: Whether this step is one to tell of; the last one counts.
            keep: Whether the next one is.
        """
        for i, parameter, group in self._own(optimizer):
            copy = self._copies.pop(i, None)
            if copy is None:
                continue
            now = local_part(parameter.detach())
            wide = torch.promote_types(now.dtype, torch.float32)
            update = now.to(wide) - copy.to(wide)
            if read:
                self.facts[i] = facts_of(optimizer, group)
                self._rows[i] = self._row(i, parameter, copy, update, second_moment(optimizer, group, parameter), group)
            self._earlier.pop(i, None)
            if keep:
                self._earlier[i] = update

    def sums(self, device: torch.device) -> Tensor:
        """The sums of all processes over what was read since the last time, ``(parameters, COLUMNS)``. Collective."""
        dtype = accumulation_dtype(device)
        table = torch.zeros(len(self._parameters), len(COLUMNS), dtype=dtype, device=device)
        if self._rows:
            places = torch.tensor(list(self._rows), device=device)
            table[places] = torch.stack([row.to(device) for row in self._rows.values()])
        self._rows = {}
        return all_reduce_sum(table)

    def state(self) -> dict[str, Tensor]:
        """The updates that the next step is compared with, by index, on the host; those of shards are left out."""
        whole = {i: update for i, update in self._earlier.items() if not hasattr(self._parameters[i], "to_local")}
        return {str(i): update.cpu() for i, update in whole.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where :meth:`state` was called."""
        for name, update in state.items():
            if int(name) < len(self._parameters):
                self._earlier[int(name)] = update.to(self._parameters[int(name)].device)

    def clear(self) -> None:
        """Forget all copies."""
        self._copies, self._earlier, self._rows = {}, {}, {}

    def _own(self, optimizer: Optimizer) -> list[tuple[int, nn.Parameter, Mapping[str, Any]]]:
        pairs = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
        return [(self._index[id(p)], p, g) for p, g in pairs if id(p) in self._index and not why_no_number(p)]

    def _row(
        self,
        i: int,
        parameter: nn.Parameter,
        copy: Tensor,
        update: Tensor,
        second: Tensor | None,
        group: Mapping[str, Any],
    ) -> Tensor:
        """One row of :meth:`sums`, weighed so that the sum over processes is that of the whole parameter."""
        dtype, wide = accumulation_dtype(update.device), update.dtype
        row: dict[str, Tensor] = {
            "known": torch.ones((), device=update.device),
            "weight": _square(copy.to(wide)),
            "update": _square(update),
        }
        earlier = self._earlier.get(i)
        if earlier is not None and earlier.shape == update.shape:
            row |= {"earlier": _square(earlier), "product": (earlier * update).sum(dtype=dtype)}
        gradient = parameter.grad
        if gradient is not None and not gradient.is_sparse:
            slope = local_part(gradient.detach()).to(wide)
            row["bad"] = (~slope.sum(dtype=dtype).isfinite()).to(dtype)
            if second is not None and slope.numel():
                ratio = adam_rms_ratio(slope, local_part(second).to(wide), float(group.get("eps", 1e-8)))
                number = torch.full_like(row["bad"], slope.numel())
                row |= {"stale": ratio.to(dtype).square() * number, "second": number}
            if copy.element_size() < 4 and self.facts[i].moves:
                asked = slope != 0
                row |= {"lost": (asked & (update == 0)).sum(), "asked": asked.sum()}
        zero = torch.zeros((), dtype=dtype, device=update.device)
        share = shards_of(parameter) / world_size()
        return torch.stack([row.get(name, zero).to(dtype) * share for name in COLUMNS])


def _square(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=accumulation_dtype(values.device))
    return norm.square()
