"""Input subspaces: for every layer the directions of its inputs in which its weight must not move."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.support.fisher_pass import FisherPass, Outputs
from lightning_collapse.penalties.support.grad_samplers import Rule, rule_of
from lightning_collapse.projections.base import UpdateProjection, raise_together
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.batch import batch_size
from lightning_collapse.utilities.distributed import from_first_process
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.module_tree import clean_name, is_transposed
from lightning_collapse.utilities.modules import is_to_be_ignored
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.sharding import local, unsharded


class Subspace(NamedTuple):
    """Protected directions of a layer's inputs.

    Attributes:
        directions: Orthonormal columns, ``(D, K)``.
        importance: Share of an update along each that is taken out, ``(K,)``, 0 to 1.

    Example:
        >>> Subspace(torch.eye(3)[:, :2], torch.ones(2)).importance
        tensor([1., 1.])
    """

    directions: Tensor
    importance: Tensor


class _Layer(NamedTuple):
    name: str
    module: nn.Module
    rule: Rule
    width: int
    turned: bool  # whether inputs are the rows of the weight


class InputSubspace(UpdateProjection):
    r"""Projects updates off the inputs of old tasks, :math:`\Delta \leftarrow \Delta (I - B \Lambda B^\top)`.

    What a linear layer or a convolution returns on an old input does not change if its weight moves outside of the span
    of such inputs alone. A subclass says which directions that are, see :meth:`grow`. Inputs of a convolution are
    patches, flattened as ``weight.flatten(1)`` is; of a layer on sequences every token is one, padding too.

    Weights of other kinds (grouped and transposed convolutions, packed attention, recurrent and embedding weights,
    tied, parametrized and complex ones), biases and normalizations cannot be projected so, and are frozen.

    Attributes:
        subspaces: By name of the weight.
        accumulates: Whether :meth:`grow` is given the second moment of all tasks so far; the sum is in ``moments``.

    Example:
        >>> class FirstInput(InputSubspace):
        ...     def grow(self, second_moment, known):
        ...         return Subspace(torch.eye(len(second_moment))[:, :1], torch.ones(1))
        >>> layer, first = nn.Linear(2, 1), FirstInput(n_samples=100)
        >>> first.start(layer)
        >>> first.learn(layer, [torch.ones(4, 2)])
        >>> first.readings()
        {'': {'rank': 1.0, 'capacity_left': 0.5}}
    """

    accumulates: ClassVar[bool] = False

    def __init__(self, n_samples: int) -> None:
        super().__init__(n_samples)
        self.subspaces: dict[str, Subspace] = {}
        self.moments: dict[str, Tensor] = {}
        self._layers: dict[str, _Layer] = {}
        self._factors: dict[str, tuple[Tensor, ...]] = {}

    @abstractmethod
    def grow(self, second_moment: Tensor, known: Subspace) -> Subspace:
        """The subspace of a layer after another task, of index ``learned``.

        Args:
            second_moment: Sum of outer products of the task's inputs, or those of all tasks if it ``accumulates``, not
                centered, ``(D, D)``, in ``float64`` where the device has it.
            known: The subspace so far, on the same device and in the same dtype.
        """

    @override
    def _cover(self, model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._layers = _matrices(model, named)
        self._factors = {}
        if not self._layers:
            raise ValueError("no linear layer and no convolution is there whose weight could be projected.")
        for name, layer in self._layers.items():
            if name in self.subspaces and (old := len(self.subspaces[name].directions)) != layer.width:
                raise ValueError(
                    f"`{layer.name}` receives {layer.width} numbers, and received {old} when a task was learned. Keep"
                    " its width, leave it out with `layers=[...]`, or begin with a new object."
                )
            shards = [getattr(p, "dim", None) for p in getattr(named[name], "placements", ())]
            if any(dim not in (None, 0) or (dim == 0 and layer.turned) for dim in shards):
                raise ValueError(
                    f"`{name}` is sharded along its inputs, and a projection needs all of a row. Shard rows, as"
                    " `fully_shard` does by default."
                )
        return {name: named[name] for name in self._layers}

    @override
    def learn(self, model: nn.Module, loader: Loader, outputs: Outputs | None = None) -> None:
        layers = self._layers
        with unsharded(model):
            over = FisherPass(model, loader, outputs, n_samples=self.n_samples)
            double = accumulation_dtype(over.device)
            found = [torch.zeros(a.width, a.width, dtype=double, device=over.device) for a in layers.values()]
            count, problem = 0, None
            try:
                with preserved_state(model), torch.no_grad():
                    count = _second_moments(over, list(layers.values()), found)
            except Exception as error:
                problem = error
        raise_together(problem, over.device)
        moments, _ = over.reduced(found, count)
        grown, summed = {}, {}
        for (name, layer), moment in zip(layers.items(), moments, strict=True):
            empty = Subspace(moment[:, :0], moment[0, :0])
            known = Subspace(*(part.to(moment) for part in self.subspaces.get(name, empty)))
            if not moment.trace().isfinite() or not moment.any():
                rank_zero_warn(f"`{layer.name}` saw no finite inputs of the task: nothing of it is protected there.")
            else:
                if self.accumulates:
                    moment += self.moments[name].to(moment) if name in self.moments else 0
                    summed[name] = moment.to("cpu")
                known = self.grow(moment, known)
            # of float32 parts the sum is not orthonormal for ever; and the start keeps its span and its order
            basis = torch.linalg.qr(known.directions)[0]
            wide = torch.promote_types(self.parameters[name].dtype, torch.float32)
            grown[name] = Subspace(basis.to("cpu", wide), known.importance.to("cpu", wide))
        self.moments |= summed
        self.subspaces |= from_first_process(grown)  # decompositions may differ by a sign or a tie
        self._factors = {}
        self.learned += 1

    @override
    @torch.no_grad()
    def project_(self, now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        if not self.learned:
            return
        frozen = [name for name in self.frozen if name in now]
        if frozen:
            foreach.copy_([local(now[name]) for name in frozen], [local(before[name]) for name in frozen])
        names = [name for name in now if name in self._layers and self._rank(name)]
        if names:
            moved, backward = ([local(of[name]) for name in names] for of in (now, before))
            foreach.sub_(backward, moved)
            self._add_protected(backward[0], names, moved, backward)

    @override
    def readings(self) -> dict[str, dict[str, float]]:
        left = {
            name: 1.0 - float(space.importance.sum()) / len(space.directions) for name, space in self.subspaces.items()
        }
        return {
            name.rpartition(".")[0]: {"rank": float(self._rank(name)), "capacity_left": left.get(name, 1.0)}
            for name in {**self._layers, **self.subspaces}
        }

    @override
    def nbytes(self) -> int:
        copies = sum(local(p).numel() * p.element_size() for p in self.parameters.values())
        # a basis and its product with the importance; in the pass a second moment, its sum and decomposition
        return copies + sum((2 * 4 + 4 * 8) * layer.width**2 for layer in self._layers.values())

    @override
    def state_dict(self) -> dict[str, Any]:
        spaces = {name: [part.to("cpu", copy=True) for part in space] for name, space in self.subspaces.items()}
        return {"learned": self.learned, "subspaces": spaces}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.learned = state_dict["learned"]
        self.subspaces = {name: Subspace(*(p.clone() for p in s)) for name, s in state_dict["subspaces"].items()}
        self._factors = {}

    @override
    def release(self) -> None:
        super().release()
        self._layers, self._factors = {}, {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": {}, "_factors": {}}

    def _rank(self, name: str) -> int:
        return self.subspaces[name].importance.numel() if name in self.subspaces else 0

    @full_precision  # which asks the first tensor for its device, and every kind of device if there is none
    def _add_protected(self, _: Tensor, names: list[str], weights: list[Tensor], changes: list[Tensor]) -> None:
        """Add the part of every change that lies in the protected directions to its weight."""
        for name, weight, change in zip(names, weights, changes, strict=True):
            *first, last = self._factors.get(name) or self._factored(name, change)
            turned = self._layers[name].turned
            matrix = change.T if turned else change if change.ndim == 2 else change.flatten(1)
            for factor in first:
                matrix = matrix @ factor
            if weight.ndim == 2:  # without a tensor as large as the weight
                (weight.T if turned else weight).addmm_(matrix, last)
            elif weight.is_contiguous():
                weight.view(len(weight), -1).addmm_(matrix, last)
            else:
                weight.add_((matrix @ last).view(change.shape))

    def _factored(self, name: str, change: Tensor) -> tuple[Tensor, ...]:
        """What a change is multiplied by, one after another."""
        directions, importance = (part.to(change) for part in self.subspaces[name])
        thin, flat = directions * importance, directions.T.contiguous()
        # one square product is cheaper than two thin ones from half of the width on
        self._factors[name] = (thin @ flat,) if 2 * len(importance) > len(directions) else (thin, flat)
        return self._factors[name]


def _matrices(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, _Layer]:
    """Layers that multiply all of their input by one weight of their own, by name of the weight."""
    names = {id(parameter): name for name, parameter in named.items()}
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    packed = {
        id(kid) for module in model.modules() if isinstance(module, nn.MultiheadAttention) for kid in module.modules()
    }
    found = {}
    for path, module in model.named_modules():
        weight, rule = module._parameters.get("weight"), rule_of(module)
        if weight is None or rule is None or id(weight) not in names or owners[id(weight)] > 1:
            continue
        other = isinstance(module, nn.Embedding) or hasattr(module, "normalized_shape") or id(module) in packed
        if other or weight.ndim < 2 or weight.is_complex() or getattr(module, "groups", 1) != 1:
            continue
        turned = is_transposed(module)
        width = len(weight) if turned else weight[0].numel()
        found[names[id(weight)]] = _Layer(clean_name(path), module, rule, width, turned)
    return found


def _second_moments(over: FisherPass, layers: list[_Layer], totals: list[Tensor]) -> int:
    """Add up outer products of what layers receive, and count samples."""
    calls: list[tuple[int, Tensor, Tensor]] = []

    def hook_of(index: int) -> Any:
        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            received = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if received is not None and received.is_floating_point() and not is_to_be_ignored():
                calls.append((index, received, output))

        return capture

    def forward(batch: Any) -> Tensor:
        calls.clear()
        returned = over.outputs(over.model, batch)
        return returned if isinstance(returned, Tensor) and returned.ndim else torch.empty(batch_size(batch))

    handles = [a.module.register_forward_hook(hook_of(i), with_kwargs=True) for i, a in enumerate(layers)]
    count = 0
    try:
        for _, outputs, rows in over.each(forward):
            for index, received, output in calls:
                layer, total = layers[index], totals[index]
                used: Any = layer.rule(layer.module, received.unsqueeze(1), output.unsqueeze(1))["weight"]
                for pair in used.factors(rows if len(received) == len(outputs) else len(received)):
                    inputs = pair[layer.turned].flatten(0, -2)
                    if inputs.shape[1] == layer.width:  # else it is no product with the weight
                        inputs = finite_rows(inputs, dtype=total.dtype)[0]
                        total.addmm_(inputs.T, inputs)
            count += rows
    finally:
        for handle in handles:
            handle.remove()
    return count
