"""Weight spectrum monitor: spectra of weight matrices and of what the optimizer does to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.monitoring.training_flops import TrainingFlops
from lightning_collapse.monitoring.weight_spectra import (
    check_measures,
    of_updates,
    points_of,
    read_matrices,
    reading_flops,
)
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.batch import batch_positions
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes, world_size
from lightning_collapse.utilities.modules import find_modules, weighted_layers
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import MEASURES, Curve
from lightning_collapse.utilities.trainer import is_due
from lightning_collapse.utilities.weight_matrices import WeightMatrix, left_out_message, weight_matrices

MAX_DEFAULT_MATRICES = 32
DEFAULT_MEASURES = ("spectral_norm", "stable_rank", "svd_entropy", "outliers", "weights_per_unit")
_LAW, _MUON = "Marchenko & Pastur 1967, Johnstone 2001", "arXiv 2509.26030"
_FACTS = {
    "norm": ("0 to infinity", "near 0, or growing", "Frobenius norm"),
    "spectral_norm": ("0 to infinity", "growing", "largest singular value"),
    "stable_rank": ("1 to the smaller side", "near 1", "Rudelson & Vershynin 2007, arXiv math/0503442"),
    "svd_entropy": ("0 to 1", "near 0", _MUON),
    "outlier_share": ("0 to 1", "0 is untrained", _LAW),
    "noise_distance": ("0 to 1", "near 0 is untrained", _LAW),
    "power_law_alpha": ("1 to infinity", "below 2, or as of noise", "Martin & Mahoney 2021, arXiv 1810.01075"),
    "power_law_distance": ("0 to 1", "large: no power law", "Clauset et al. 2009, arXiv 0706.1062"),
    "power_law_tail": ("0 to the smaller side", "few: do not read alpha", "eigenvalues behind the exponent"),
    "relative_norm": ("0 to infinity", "near 0, or growing", "norm of the update over that of the weight"),
    "flag": ("0 to 6", "above 0", "why to doubt the point"),
}


class WeightSpectrumMonitor(Monitor):
    """Log the spectrum of weight matrices, and of the update that one optimizer step makes to them.

    **Logged metrics**, ``weights/{matrix}/...`` and ``updates/{matrix}/...``, to every logger and to
    ``trainer.callback_metrics``:

    {curves}

    ``weights/...`` are drawn of the weights, ``updates/...`` of the weights after the step minus before it. By default
    these are ``spectral_norm``, ``stable_rank``, ``svd_entropy``, and of weights ``outlier_share`` (singular values
    that noise cannot explain: 0 at initialisation), ``noise_distance`` and ``weights_per_unit``. Under ``all``
    stand the largest ``spectral_norm``, the ``norm`` of all together, and the mean of every other curve over the
    matrices that have one.
    A matrix of zeros (a step that was skipped) is flagged ``CONSTANT``, one with NaN or infinity ``NONFINITE``, an
    update no optimizer announced to Lightning ``NOT_CALLED``.

    ``relative_norm`` is of one matrix in effect, over what it is after the step; ``ratio`` of
    :class:`~lightning_collapse.UpdateMonitor` is of all parameters of a layer, at far less cost.

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
            and ``power_law_tail``; not a default, because of a matrix of a few hundred rows it is mostly noise); and of
            registered measures of ``kind="weights"``, read of weights alone: ``"weights_per_unit"`` (a default: below 1
            the verdict is *layer collapse*), ``"non_zero_share"``, ``"pq_index"``, ``"orthogonality_defect"``,
            ``"mergeable_share"``.
        updates: Whether to read updates too.
        every_n_steps: Optimizer steps between two points. ``None`` takes the smallest multiple of
            ``Trainer(log_every_n_steps)`` that keeps within ``max_overhead``.
        max_overhead: Share of the floating-point operations of training that points may cost.
        max_dim: Matrices whose smaller side exceeds this are left out, as are those with a single row or column.
        embeddings: Also watch the tables of embeddings.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an unknown measure or an argument out of range; when the fit starts, as
            ``MisconfigurationException``, on a pattern that matches nothing.

    Example::

        trainer = Trainer(callbacks=[WeightSpectrumMonitor()])
    """

    family = "weights"
    declares = (
        *(Curve(name, "weight", *facts) for name, facts in _FACTS.items() if name != "relative_norm"),
        *(
            Curve(name, "optimizer step", *facts, family="updates")
            for name, facts in _FACTS.items()
            if not name.startswith(("outlier", "noise", "power_law"))
        ),
    )
    identity = ("layers", "measures", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        measures: Sequence[str] = DEFAULT_MEASURES,
        updates: bool = True,
        every_n_steps: int | None = None,
        max_overhead: float = 0.005,
        max_dim: int = 2048,
        embeddings: bool = False,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
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
        self._reset()

    def _reset(self) -> None:
        self._matrices: list[WeightMatrix] = []
        self._shapes: dict[str, tuple[int, int]] = {}
        self._before: list[Tensor] | None = None
        self._flops: TrainingFlops | None = None
        self._positions = 0
        self._multiple = 0
        self._stepped = False

    @property
    @override
    def curves(self) -> list[str]:
        chosen = [MEASURES[name] for name in self._names if name in MEASURES]
        return [*super().curves, *(measure.curve for measure in chosen if measure.kind == "weights")]

    @override
    def state(self) -> dict[str, Any]:
        return {"multiple": self._multiple}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._multiple = state["multiple"]
        self._forget_flops()

    @override
    def cadence(self, trainer: Trainer) -> int:
        return super().cadence(trainer) * (1 if self.every_n_steps is not None else max(self._multiple, 1))

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
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
        if self.every_n_steps is None:
            self._flops = TrainingFlops(pl_module, self.contained)

    @override
    def stop(self) -> None:
        self._forget_flops()
        self._matrices, self._before = [], None

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        self._before = None
        if self._flops is not None:
            self._flops.total = 0  # the sanity check has run through the model too
            self._positions = batch_positions(batch)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # the batch's first step: gradients are ready, weights are not yet changed, activations are already freed
        if self.updates and self._before is None and is_due(trainer, self._every):
            self._before = [_copy(matrix.read()) for matrix in self._matrices]

    @override
    def after_batch(self, trainer: Trainer, pl_module: LightningModule, batches_left: int) -> None:
        if self._flops is not None:
            self._plan(trainer, pl_module)

    @override
    @torch.no_grad()
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Curves by family and name, each with a number for every matrix."""
        if not self._matrices:
            return {}
        after = [matrix.read() for matrix in self._matrices]
        before, self._before, self._stepped = self._before, None, self._before is not None
        # the point before the first one that is due is of the weights as they were made
        made = before is not None and not is_due(trainer, self.cadence(trainer))
        families = {"weights": read_matrices(before if made and before is not None else after, self._names)}
        if self.updates:
            if before is None:
                self.warn_once(
                    "no optimizer step was announced before a point, so there is no update to read. Under manual"
                    " optimization step the optimizers that `self.optimizers()` returns."
                )
            updates = before or [torch.full_like(matrix, nan) for matrix in after]
            for update, matrix in zip(updates, after, strict=True):
                update.sub_(matrix)  # its sign is nobody's business
            families["updates"] = read_matrices(updates, of_updates(self._names))
        readings = {
            (family, curve): torch.stack([of_matrix[curve].to(pl_module.device) for of_matrix in found])
            for family, found in families.items()
            for curve in found[0]
        }
        if world_size() > 1:  # every process has read the same; on unlike devices they need not agree to the last bit
            mean = all_reduce_sum(torch.stack(list(readings.values()))) / world_size()
            readings = dict(zip(readings, mean, strict=True))
        return readings

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        found: dict[str, dict[str, dict[str, float]]] = {}
        for (family, curve), column in numbers.items():
            for name, value in zip(self._shapes, column, strict=True):
                found.setdefault(family, {}).setdefault(name, {})[curve] = value
        for name, curves in found.get("updates", {}).items():
            size = found["weights"][name]["norm"]
            curves["relative_norm"] = curves["norm"] / size if size else nan
        hidden = {"norm", "spectral_norm"} - set(self._names)
        points: list[Point] = []
        for family, of_family in found.items():
            points += points_of(family, of_family, self._shapes, hidden, step, family == "weights" or self._stepped)
        return points

    def _choose(self, pl_module: LightningModule) -> list[WeightMatrix]:
        found = weight_matrices(pl_module, self.embeddings)
        if self.layers is None:
            if message := left_out_message(pl_module):
                self.warn_once(message)
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
        self._forget_flops()
        every = super().cadence(trainer)
        budget = self.max_overhead * training * every * trainer.accumulate_grad_batches
        cost = sum(reading_flops(self._names, shape, self.updates) for shape in self._shapes.values())
        self._multiple = max(ceil(cost / budget), 1) if budget else 1
        rank_zero_info(
            f"`WeightSpectrumMonitor` reads {len(self._matrices)} matrices every {every * self._multiple} steps."
            " Choose with `layers=[...]` and `every_n_steps`."
        )

    def _forget_flops(self) -> None:
        if self._flops is not None:
            self._flops.remove()
        self._flops = None


def _copy(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
