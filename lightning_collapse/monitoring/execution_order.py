"""Execution order: which modules a training step runs, and in which order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import from_first_process
from lightning_collapse.utilities.modules import (
    Execution,
    clean_name,
    in_backward,
    is_compiled,
    is_to_be_ignored,
    weighted_layers,
)


class ExecutionOrder:
    """Listens to the first batch for :func:`~lightning_collapse.utilities.default_taps`, and then takes itself away.

    Forward pre-hooks note the name of every module that is called, whether gradients pass through it, and the kinds of
    its inputs; no tensor is read. A module that only receives vectors straight from the batch, while later ones receive
    maps or sequences, embeds a condition (a time step, a class) and is left out. Compiled models are not listened to:
    hooks that come and go would cost compilations.

    Args:
        root: The model, before its first batch.
        owner: In whose name hooks run, for warnings.

    Example:
        >>> net = nn.ModuleDict({"second": nn.Linear(4, 2), "first": nn.Linear(8, 4)})
        >>> order = ExecutionOrder(net)
        >>> _ = net["second"](net["first"](torch.zeros(3, 8)))
        >>> order.pop().order
        ('first', 'second')
    """

    def __init__(self, root: nn.Module, owner: str = "ExecutionOrder") -> None:
        self._contained = Containment(owner)
        self._carries: dict[str, bool] = {}
        self._vectors: list[str] = []
        self._maps: list[str] = []
        self._raw_maps: list[str] = []
        self._handles = (
            [] if is_compiled(root) else [self._listen(*named) for named in root.named_modules() if named[0]]
        )
        self._layers = {clean_name(name) for name, _ in weighted_layers(root)}

    def pop(self) -> Execution | None:
        """What ran since construction, on every process what the first one ran; ``None`` where nothing was noted.

        Collective. Removes the hooks.
        """
        self.remove()
        order = tuple(name for name in self._carries if not self._is_condition(name))
        found = from_first_process(Execution(order, tuple(name for name in order if not self._carries[name])))
        return found if found.order else None

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _listen(self, name: str, module: nn.Module) -> Any:
        name = clean_name(name)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with self._contained(
                "the order of modules", "default layers follow the order of registration", self.remove
            ):
                if in_backward() or not is_to_be_ignored():
                    self._note(
                        name, module, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                    )

        return module.register_forward_pre_hook(note, with_kwargs=True)

    def _note(self, name: str, module: nn.Module, inputs: list[Tensor]) -> None:
        first = name not in self._carries
        graph = any(tensor.requires_grad for tensor in inputs)
        trained = graph or any(parameter.requires_grad for parameter in module.parameters())
        # activation checkpointing may run without gradients first, and again in the backward pass
        self._carries[name] = self._carries.get(name, False) or (trained and torch.is_grad_enabled())
        if not first or not inputs:
            return
        maps = [tensor for tensor in inputs if tensor.ndim > (2 if tensor.is_floating_point() else 1)]
        if maps:
            self._maps.append(name)
            if name in self._layers and not all(tensor.requires_grad for tensor in maps):
                self._raw_maps.append(name)
        elif not graph:
            self._vectors.append(name)

    def _is_condition(self, name: str) -> bool:
        around = next((vector for vector in self._vectors if f"{name}.".startswith(f"{vector}.")), None)
        if around is None:
            return False
        places = {other: i for i, other in enumerate(self._carries)}
        outside = [other for other in self._maps if not f"{other}.".startswith(f"{around}.")]
        source = any(other in self._raw_maps for other in outside)
        return source and any(self._carries[other] and places[other] > places[around] for other in outside)
