"""Latent hooks: posteriors that a training step makes, summed up unit by unit while they pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule

from lightning_collapse.functional.gaussian_divergence import whitened_posterior
from lightning_collapse.functional.latent_information import mutual_information
from lightning_collapse.functional.latent_units import COLUMNS, latent_sums
from lightning_collapse.monitoring.call_record import storage_of
from lightning_collapse.monitoring.function_calls import FUNCTION_CALLS
from lightning_collapse.monitoring.graph_call import GraphCall, pack, unpack
from lightning_collapse.monitoring.sampled_gaussians import SampledGaussians
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.channel_axis import ChannelAxis
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.distributed import (
    all_gather_rows,
    all_reduce_sum,
    from_all_processes,
    world_size,
)
from lightning_collapse.utilities.features import as_row_mask, as_rows, evenly, find_features
from lightning_collapse.utilities.gaussian_latents import Gaussian, Latent, LatentPair, as_latents, find_posterior
from lightning_collapse.utilities.hooks import HookOwner, ModuleHook
from lightning_collapse.utilities.modules import Tap, hooks_ignored, is_to_be_ignored

Reader = Callable[[Any], Any]
"""From what a module returns to a posterior, see :func:`~lightning_collapse.utilities.gaussian_latents.as_latents`."""
ROWS = 64
"""Posteriors of all processes that the mutual information is estimated from, at most."""


class LatentHooks(HookOwner):
    """Forward hooks that add up what posteriors come to while ``armed``, and cost one ``if`` while not.

    Every call counts, except activation checkpointing's recomputation in the backward pass; every token and every place
    of a map is a row. Kept are sums of every unit, and a copy of at most 64 rows for the mutual information. Nothing
    waits for the device, and no random number is drawn from the training's generators.

    Args:
        pairs: Layers that make a mean and a log-variance each.
        taps: Modules that return posteriors.
        containment: Where failures are told.
        read: What reads those of ``taps``; ``None`` to find them by the names of fields.
        told: Whether those of ``taps`` are known to return a posterior, so that it needs no name.
        samples: What finds the others, which no module returns: where the step samples them.

    Attributes:
        armed: Whether to add up now.
        mask: Padding mask ``(N, L)`` of the running batch.
        found: Names of the taps that have returned a posterior so far.
        left_out: Names of those that have failed, of which a warning has told.
        learned_priors: Names of layers whose samples are compared with a prior that is learned, and are not read.

    Example:
        >>> net = nn.ModuleDict({"mu": nn.Linear(4, 2), "logvar": nn.Linear(4, 2)})
        >>> hooks = LatentHooks([LatentPair("mu", net["mu"], net["logvar"], 1.0)], [], Containment("example"))
        >>> hooks.armed, x = True, torch.ones(8, 4)
        >>> _ = net["mu"](x), net["logvar"](x)
        >>> sorted(kind for _, kind in hooks.pop(x.device))
        ['lower', 'rows', 'sums', 'upper']
        >>> hooks.remove()
    """

    def __init__(
        self,
        pairs: Sequence[LatentPair],
        taps: Sequence[Tap],
        containment: Containment,
        read: Reader | None = None,
        told: bool = True,
        samples: SampledGaussians | None = None,
    ) -> None:
        self.samples, self.learned_priors, self._sampled = samples, set[str](), False
        self.mask: Tensor | None = None
        self.found: list[str] = []
        self.names = [pair.name for pair in pairs] + [tap.name for tap in taps if told]
        self._contained, self._reader, self._told = containment, read, told
        self._armed = False
        self.left_out: set[str] = set()
        self._hooks: list[ModuleHook] = []
        self.begin()
        for pair in pairs:
            axis = ChannelAxis(pair.mean)
            for module, factor in ((pair.mean, 0.0), (pair.spread, pair.factor)):
                self._hook(pair.name, module, partial(self._take_half, pair.name, axis, factor))
        for tap in taps:
            if not isinstance(tap.module, ScriptModule):  # refuses hooks
                self._hook(tap.name, tap.module, partial(self._take_output, tap, ChannelAxis(tap.module)))

    def begin(self) -> None:
        """Forget what was added up: a step that may end in a point begins."""
        self._halves: dict[str, Tensor] = {}
        self._seen: list[Tensor] = []
        self._means: set[int] = set()  # storages of those that modules have returned
        self._own: set[str] = set()  # names of those that modules return
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}

    @property
    def armed(self) -> bool:
        """Whether to add up now."""
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        self._armed = armed
        if self.samples is not None:
            FUNCTION_CALLS.remove(self.samples)
            if not armed:
                self._take_samples(self.samples)
            elif self.samples.can_listen():
                FUNCTION_CALLS.add(self.samples)
        self._halves, self._seen, self._means = {}, [], set()  # of a step that is over

    def pop(self, device: torch.device) -> dict[tuple[str, str], Tensor]:
        """Sums over all processes since the last time, by layer, and both estimates of the mutual information.

        Collective.
        """
        self.armed, self.mask = False, None
        sums, rows, dtype = self._sums, self._rows, accumulation_dtype(device)
        self.begin()
        widths = {name: len(of) for name, of in sums.items()}
        for others in from_all_processes(widths) if world_size() > 1 else ():
            widths = {name: max(width, widths.get(name, 0)) for name, width in {**widths, **others}.items()}
        readings: dict[tuple[str, str], Tensor] = {}
        for name in sorted(widths):
            width, own = widths[name], sums.get(name)
            if own is None or len(own) != width:  # which another process has called and this one has not
                own = torch.zeros(width, dtype=dtype, device=device)
                rows[name] = [own.new_zeros(0, 2 * (width - 2) // len(COLUMNS))]
            readings[name, "sums"] = all_reduce_sum(own)
            posteriors, counted = all_gather_rows(torch.cat(rows[name]))
            for key, value in _estimates(posteriors, counted).items():
                readings[name, key] = value
        return readings

    def keep(self, names: Sequence[str]) -> None:
        """Stop listening to all taps but these, which are told from now on."""
        hooks = self._hooks
        self._hooks = [hook for hook in hooks if isinstance(hook, _Hook) and hook.name in names]
        for hook in hooks:
            if hook not in self._hooks:
                hook.remove()
        self.names = list(names)

    def settle(self) -> None:
        """Listen no more to what steps sample, if nothing was read of it."""
        if not self._sampled:
            self.samples = None

    def missing(self, names: Sequence[str]) -> list[str]:
        """Names of layers of which nothing was read, neither by these names nor by those of groups."""
        return [
            own
            for own in self.names
            if own not in self.left_out and not any(name == own or name.startswith(f"{own}.") for name in names)
        ]

    def remove(self) -> None:
        """Stop listening and forget; may be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.armed, self.mask = [], False, None
        self.samples = None
        self.begin()

    def capture(self, name: str, take: Callable[[Any], None], value: Any) -> None:
        """Take what a module has returned; for hooks."""
        if not self._armed or name in self.left_out or is_to_be_ignored():
            return
        try:
            with torch.no_grad():
                take(value)
        except Exception as error:
            self.left_out.add(name)
            self._contained.catch(f"reading the latent of `{name}`", "it is left out from now on", error)

    def _take_half(self, name: str, axis: ChannelAxis, factor: float, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"it returned a {type(value).__name__}, and no tensor")
        own = factor * value.detach() if factor else value.detach()
        half, other = ("spread", "mean") if factor else ("mean", "spread")
        before = self._halves.pop(f"{name}:{other}", None)
        if before is None:
            self._halves[f"{name}:{half}"] = own
        else:
            self._add(name, axis, Latent(Gaussian(before, own) if factor else Gaussian(own, before)))

    def _take_output(self, tap: Tap, axis: ChannelAxis, value: Any) -> None:
        found: Mapping[str, Latent]
        if self._reader is not None:
            with hooks_ignored():
                found = as_latents(self._reader(value))
        else:
            posterior = find_posterior(value, tap.module, self._told)
            if posterior is None and self._told:
                raise TypeError(f"no mean and log-variance in a {type(value).__name__}; tell what to read by `read=`")
            found = {} if posterior is None else {"": Latent(posterior)}
            if posterior is not None and not self._told:
                if any(posterior.mean is seen for seen in self._seen):  # what a module inside has returned already
                    return
                self._seen.append(posterior.mean)
        whole = find_features(value)  # of which a reader takes halves
        axis = axis if whole is None or whole.is_nested else axis.of_parts(whole)
        for group, latent in found.items():
            self.found += [] if tap.name in self.found else [tap.name]
            self._add(f"{tap.name}.{group}" if group else tap.name, axis, latent)

    def _take_samples(self, samples: SampledGaussians) -> None:
        """Those that no module has returned."""
        with self._contained("reading the latents that a step samples", "they are left out"), torch.no_grad():
            for sample in samples.pop():
                if sample.name in self._own or storage_of(sample.mean) in self._means:
                    continue
                if sample.has_prior:
                    self.learned_priors.add(sample.name)
                    continue
                wide = torch.promote_types(sample.scale.dtype, torch.float32)
                posterior = Gaussian(sample.mean, 2 * sample.scale.to(wide).log())
                self._sampled = True
                self._sum(sample.name, ChannelAxis(sample.module), Latent(posterior))

    def _add(self, name: str, axis: ChannelAxis, latent: Latent) -> None:
        self._own.add(name)
        self._means.add(storage_of(latent.posterior.mean))
        self._sum(name, axis, latent)

    def _sum(self, name: str, axis: ChannelAxis, latent: Latent) -> None:
        rows = [as_rows(x.detach(), axis, positions=True) for x in latent.posterior]
        if latent.prior is not None:
            prior = [x.detach().expand_as(of) for x, of in zip(latent.prior, latent.posterior, strict=True)]
            rows = list(whitened_posterior(*rows, *(as_rows(x, axis, positions=True) for x in prior)))  # type: ignore[arg-type]
        mean, log_variance = rows
        if mean is None or log_variance is None:
            raise TypeError("no numbers to read")
        counted = as_row_mask(latent.posterior.mean, self.mask, axis)
        sums = latent_sums(mean, log_variance, counted)
        before = self._sums.get(name)
        if before is None or before.shape != sums.shape:  # a layer that changes its width: the last counts
            before, self._rows[name] = torch.zeros_like(sums), []
        self._sums[name] = before + sums
        left = max(ROWS // world_size(), 2) - sum(map(len, self._rows[name]))
        if left > 0:
            both = torch.cat([mean, log_variance], dim=1).to(sums.dtype)
            both = both if counted is None else both.masked_fill(~counted.unsqueeze(1), torch.nan)
            self._rows[name].append(evenly(both, left))

    def _hook(self, name: str, module: nn.Module, take: Callable[[Any], None]) -> None:
        with self._contained(f"a hook on `{name}`"):
            self._hooks.append(_Hook(self, name, module, take))


class _Hook(ModuleHook):
    def __init__(self, owner: LatentHooks, name: str, module: nn.Module, take: Callable[[Any], None]) -> None:
        self.owner, self.name, self.take, self.call = owner, name, take, GraphCall(self._receive)
        super().__init__(module)

    def run(self, module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if torch.compiler.is_compiling():
            tensors: list[Tensor | None] = []
            note = pack(value, tensors)
            self.call(tensors, note)
        elif self.owner.armed:
            self.owner.capture(self.name, self.take, value)

    def _receive(self, tensors: Sequence[Tensor | None], note: str) -> None:
        # the graph uses their memory again
        copies = [tensor if tensor is None else tensor.clone() for tensor in tensors] if self.owner.armed else []
        if copies:
            self.owner.capture(self.name, self.take, unpack(note, copies))


def _estimates(posteriors: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Both estimates of the mutual information, and the rows behind them, of means beside log-variances."""
    mean, log_variance = posteriors.chunk(2, dim=1)
    generator = torch.Generator(mean.device).manual_seed(0)  # the same noise at every point, and nobody else's
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    lower, upper = mutual_information(mean, log_variance, mean + (log_variance / 2).exp() * noise, counted)
    return {"lower": lower, "upper": upper, "rows": (counted & posteriors.isfinite().all(dim=1)).sum()}
