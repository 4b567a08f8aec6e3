"""Feature pass: what chosen layers and the outputs of a network are on given batches, in eval mode, in mid-fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_collapse.callbacks.evaluation.preserved_fit import preserved_fit
from lightning_collapse.monitoring.feature_hooks import FeatureHooks
from lightning_collapse.spectral.sketch import GaussianSketch
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import all_gather_rows, max_over_processes, world_size
from lightning_collapse.utilities.features import as_row_mask, as_rows, evenly, padding_mask
from lightning_collapse.utilities.modules import Tap, clean_name
from lightning_collapse.utilities.targets import call_on

ROWS, MAX_DIM = 512, 512
OUTPUT = "output"
LOGITS = 1 << 18
"""Numbers that are kept of the outputs at most."""


class FeaturePass:
    """Rows of layers and outputs on batches, the same on every process; the network and the fit do not notice.

    Args:
        taps: Where to look.
        containment: Where failures of hooks are told.
    """

    def __init__(self, taps: Sequence[Tap], containment: Containment) -> None:
        self.taps = taps
        self.hooks = FeatureHooks(taps, ROWS, containment=containment)
        self._sketches: dict[int, GaussianSketch] = {}

    def run(
        self, trainer: Trainer, module: nn.Module, batches: Iterable[tuple[Any, bool]], device: torch.device
    ) -> dict[str, Tensor]:
        """Rows of all layers, and outputs, of all processes. Collective.

        Args:
            trainer: Whose precision the module runs in.
            module: Of whose layers the taps are.
            batches: On the device, and whether each counts.
            device: Of the module.

        Raises:
            RuntimeError: On every process, if a batch or the module fails on any.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in (*(tap.name for tap in self.taps), OUTPUT)}
        hooks, problem = self.hooks, ""
        try:
            with preserved_fit(trainer, module):
                for batch, counts in batches:
                    hooks.armed, hooks.mask = True, padding_mask(batch)
                    with trainer.precision_plugin.forward_context():
                        returned = call_on(module, batch)
                    hooks.armed = False
                    captured = hooks.pop()
                    if not counts:
                        continue
                    outputs, real = as_rows(returned), as_row_mask(returned, padding_mask(batch))
                    # a row that is padding is none, in both networks
                    for name, of_layer in captured.items():
                        found[name].append(self._narrow(of_layer.rows[of_layer.mask]))
                    if outputs is not None and outputs.shape[1] > 1:
                        outputs = outputs.detach().float() if real is None else outputs.detach().float()[real]
                        found[OUTPUT].append(evenly(outputs, _outputs_kept(outputs)))
        except Exception as error:  # of the user's batches or model: what is only watched goes on
            problem = f"{type(error).__name__}: {error}"
        finally:
            hooks.armed = False
            hooks.pop()
        own = [float(bool(problem)), *(rows[0].shape[1] if rows else 0 for rows in found.values())]
        failed, *widths = max_over_processes(own, device)
        if failed:
            raise RuntimeError(problem or "another process failed")
        together = {}
        for (name, parts), width in zip(found.items(), map(int, widths), strict=True):
            if width:
                rows = torch.cat(parts) if parts else torch.zeros(0, width, device=device)
                most = (_outputs_kept(rows) if name == OUTPUT else ROWS) // world_size()
                together[name] = finite_rows(*all_gather_rows(evenly(rows, most)))
        return together

    def _narrow(self, rows: Tensor) -> Tensor:
        width = rows.shape[1]
        if width > MAX_DIM and width not in self._sketches:
            self._sketches[width] = GaussianSketch(width, MAX_DIM, rows.device)
        return self._sketches[width](rows) if width > MAX_DIM else rows.float()


def counterparts(reference: nn.Module, taps: Sequence[Tap], pl_module: nn.Module) -> list[Tap]:
    """The same layers of the reference."""
    call = "`DriftMonitor(reference=...)`"
    own = {id(parameter) for parameter in pl_module.parameters()}
    if any(id(parameter) in own for parameter in reference.parameters()):
        raise MisconfigurationException(f"{call} holds weights of the model itself. Pass a copy: `deepcopy(model)`.")
    names = {id(module): clean_name(name) for name, module in reversed(list(pl_module.named_modules()))}
    there = {clean_name(name): module for name, module in reversed(list(reference.named_modules()))}
    if lost := [name for tap in taps if (name := names[id(tap.module)]) not in there]:
        raise MisconfigurationException(
            f"{call} has no layer `{lost[0]}`. Pass a copy of the model: `deepcopy(model)`."
        )
    found = [Tap(tap.name, there[names[id(tap.module)]], tap.side) for tap in taps]
    for tap, other in zip(taps, found, strict=True):
        shapes = [{name: tuple(p.shape) for name, p in of.named_parameters()} for of in (tap.module, other.module)]
        if unlike := [name for name, shape in shapes[0].items() if shapes[1].get(name) != shape]:
            raise MisconfigurationException(
                f"{call}: `{unlike[0]}` of layer `{tap.name}` has shape {shapes[0][unlike[0]]}, and"
                f" {shapes[1].get(unlike[0])} there. Pass a copy of the model, or other `layers`."
            )
    return found


def finite_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """Rows that count, at a point, where one may wait for the device."""
    return rows[mask & rows.isfinite().all(dim=1)]


def _outputs_kept(outputs: Tensor) -> int:
    return min(ROWS, max(LOGITS // int(outputs.shape[1]), world_size()))
