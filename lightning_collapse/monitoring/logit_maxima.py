"""Logit maxima: the largest logit of every head in the forward passes of a step, and whether weights scale it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.functional.attention_logits import extremes_of_call
from lightning_collapse.monitoring.attention_hooks import AttentionHooks, Captured
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.attention_calls import AttentionCall
from lightning_collapse.utilities.attention_projections import AttentionProjections
from lightning_collapse.utilities.distributed import max_over_processes
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.hooks import ModuleHook
from lightning_collapse.utilities.modules import Tap

_ALL = 2**31
TOLERANCE = 1e-3, 3e-2
"""Relative spread of ratios of lengths that is rounding, in single and in half precision."""


class LogitMaxima:
    """Largest logit of every head over all pairs, of the training steps since it was last taken.

    In the first step it is also compared whether the queries and keys of a call are as long as what their projections
    returned, up to one factor: a rotation or a scale may stand between them, a norm or another order of heads may not.

    Args:
        module: The ``LightningModule``.
        projections: Of the layers to read.
        failed: Called with the name of a layer and why it could not be read, once or more.
    """

    def __init__(
        self,
        module: nn.Module,
        projections: Sequence[AttentionProjections],
        failed: Callable[[str, str], None],
    ) -> None:
        self._projections = {found.name: found for found in projections}
        self._failed = failed
        taps = [Tap(found.name, found.module) for found in projections]
        self._hooks = AttentionHooks(taps, self._capture, self._say, _ALL, _ALL)
        self._scope = StepScope(module)
        self._maxima: dict[str, Tensor] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._scales: dict[str, Tensor] = {}
        self._outputs: dict[tuple[str, str], Tensor] = {}
        self._probes: list[ModuleHook] = []
        for found in projections:
            for child in {found.query, found.key} - {""}:
                probe = partial(self._probe, found.name, child)
                self._probes.append(ModuleHook(found.module.get_submodule(child), function=probe))

    def before_batch(self, batch: Any) -> None:
        """Read the training step of this batch."""
        mask = padding_mask(batch)
        self._hooks.mask = mask if mask is None else mask.bool()
        self._scope.request(self._hooks)

    def agree(self, names: Sequence[str], device: torch.device) -> dict[str, tuple[int, int]]:
        """Number and width of the heads of those layers whose logits scale with their weights, on every process.

        Collective, and waits for the device: to be asked once.
        """
        facts: list[float] = []
        for name in names:
            refuted = float(name in self._scales and not self._scales[name])
            facts += [*self._shapes.get(name, (0, 0)), refuted]
        facts = max_over_processes(facts, device)
        self._stop_probing()
        agreed = {}
        for i, name in enumerate(names):
            heads, width, refuted = facts[3 * i : 3 * i + 3]
            if refuted:
                self._failed(name, "its queries or keys are not what the projections return, up to a scale")
            elif not heads:
                self._failed(name, "no attention was captured in it in the first step")
            else:
                agreed[name] = int(heads), int(width)
        return agreed

    def pop(self, name: str, heads: int, device: torch.device) -> Tensor:
        """What was read of a layer since it was last taken, ``(heads,)``; minus infinity where nothing was."""
        largest = self._maxima.pop(name, None)
        dtype = accumulation_dtype(device)
        if largest is None or len(largest) != heads:
            return torch.full((heads,), -torch.inf, dtype=dtype, device=device)
        return largest.to(device, dtype)

    def forget(self, name: str) -> None:
        """Drop what was read of a layer."""
        self._maxima.pop(name, None)

    def remove(self) -> None:
        """Stop listening; may be called twice."""
        self._stop_probing()
        self._scope.remove()
        self._maxima.clear()

    def _capture(self, name: str, captured: Captured) -> None:
        if not isinstance(captured, AttentionCall):
            self._failed(name, "it writes its attention out, which shows no queries and keys")
            return
        largest = extremes_of_call(captured).highest
        before = self._maxima.get(name)
        self._maxima[name] = largest if before is None or len(before) != len(largest) else before.maximum(largest)
        self._shapes[name] = len(largest), captured.query.shape[-1]
        if self._probes:
            scales = self._compare(self._projections[name], captured)
            self._scales[name] = scales & self._scales.get(name, scales)

    def _compare(self, projections: AttentionProjections, call: AttentionCall) -> Tensor:
        """Whether queries and keys are what the projections returned, 0-dimensional and boolean."""
        refuted = torch.zeros((), dtype=torch.bool, device=call.query.device)
        if isinstance(projections.module, nn.MultiheadAttention):
            return ~refuted  # the call is made from its weights
        outputs = [
            self._outputs.pop((projections.name, child), None) for child in {projections.query: 0, projections.key: 0}
        ]
        outputs = outputs * 2 if len(outputs) == 1 else outputs
        heads, width = call.query.shape[1], call.query.shape[-1]
        try:
            parts = projections.parts(heads, width)
        except ValueError:
            return refuted
        for part, output, rows in zip(parts, outputs, (call.query, call.key), strict=True):
            if output is None or output.shape[-1] < part.first + part.size:
                return refuted
            number = part.size // width
            made = output[..., part.first : part.first + part.size].reshape(-1, number, width)
            used = rows[:, :: max(rows.shape[1] // number, 1)].transpose(1, 2).reshape(-1, number, width)
            if made.shape != used.shape:
                return refuted
            refuted = refuted | ~_are_proportional(made, used)
        return ~refuted

    def _probe(self, name: str, child: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._hooks.armed and isinstance(output, Tensor):
            self._outputs[name, child] = output.detach()

    def _stop_probing(self) -> None:
        for probe in self._probes:
            probe.remove()
        self._probes.clear()
        self._outputs.clear()

    def _say(self, name: str, error: Exception) -> None:
        self._failed(name, f"{type(error).__name__}: {error}")


def _are_proportional(made: Tensor, used: Tensor) -> Tensor:
    """Whether the lengths of the rows ``(N, h, w)`` of every head agree up to one factor, in whatever order."""
    tolerance = TOLERANCE[int(min(made.dtype.itemsize, used.dtype.itemsize) < 4)]
    wide = torch.promote_types(torch.promote_types(made.dtype, used.dtype), torch.float32)
    one, other = (torch.linalg.vector_norm(x, dim=-1, dtype=wide).sort(dim=0).values for x in (made, used))
    factor = (one * other).sum() / one.square().sum()
    agree: Tensor = (other - factor * one).abs().amax() <= tolerance * other.amax()
    return agree
