"""Logit lens: what the head would say of the hidden states of earlier layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.functional.output_entropy import CHUNK, OutputRows, output_rows
from lightning_collapse.monitoring.output_hooks import logits_of
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.features import evenly, find_features
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import Tap, clean_name, hooks_ignored, is_to_be_ignored


class LogitLens(HookOwner):
    """Keeps rows of hidden states until the head runs, and sends them through the final norm and the head [1].

    At most 1024 rows of a layer, spread evenly, in the precision of the step and before the optimizer moves the
    weights. What the final norm itself receives is read too: it must come out as what the head returned, or the lens
    does not follow the model. Hooks of others on norm and head do not see these calls. Compiled models and sharded
    heads are not read.

    Args:
        layers: Whose outputs to read, hidden states ``(..., d)``.
        head: The layer that returns logits.
        norm: The final norm; ``None`` for none.
        containment: Where failures are told.

    Attributes:
        armed: Whether to keep rows now.
        names: Of all that is read.
        last: Of the input of the final norm, among them.

    References:
        [1] nostalgebraist, *interpreting GPT: the logit lens*, 2020; Belrose et al., 2023,
        https://arxiv.org/abs/2303.08112.
    """

    def __init__(self, layers: Sequence[Tap], head: Tap, norm: Tap | None, containment: Containment) -> None:
        self.armed = False
        self._head, self._norm, self._contained = head, norm, containment
        self._states: dict[str, Tensor] = {}
        self._read: dict[str, OutputRows] = {}
        self._counts: dict[str, int] = {}
        last = Tap(f"{(norm or head).name}.input", (norm or head).module, "input")
        self.names, self.last = [*(tap.name for tap in layers), last.name], last.name
        self._hooks = [
            ModuleHook(tap.module, before=tap.side == "input", function=partial(self._keep, tap))
            for tap in (*layers, last)
        ]

    def project(self, targets: Tensor | None) -> None:
        """Read what was kept, with the targets of the step; called when the head has run, in its place of the step."""
        states, self._states = self._states, {}
        with self._contained("the logit lens", "its curves end here", self.remove), torch.no_grad(), hooks_ignored():
            for name, rows in states.items():
                count = self._counts[name]
                fits = targets is not None and targets.numel() == count
                wanted = evenly(targets.flatten(), CHUNK) if fits and targets is not None else None
                hidden = rows if self._norm is None else self._norm.module.forward(rows)
                logits = logits_of(self._head.module.forward(hidden))
                if logits is not None:
                    self._read[name] = output_rows(logits, wanted)

    def pop(self) -> dict[str, OutputRows]:
        """Hand over what was read in the latest call of the head, by layer."""
        read, self._read, self._states = self._read, {}, {}
        return read

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._states, self.armed = [], {}, False

    def _keep(self, tap: Tap, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if not self.armed or torch.compiler.is_compiling() or is_to_be_ignored():
            return
        with self._contained(f"reading layer `{tap.name}` for the lens", "it is left out"):
            value = (*args, *value.values()) if tap.side == "input" else value
            hidden = find_features(value)
            if hidden is not None and hidden.ndim > 1:
                rows = hidden.detach().flatten(0, -2)
                self._counts[tap.name], self._states[tap.name] = len(rows), evenly(rows, CHUNK)


def final_norm(root: nn.Module, head: nn.Module, layers: Sequence[nn.Module]) -> Tap | None:
    """The last norm that the model defines outside of its blocks, which are what holds the layers of a lens.

    Example:
        >>> blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2))
        >>> net = nn.ModuleDict({"blocks": blocks, "norm": nn.LayerNorm(4), "head": nn.Linear(4, 9)})
        >>> final_norm(net, net["head"], [blocks[0]]).name
        'norm'
    """
    names = {id(module): name for name, module in root.named_modules()}
    around = {names[id(layer)].rpartition(".")[0] for layer in layers if id(layer) in names} - {""}
    around |= {names[id(layer)] for layer in layers if id(layer) in names}
    norms = [
        Tap(clean_name(name), module)
        for name, module in root.named_modules()
        if "norm" in type(module).__name__.lower()
        and module is not head
        and any(True for _ in module.parameters(recurse=False))
        and not any(f"{name}.".startswith(f"{block}.") for block in around)
    ]
    return norms[-1] if norms else None
