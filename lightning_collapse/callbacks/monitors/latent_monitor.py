"""Latent monitor: posterior collapse of variational autoencoders, unit by unit and group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log, nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.monitors.hooked_monitor import HookedMonitor
from lightning_collapse.callbacks.monitors.monitor import Detail, Name
from lightning_collapse.functional.latent_units import COLUMNS, latent_readings
from lightning_collapse.monitoring.latent_hooks import LatentHooks, Reader
from lightning_collapse.monitoring.sampled_gaussians import SampledGaussians
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.gaussian_latents import latent_pairs
from lightning_collapse.utilities.module_tree import clean_name
from lightning_collapse.utilities.modules import Tap, curve_name, is_compiled, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve

_BURDA, _BONHEME = "Burda et al. 2016, arXiv 1509.00519", "Bonheme & Grzes 2021, arXiv 2109.12679"
_SURGERY, _POOLE = "Hoffman & Johnson 2016", "Poole et al. 2019, arXiv 1905.06922"
_HELD = ("n", "nonfinite", "units")
_TELL = (
    "Name the module that returns a posterior, and what to read in it: `LatentMonitor(layers=['encoder'], read=lambda"
    " output: output.chunk(2, dim=1))`, a function that returns `(mean, log_variance)`."
)
_LISTENING = "listening for latents", "some may be left out"
LOOKS_POSITIVE = 0.3
"""Mean log-variance of every unit of a fresh network above which it is taken for a standard deviation."""


class LatentMonitor(HookedMonitor[LatentHooks]):
    """Log how much of the input a Gaussian latent holds, and which units hold none: on the prior, or on a point.

    **Logged metrics**, ``latent/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    ``kl`` is ``information_ceiling`` and ``prior_mismatch`` together, see
    :func:`~lightning_collapse.functional.latent_readings`: a large divergence is no proof of information. It is the raw
    one, without weight, warm-up or free bits, against a standard normal prior where ``read`` tells no other.

    A point rests on the posteriors of the optimizer step that ends in it, on all processes; every token and every place
    of a map counts as one. Posteriors are found by themselves, in two ways. By what they are called: two layers side by
    side such as ``mu`` and ``logvar``, or what a module returns under such names, in a dict, a dataclass, a
    ``ModelOutput`` or a tuple whose ``return`` has them, or a ``torch.distributions.Normal``, or an object with
    ``mean`` and ``logvar``. And by what the step does with them, whatever their names: where noise times a scale is
    added to a mean, by hand or by ``rsample``, and the mean or the sample is squared as in a divergence from a Gaussian
    prior; curves bear the name of the layer that the mean comes from. Policies, by their names, are left out, and
    compiled models are searched for layers side by side alone. A prior that is learned must be told.

    Others are told what to read; a dict makes one group of curves of every key, for hierarchical models, and a pair of
    posterior and prior is for conditional ones::

        def read(output):
            return {"top": output["q2"], "bottom": (output["q1"], output["p1"])}

        Trainer(callbacks=[LatentMonitor(layers=["vae"], read=read)])

    Args:
        layers: Names of modules that return a posterior, or of the layer of a mean, or glob patterns of them; ``None``
            to find them.
        read: Called with what a module of ``layers`` returned, without gradient; returns ``(mean, log_variance)``, each
            ``(N, units)`` or more, not averaged, or a ``Normal``; or ``(posterior, prior)``, each such a thing; or a
            dict of these by group. It must not draw random numbers.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument of a wrong kind; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing, or a latent without units.

    Example::

        trainer = Trainer(callbacks=[LatentMonitor(), CollapseGuard()])
    """

    family = "latent"
    declares = (
        Curve("kl", "divergence from the prior in nats, all units", "0 to infinity", "near 0", "Kingma & Welling 2014"),
        Curve(
            "information_ceiling",
            "the most that units can tell of the input, in nats, whatever the prior",
            "0 to infinity",
            "near 0",
            _SURGERY,
        ),
        Curve(
            "prior_mismatch", "the rest of `kl`: of all posteriors from the prior", "0 to infinity", "`kl`", _SURGERY
        ),
        Curve("largest_ceiling", "information ceiling of the best unit", "0 to infinity", "near 0"),
        Curve("information_lower", "mutual information, low estimate", "about 0 to its limit", "near 0", _POOLE),
        Curve("information_upper", "mutual information, high estimate", "about 0 to infinity", "near 0", _POOLE),
        Curve(
            "information_limit", "log of the rows behind both: near it these are no use", "0 to 4.2", "does not tell"
        ),
        Curve("active_units", "units whose mean varies by more than 0.01", "0 to units", "0", _BURDA),
        Curve("active", "share of units of a small, steady variance", "0 to 1", "0", _BONHEME),
        Curve("passive", "share of units whose variance is that of the prior", "0 to 1", "1", _BONHEME),
        Curve("mixed", "share of all others", "0 to 1", "does not tell", _BONHEME),
        Curve("at_prior", "share of units with a divergence below 0.01", "0 to 1", "1"),
        Curve("at_point", "share of units with variance and spread near 0", "0 to 1", "1"),
        Curve("mean_share", "share of `kl` from the squared mean", "0 to 1", "does not tell"),
        Curve("log_variance", "log-variance, mean over units", "any number", "0, or far below"),
        Curve("mean_variance", "variance of the mean over rows, mean over units", "0 to infinity", "near 0", _BURDA),
        Curve("n", "posteriors behind the point, over all processes", "0 to infinity", "few: a rough reading"),
        Curve("flag", "latent", "0 to 6", "above 0: why to doubt the point"),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        read: Reader | None = None,
        every_n_steps: int | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "all latents")
        if read is not None and (not callable(read) or layers is None):
            raise ValueError(
                f"`read` takes a function of what the modules that `layers` names return, got {read!r} and"
                f" layers={layers!r}."
            )
        self.layers, self.reader = layers, read
        self._searches = False
        self._unclear: list[str] = []

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        let_hooks_be_seen(pl_module)
        pairs, self._unclear = latent_pairs(pl_module)
        taps = self.choose_taps(self.layers, [], pl_module)
        if self.layers is not None:
            names = {tap.name for tap in taps} if self.reader is None else set()
            pairs = [pair for pair in pairs if pair.name in names]
            taps = [tap for tap in taps if tap.name not in {pair.name for pair in pairs}]
        for pair in pairs:
            width = next(iter(pair.mean.parameters())).shape[0]
            if not width:
                raise MisconfigurationException(f"`LatentMonitor`: `{pair.name}` makes 0 units. Give it one or more.")
        self._searches = self.layers is None and not pairs and not is_compiled(pl_module)
        if self._searches:
            named = pl_module.named_modules()
            taps = [Tap(curve_name(clean_name(name)) if name else "model", module) for name, module in named]
        samples = None
        if self.layers is None and not is_compiled(pl_module):
            samples = SampledGaussians(pl_module, lambda error: self.contained.catch(*_LISTENING, error))
        self._hooks = LatentHooks(pairs, taps, self.contained, self.reader, not self._searches, samples)
        self._scope = StepScope(pl_module)
        if not pairs and not taps:
            self._warn_of_none()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        step = trainer.accumulate_grad_batches
        if self._hooks is None or self._scope is None or batches_left >= step:
            return
        if batches_left >= step - 1:
            self._hooks.begin()
        self._hooks.mask = padding_mask(batch)
        self._scope.request(self._hooks)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Sums of every latent over all processes, and the estimates of its information. Collective."""
        return {} if self._hooks is None else self._hooks.pop(pl_module.device)

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        names = [name for name, kind in numbers if kind == "sums"]
        if self._hooks is not None:
            if self._searches:
                self._searches = False
                self._hooks.keep(self._hooks.found)
            for name in self._hooks.missing(names):
                self.warn_of_layer(name, "the latent {} did not run before every point; there are no curves there.")
            for name in sorted(self._hooks.learned_priors):
                self.warn_once(
                    f"the latent of `{name}` is compared with a prior that is learned; it is left out. {_TELL}"
                )
            if names:
                self._hooks.settle()
            elif not (self._hooks.left_out or self._hooks.learned_priors):
                self._warn_of_none()
        found = {name: {kind: value for (of, kind), value in numbers.items() if of == name} for name in names}
        return [point for name, own in found.items() for point in self._points_of(name, step, own)]

    def _points_of(self, name: str, step: int, own: Mapping[str, Any]) -> list[Point]:
        sums = torch.tensor(own["sums"], dtype=torch.float64)  # on the host
        found = {key: value.item() for key, value in latent_readings(sums).items()}
        n = int(found["n"])
        flag = Flag.FEW_ROWS if n < 2 else Flag.NONFINITE if found["nonfinite"] else Flag.OK
        logs = sums[2:].view(len(COLUMNS), -1)[COLUMNS.index("log_variance")] / max(n, 1)
        if n * found["units"] >= 64 and not self._points and logs.amin() > LOOKS_POSITIVE:
            self.warn_once(
                f"what is read for log-variances of `{name}` is {logs.mean():.2g} on average before training, as"
                f" standard deviations or variances are. Return their logarithms. {_TELL}"
            )
        values = {key: value for key, value in found.items() if key not in _HELD}
        values |= {"information_lower": own["lower"], "information_upper": own["upper"]}
        values |= {"information_limit": log(own["rows"]) if own["rows"] else nan, "n": float(n), "flag": float(flag)}
        return [Point(self.family, name, key, step, value, n, nan, flag) for key, value in values.items()]

    def _warn_of_none(self) -> None:
        unclear = f"`{self._unclear[0]}` may make a variance, a deviation or a logarithm. " if self._unclear else ""
        samples = None if self._hooks is None else self._hooks.samples
        if samples is not None and samples.others:
            unclear = f"What the step samples of `{samples.others[0]}` is compared with no Gaussian prior. "
        self.warn_once(f"no Gaussian latent was found, or it did not run. {unclear}{_TELL}")
