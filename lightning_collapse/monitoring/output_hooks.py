"""Output hooks: what the logits of a head come to, read in the moment it returns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_collapse.functional.output_entropy import OutputRows, output_rows
from lightning_collapse.monitoring.graph_call import GraphCall
from lightning_collapse.monitoring.output_usage import usage_sums
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.features import find_features
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import Tap, is_to_be_ignored
from lightning_collapse.utilities.targets import IGNORED


class Outputs(NamedTuple):
    """What a head returned in one step; every row is one token, sample or decision.

    Attributes:
        rows: See :class:`~lightning_collapse.functional.OutputRows`, fields of shape ``(n,)``.
        counted: Which rows count, boolean ``(n,)``: neither padding nor without a target.
        vocabulary: Number of outputs.
        sequences: Shape of the logits without their last dimension, if that is ``(N, L)``, of each call.
        usage: See :func:`~lightning_collapse.monitoring.output_usage.usage_sums`.
        unpaired: Number of targets, if it is not that of the rows.
    """

    rows: OutputRows
    counted: Tensor
    vocabulary: int
    sequences: tuple[tuple[int, int], ...]
    usage: Tensor
    unpaired: int = 0


class OutputHooks(HookOwner):
    """A forward hook that reads logits while ``armed``, a few rows at a time, and keeps four numbers of each.

    Calls with a gradient count, those of a policy that is trained and not of the one that acts inside the step; where
    none has one, all. Recomputation in the backward pass does not. Compiled with the model, the hook leaves one graph.

    Args:
        head: What returns logits ``(..., V)``: a tensor, or an output with ``logits`` among its fields.
        containment: Where failures are told.
        then: Called with the targets, or ``None``, behind every call that is read, while the step runs.

    Attributes:
        armed: Whether to read now.
        targets: Of the running batch, integers, or a function that returns them when the head has run.
        mask: Padding mask ``(N, L)`` of the running batch.

    Example:
        >>> net = nn.Linear(4, 3)
        >>> hooks = OutputHooks(Tap("net", net), Containment("example"))
        >>> hooks.armed, hooks.targets = True, torch.tensor([0, 2, -100])
        >>> _ = net(torch.zeros(3, 4))
        >>> hooks.pop().counted.tolist()
        [True, True, False]
        >>> hooks.remove()
    """

    def __init__(
        self, head: Tap, containment: Containment, then: Callable[[Tensor | None], None] | None = None
    ) -> None:
        self.armed = False
        self.targets: Tensor | Callable[[], Tensor | None] | None = None
        self.mask: Tensor | None = None
        self.head = head
        self._contained, self._then = containment, then
        self._calls: list[tuple[bool, Outputs]] = []
        self._hooks: list[_Hook] = []
        with containment(f"a hook on `{head.name}`"):
            self._hooks = [_Hook(self, head.module)]

    def pop(self) -> Outputs | None:
        """Hand over what was read since the last time; ``None`` if the head did not run."""
        self.targets = self.mask = None
        calls, self._calls = self._calls, []
        read = [outputs for trained, outputs in calls if trained] or [outputs for _, outputs in calls]
        read = [outputs for outputs in read if outputs.vocabulary == read[-1].vocabulary]
        if not read:
            return None
        rows = OutputRows(*(torch.cat(column) for column in zip(*(each.rows for each in read), strict=True)))
        sequences = tuple(shape for each in read for shape in each.sequences)
        unpaired = max(each.unpaired for each in read)
        usage = torch.stack([each.usage for each in read]).sum(dim=0)
        return Outputs(rows, torch.cat([each.counted for each in read]), read[0].vocabulary, sequences, usage, unpaired)

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._calls, self.armed = [], [], False

    def capture(self, value: Any) -> None:
        """Read what the head has returned; for the hook."""
        if not self.armed or is_to_be_ignored():
            return
        try:
            with torch.no_grad():
                logits = logits_of(value)
                if logits is None:
                    raise TypeError("it returned no logits (..., V)")
                targets = self._targets_for(logits)
                self._calls.append((logits.requires_grad, self._read(logits.detach(), targets)))
                if self._then is not None:
                    self._then(targets)
        except Exception as error:
            self._contained.catch(f"reading the logits of `{self.head.name}`", "what fails is left out", error)

    def _targets_for(self, logits: Tensor) -> Tensor | None:
        targets = self.targets() if callable(self.targets) else self.targets
        return None if targets is None or targets.is_floating_point() else targets.detach().to(logits.device)

    def _read(self, logits: Tensor, targets: Tensor | None) -> Outputs:
        shape = logits.shape[:-1]
        unpaired = 0 if targets is None or targets.numel() == shape.numel() else targets.numel()
        paired = None if targets is None or unpaired else targets.reshape(shape)
        rows = output_rows(logits, paired)
        counted = torch.ones(shape, dtype=torch.bool, device=logits.device) if paired is None else paired != IGNORED
        if self.mask is not None and self.mask.shape == shape:
            counted = counted & self.mask.to(logits.device).bool()
        sequences = ((shape[0], shape[1]),) if len(shape) == 2 else ()
        flat = OutputRows(*(field.flatten() for field in rows))
        usage = usage_sums(logits, paired, counted)
        return Outputs(flat, counted.flatten(), logits.shape[-1], sequences, usage, unpaired)


class _Hook(ModuleHook):
    def __init__(self, owner: OutputHooks, module: nn.Module) -> None:
        self.owner, self.call = owner, GraphCall(self._receive)
        super().__init__(module)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if torch.compiler.is_compiling():
            logits = logits_of(value)
            self.call([None if logits is None else logits.detach()])
        elif self.owner.armed:
            self.owner.capture(value)

    def _receive(self, tensors: Sequence[Tensor | None], note: str) -> None:
        self.owner.capture(tensors[0])


def logits_of(value: Any) -> Tensor | None:
    """The logits in what a module has returned: a field of that name, or the first tensor of floating-point numbers.

    Example:
        >>> logits_of({"loss": torch.tensor(0.5), "logits": torch.zeros(4, 2)}).shape
        torch.Size([4, 2])
    """
    named = value.get("logits") if isinstance(value, Mapping) else getattr(value, "logits", None)
    found = named if isinstance(named, Tensor) else find_features(value)
    return found if found is not None and found.is_floating_point() and found.ndim > 1 else None
