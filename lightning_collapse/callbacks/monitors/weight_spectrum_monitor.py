"""Curves of the spectra of weights and of what the optimizer does to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from math import ceil, nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Monitor, check_layers
from lightning_collapse.monitoring.training_flops import TrainingFlops
from lightning_collapse.monitoring.weight_spectra import (
    ONLY_WEIGHTS,
    check_measures,
    points_of,
    read_matrices,
)
from lightning_collapse.spectral.cost import spectrum_flops
from lightning_collapse.utilities.batch import batch_positions
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes, world_size
from lightning_collapse.utilities.modules import find_modules, weighted_layers
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.trainer import is_due
from lightning_collapse.utilities.weight_matrices import WeightMatrix, weight_matrices

MAX_DEFAULT_MATRICES = 32
DEFAULT_MEASURES = ("spectral_norm", "stable_rank", "svd_entropy", "outliers")


class WeightSpectrumMonitor(Monitor):
    """Log the spectrum of weight matrices, and of the update that one optimizer step makes to them.

    **Logged metrics**, to every logger and to ``trainer.callback_metrics``, per matrix:

    - ``weights/{matrix}/{name}``: ``spectral_norm``, ``stable_rank``, ``svd_entropy``, ``outlier_share`` (singular
      values that noise cannot explain: 0 at initialisation) and ``noise_distance`` by default;
    - ``updates/{matrix}/{name}``: the same, the last two apart, of the weights after the step minus before it, and
      ``relative_norm``, the Frobenius norm of the update over that of the weights;
    - ``weights/{matrix}/flag`` and ``updates/{matrix}/flag``: 0, or why to doubt the point, see
      :class:`~lightning_collapse.utilities.Flag`: a matrix of zeros (a step that was skipped) is ``CONSTANT``, one with
      NaN or infinity ``NONFINITE``, an update no optimizer announced to Lightning ``NOT_CALLED``;
    - ``weights/all/...`` and ``updates/all/...``: the largest ``spectral_norm``, the ``norm`` of all together, and the
      mean of every other curve over the matrices that have one.

    The null of a point is what a matrix of independent random elements of that shape reads.

    Weights are read as they are in effect: adapters added, parametrizations applied, shards gathered on every process;
    tied ones once, query, key and value apart, convolutions as ``(O, I * k * k)``; see
    :func:`~lightning_collapse.utilities.weight_matrices.weight_matrices`. Spectra are exact, in double precision.
    For updates the watched weights are copied right before the optimizer step of a point and the copy is freed right
    after it. Under manual optimization with several steps in a batch the update is that of all of them.

    Args:
        layers: Names of submodules or of matrices, or glob patterns of them; of a submodule all matrices inside count.
            ``None`` takes all, or 32 evenly spaced ones where there are more.
        measures: Names of registered measures of singular values, ``"norm"``, ``"spectral_norm"``, ``"outliers"``
            (``outlier_share`` and ``noise_distance``) and ``"power_law"`` (``power_law_alpha``, ``power_law_distance``
            and ``power_law_tail``; not a default, because of a matrix of a few hundred rows it is mostly noise).
        updates: Whether to read updates too.
        every_n_steps: Optimizer steps between two points. ``None`` takes the smallest multiple of
            ``Trainer(log_every_n_steps)`` that keeps within ``max_overhead``.
        max_overhead: Share of the floating-point operations of training that points may cost.
        max_dim: Matrices whose smaller side exceeds this are left out, as are those with a single row or column.
        embeddings: Also watch the tables of embeddings.

    Raises:
        ValueError: On an unknown measure or an argument out of range; when the fit starts, as
            ``MisconfigurationException``, on a pattern that matches nothing.

    Example::

        trainer = Trainer(callbacks=[WeightSpectrumMonitor()])
    """

    family = "weights"

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        measures: Sequence[str] = DEFAULT_MEASURES,
        updates: bool = True,
        every_n_steps: int | None = None,
        max_overhead: float = 0.005,
        max_dim: int = 2048,
        embeddings: bool = False,
    ) -> None:
        super().__init__(every_n_steps)
        check_layers(layers, "the default layers")
        if not max_overhead > 0:
            raise ValueError(
                f"`max_overhead` is a share of the training cost and must be positive, got {max_overhead}."
            )
        if max_dim < 2:
            raise ValueError(f"`max_dim` must be at least 2, got {max_dim}.")
        self.layers = layers
        self.measures = measures
        self.updates = updates
        self.max_overhead = max_overhead
        self.max_dim = max_dim
        self.embeddings = embeddings
        self._names = check_measures(measures)
        self._restored = 0
        self._reset()

    def _reset(self) -> None:
        self._matrices: list[WeightMatrix] = []
        self._shapes: dict[str, tuple[int, int]] = {}
        self._before: list[Tensor] | None = None
        self._flops: TrainingFlops | None = None
        self._positions = 0
        self._multiple = 0
        self._points = 0

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layers=self.layers, measures=self.measures, every_n_steps=self.every_n_steps)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"multiple": self._multiple}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["multiple"]

    @override
    def cadence(self, trainer: Trainer) -> int:
        return super().cadence(trainer) * (1 if self.every_n_steps is not None else max(self._multiple, 1))

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        self._multiple, self._restored = self._restored, 0
        chosen = {matrix.name: matrix for matrix in self._choose(pl_module)}
        shapes = {name: (shape[0], shape[1]) for name, shape in ((n, m.read().shape) for n, m in chosen.items())}
        if wide := [name for name, shape in shapes.items() if min(shape) > self.max_dim]:
            rank_zero_info(
                f"`WeightSpectrumMonitor` leaves out {', '.join(wide)}: the smaller side exceeds"
                f" `max_dim={self.max_dim}`."
            )
        names = [name for name, shape in shapes.items() if 1 < min(shape) <= self.max_dim]
        if self.layers is None and len(names) > MAX_DEFAULT_MATRICES:
            last = len(names) - 1
            names = [names[round(i * last / (MAX_DEFAULT_MATRICES - 1))] for i in range(MAX_DEFAULT_MATRICES)]
        self._matrices = [chosen[name] for name in names]
        self._shapes = {name: shapes[name] for name in names}
        if self.every_n_steps is None and not self._multiple:
            self._flops = TrainingFlops(pl_module)

    @override
    def stop(self) -> None:
        if self._flops is not None:
            self._flops.remove()
        self._flops = self._before = None

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        self._before = None
        if self._flops is not None:
            self._flops.total = 0  # the sanity check has run through the model too
            self._positions = batch_positions(batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # the batch's first step: gradients are ready, weights are not yet changed, activations are already freed
        if self.updates and self._before is None and is_due(trainer, self.cadence(trainer)):
            self._before = [_copy(matrix.read()) for matrix in self._matrices]

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._flops is not None:
            self._plan(trainer, pl_module)

    @override
    @torch.no_grad()
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> list[Point]:
        if not self._matrices:
            return []
        self._points += 1
        after = [matrix.read() for matrix in self._matrices]
        readings = {"weights": read_matrices(after, self._names)}
        stepped = self._before is not None
        if self.updates:
            updates = self._before or [torch.full_like(matrix, nan) for matrix in after]
            self._before = None
            if stepped:
                for update, matrix in zip(updates, after, strict=True):
                    update.sub_(matrix)  # its sign is nobody's business
            else:
                self.warn_once(
                    "no optimizer step was announced before a point, so there is no update to read. Under manual"
                    " optimization step the optimizers that `self.optimizers()` returns."
                )
            readings["updates"] = read_matrices(updates, [name for name in self._names if name not in ONLY_WEIGHTS])
        read = {
            family: dict(zip(self._shapes, numbers, strict=True))
            for family, numbers in zip(readings, _fetch(list(readings.values()), pl_module.device), strict=True)
        }
        hidden = {"norm", "spectral_norm"} - set(self._names)
        points = points_of("weights", read["weights"], self._shapes, hidden, step)
        if self.updates:
            for name, curves in read["updates"].items():
                size = read["weights"][name]["norm"]
                curves["relative_norm"] = curves["norm"] / size if size else nan
            points += points_of("updates", read["updates"], self._shapes, hidden, step, stepped)
        return points

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._matrices and not self._points:
            self.warn_of_no_point(trainer)

    def _choose(self, pl_module: LightningModule) -> list[WeightMatrix]:
        found = weight_matrices(pl_module, self.embeddings)
        if self.layers is None:
            return found
        chosen: set[str] = set()
        for pattern in self.layers:
            roots: Iterable[nn.Module] = ()
            with suppress(ValueError):  # it may be the name of a matrix
                roots = find_modules(pl_module, [pattern]).values()
            inside = {id(module) for root in roots for module in root.modules()}
            matches = {m.name for m in found if id(m.module) in inside or fnmatchcase(m.name, pattern)}
            if not matches:
                raise MisconfigurationException(
                    f"`WeightSpectrumMonitor(layers={list(self.layers)!r})`: {pattern!r} matches no weight matrix of"
                    f" {type(pl_module).__name__}. It has: {', '.join(m.name for m in found)}."
                )
            chosen |= matches
        return [matrix for matrix in found if matrix.name in chosen]

    def _plan(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the cadence from what one batch cost. Collective: every process calls it after its first batch."""
        if self._flops is None:
            return
        weights = sum(p.numel() for _, layer in weighted_layers(pl_module) for p in layer.parameters())
        # waits for the device, once
        [training] = max_over_processes([self._flops.total or 6 * weights * self._positions], pl_module.device)
        self._flops.remove()
        self._flops = None
        every = super().cadence(trainer)
        budget = self.max_overhead * training * every * trainer.accumulate_grad_batches
        cost = sum(spectrum_flops(max(shape), min(shape)) for shape in self._shapes.values()) * (1 + self.updates)
        self._multiple = max(ceil(cost / budget), 1) if budget else 1
        rank_zero_info(
            f"`WeightSpectrumMonitor` reads {len(self._matrices)} matrices every {every * self._multiple} steps."
            " Choose with `layers=[...]` and `every_n_steps`."
        )


