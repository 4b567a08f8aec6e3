"""Parameter snapshot: where tensors of a model were at some time, and how far they have gone since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_collapse.penalties.support.shards import Layout
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size
from lightning_collapse.utilities.gradients import local_part, shards_of
from lightning_collapse.utilities.parameters import why_no_number
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.sharding import local
from lightning_collapse.utilities.weight_matrices import whole


class ParameterSnapshot:
    """A copy of tensors by name, sharded like them.

    The parts of a complex tensor count as numbers each; codes of quantized weights are no numbers, and left out.

    Args:
        tensors: Parameters and buffers as they are now.
        saved: What :meth:`state_dict` returned, to be taken for the copy of those it has in the same shape.
    """

    def __init__(self, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor] | None = None) -> None:
        self._copies: dict[str, Tensor] = {}
        self.add(tensors, saved)

    def add(self, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor] | None = None) -> None:
        """Copy further tensors, or take those that were saved for the copies."""
        for name, tensor in tensors.items():
            if why_no_number(tensor):
                continue
            copy = self._copies[name] = tensor.detach().clone()
            value = (saved or {}).get(name)
            if value is not None and value.shape == copy.shape:
                local(copy).copy_(Layout.of(copy).cut(value.to(copy.device)))

    @torch.no_grad()
    def change(self, tensors: Mapping[str, Tensor], order: int, move: bool = False) -> Tensor:
        """This process's part of the sums of ``|change| ** order``, of those tensors that are known, and 0 of others.

        Args:
            tensors: The tensors now.
            order: 1 or 2.
            move: Whether the copy follows, which then needs no second one while it compares.

        Returns:
            Shape ``(len(tensors),)``; the sum over processes is that of whole tensors. Waits for nothing.
        """
        known = {name: tensor.detach() for name, tensor in tensors.items() if self._knows(name, tensor)}
        if not known:
            return torch.zeros(len(tensors))
        now = [local_part(tensor) for tensor in known.values()]
        copies = [local_part(self._copies[name]) for name in known]
        if move:
            foreach.sub_(copies, now)
        steps = copies if move else foreach.sub(now, copies)
        sums = _powers(list(known.values()), steps, order)
        if move:
            foreach.copy_(copies, now)
        return _placed(sums, [i for i, name in enumerate(tensors) if name in known], len(tensors))

    def state_dict(self) -> dict[str, Tensor]:
        """The copies, whole and on the host. Collective."""
        return {name: whole(copy).to("cpu", copy=True) for name, copy in self._copies.items()}

    def _knows(self, name: str, tensor: Tensor) -> bool:
        return name in self._copies and self._copies[name].shape == tensor.shape


def mean_changes(
    snapshot: ParameterSnapshot, tensors: Mapping[str, Tensor], groups: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Sensitivity of modules: the mean absolute change of their entries; the copy follows.

    Collective, and one transfer to the host.

    Args:
        snapshot: Of the tensors before.
        tensors: By name, as they are now.
        groups: Names of the tensors of every module.
    """
    sums = snapshot.change(tensors, order=1, move=True)
    places = {name: i for i, name in enumerate(tensors)}
    belongs = torch.zeros(len(groups), len(places), dtype=sums.dtype)
    for row, names in zip(belongs, groups.values(), strict=True):
        row[[places[name] for name in names]] = 1 / sum(tensors[name].numel() for name in names)
    values = (belongs.to(sums.device) @ all_reduce_sum(sums)).tolist()  # of a point: the one transfer
    return dict(zip(groups, values, strict=True))


@torch.no_grad()
def absolute_sums(tensors: Sequence[Tensor]) -> Tensor:
    """This process's part of the sums of absolute values, shape ``(len(tensors),)``; 0 of what is no number.

    For no tensor a single 0.
    """
    places = [i for i, tensor in enumerate(tensors) if not why_no_number(tensor)]
    if not places:
        return torch.zeros(len(tensors) or 1)
    known = [tensors[i].detach() for i in places]
    return _placed(_powers(known, [local_part(tensor) for tensor in known], 1), places, len(tensors))


def _placed(sums: Tensor, places: Sequence[int], number: int) -> Tensor:
    """Sums at their places among ``number``, and 0 at others."""
    found = sums.new_zeros(number)
    found[torch.tensor(places, device=sums.device)] = sums
    return found


def _powers(tensors: Sequence[Tensor], parts: Sequence[Tensor], order: int) -> Tensor:
    """Sums of ``|part| ** order``, weighed so that the sum over processes is that of the whole tensors."""
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    norms = foreach.norm(list(parts), order, dtype=wide)
    device = parts[0].device
    total = torch.float32 if device.type == "mps" else torch.float64
    shares = [shards_of(tensor) / world_size() for tensor in tensors]
    sums = torch.stack([norm.to(device) for norm in norms]).to(total) ** order
    return sums * torch.tensor(shares, dtype=total, device=device)