def _fetch(families: list[list[dict[str, Tensor]]], device: torch.device) -> list[list[dict[str, float]]]:
    """The same readings as numbers, by the one transfer of a point. Collective."""
    vector = torch.stack([value.to(device) for family in families for reading in family for value in reading.values()])
    # every process has read the same weights; on unlike devices they need not agree to the last bit
    numbers = iter((all_reduce_sum(vector) / world_size()).tolist())  # the one transfer of a point
    return [[{curve: next(numbers) for curve in reading} for reading in family] for family in families]


def _copy(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)


def _register() -> None:
    noise, muon = "Marchenko & Pastur 1967, Johnstone 2001", "arXiv 2509.26030"
    facts = {
        "norm": ("0 to infinity", "near 0, or growing", "Frobenius norm"),
        "spectral_norm": ("0 to infinity", "growing", "largest singular value"),
        "stable_rank": ("1 to the smaller side", "near 1", "Rudelson & Vershynin 2007, arXiv math/0503442"),
        "svd_entropy": ("0 to 1", "near 0", muon),
        "outlier_share": ("0 to 1", "0 is untrained", noise),
        "noise_distance": ("0 to 1", "near 0 is untrained", noise),
        "power_law_alpha": ("1 to infinity", "below 2, or as of noise", "Martin & Mahoney 2021, arXiv 1810.01075"),
        "power_law_distance": ("0 to 1", "large: no power law", "Clauset et al. 2009, arXiv 0706.1062"),
        "power_law_tail": ("0 to the smaller side", "few: do not read alpha", "eigenvalues behind the exponent"),
        "relative_norm": ("0 to infinity", "near 0, or growing", "norm of the update over that of the weight"),
        "flag": ("0 to 6", "above 0", "why to doubt the point"),
    }
    of_weights = [name for name in facts if name != "relative_norm"]
    of_updates = [name for name in facts if not name.startswith(("outlier", "noise", "power_law"))]
    for family, reads, names in (("weights", "weight", of_weights), ("updates", "optimizer step", of_updates)):
        for name in names:
            span, collapsed, source = facts[name]
            register_curve(family, name, reads=reads, range=span, collapsed=collapsed, source=source)


_register()
