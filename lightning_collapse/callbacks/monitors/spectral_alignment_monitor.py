"""Spectral alignment monitor: how inputs of weight matrices lie to the matrices' top singular vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.spectral_alignment import (
    cosines,
    diversity_of_counts,
    expected_majority_fraction,
    sign_counts,
)
from lightning_collapse.metrics.spectral_alignment import BINS, alignment_histogram
from lightning_collapse.monitoring.input_projections import InputProjections, Projected
from lightning_collapse.monitoring.step_scope import StepScope
from lightning_collapse.reporting import log_histogram
from lightning_collapse.spectral.power_iteration import PowerIteration, TopSingularPair
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.distributed import all_reduce_sum, world_size
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.hooks import HookOwner
from lightning_collapse.utilities.modules import find_modules, let_hooks_be_seen
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.weight_matrices import WeightMatrix, left_out_message, weight_matrices

UNCONVERGED_ABOVE = 0.2
"""A direction is doubted where ``residual / gap``, which bounds the sine of its error, is this or more; our choice."""
COLLAPSED_BELOW = 0.1
"""Sign diversity below which a matrix counts as collapsed: 19 of 20 inputs on one side; our choice."""
MOST_ITERATIONS = 10
HISTOGRAM_EVERY = 10
_EDGES = tuple(2 * i / BINS - 1 for i in range(BINS + 1))
_PAPER = "Qiu et al. 2025, arXiv:2510.04202"


class SpectralAlignmentMonitor(Monitor):
    """Log on which side of each weight matrix's top singular vector its inputs fall: balanced, or all on one.

    A collapse of the sign diversity is reported to precede loss explosions (arXiv:2510.04202). What is healthy differs
    between matrices (inputs after a ReLU are one-sided by nature), so compare a matrix with itself earlier, and look
    at the aggregates first.

    **Logged metrics** to every logger and to ``trainer.callback_metrics``; per matrix
    ``spectral_alignment/{matrix}/...``:

    {curves}

    Over all matrices, ``spectral_alignment/all/...``: the mean ``sign_diversity``, ``collapsed_share`` (matrices with a
    diversity below 0.1), the mean ``mean_energy_share``, the largest ``spectral_norm``, the largest ``residual`` of
    the power iteration, and ``n``, the fewest rows behind a matrix. Besides, to loggers that can show them, every
    tenth point: a histogram of the cosines per matrix.

    The singular vector is that of the weights which the captured batch is multiplied by: it is followed right before
    the last batch of the step, by one step of power iteration per optimizer step since the last point, ten at most, and
    is part of the callback's state. A point in an accumulation window that the end of an epoch cuts short where the
    trainer could not foresee it is left out.

    Watched are the inputs of every layer with a matrix for a weight, query, key and value of an attention module each
    by itself; not convolutions, recurrent layers and the output projection of ``nn.MultiheadAttention``, whose inputs
    no module receives as rows. Padding (zeros in ``batch["attention_mask"]``) does not count.

    Args:
        layers: Names of submodules, or glob patterns of them: the matrices in them are watched. ``None`` takes all.
        every_n_steps: Optimizer steps between two points. ``None`` follows ``Trainer(log_every_n_steps)``.
        rows: Rows per call of a layer to look at, at most, spread evenly over all of them (every ``k``-th, so it can be
            half as many); tokens count as rows.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument out of range; when the fit starts, as ``MisconfigurationException``, on a pattern
            that matches nothing, or nothing that could be watched.

    Example::

        trainer = Trainer(callbacks=[SpectralAlignmentMonitor()])
    """

    family = "spectral_alignment"
    declares = (
        Curve(
            "sign_diversity",
            "signs of <x, v1> over the inputs x of a matrix, v1 its top right singular vector",
            "0 to 1",
            "0: all inputs on one side; compare with the same matrix earlier",
            f"{_PAPER} (the scalar is ours)",
        ),
        Curve("sign_diversity_centered", "the same of the inputs less their mean", "0 to 1", "towards 0"),
        Curve("alignment_mean", "mean cosine between inputs and v1", "-1 to 1", "towards -1 or 1", _PAPER),
        Curve(
            "spectral_norm",
            "largest singular value of the matrix; under `all` the largest of all matrices",
            "0 to infinity",
            "explodes with one-sided alignment",
            _PAPER,
        ),
        Curve(
            "mean_energy_share",
            "squared norm of the mean input over the mean squared norm; NaN if a row was not finite",
            "0 to 1",
            "1: all inputs equal",
        ),
        Curve(
            "collapsed_share",
            f"share of the matrices with a sign diversity below {COLLAPSED_BELOW}; under `all`",
            "0 to 1",
            "rises",
        ),
        Curve(
            "residual",
            "|W'W v - s^2 v| / s^2 of the power iteration, the largest of all matrices; under `all`",
            "0 to infinity",
            "does not tell",
        ),
        Curve("n", "rows behind a matrix, the fewest; under `all`", "0 to infinity", "few"),
        Curve("flag", "a matrix", "0 to 7", "above 0: why to doubt the point"),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        every_n_steps: int | None = None,
        rows: int = 256,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "all weight matrices")
        if rows < 2:
            raise ValueError(f"`rows` must be at least 2, got {rows}. The default is 256.")
        self.layers = layers
        self.rows = rows
        self._matrices: list[WeightMatrix] = []
        self._projections: InputProjections | None = None
        self._scope: StepScope | None = None
        self._told = False
        self._power = PowerIteration()
        self._pairs: dict[str, TopSingularPair] = {}
        self._histograms: list[float] = []

    @override
    def state(self) -> dict[str, Any]:
        return {"blocks": self._power.state_dict()}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        self._power.load_state_dict(state["blocks"])

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._matrices = self._choose(pl_module)
        let_hooks_be_seen(pl_module)
        self._projections = InputProjections(self._matrices, self.rows, self.contained)
        self._scope = StepScope(pl_module)
        self._power = PowerIteration()

    @property
    @override
    def listeners(self) -> list[HookOwner]:
        return [] if self._projections is None else [self._projections]

    @override
    def stop(self) -> None:
        if self._projections is not None:
            self._projections.remove()
        if self._scope is not None:
            self._scope.remove()
        self._projections = self._scope = None
        self._matrices, self._pairs, self._histograms = [], {}, []

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if batches_left or self._projections is None or self._scope is None or not self._matrices:
            return
        weights = {matrix.name: matrix.read() for matrix in self._matrices}
        self._pairs = self._power.step(weights, min(self.cadence(trainer), MOST_ITERATIONS))
        self._projections.aim({name: pair.direction for name, pair in self._pairs.items()}, padding_mask(batch))
        self._scope.request(self._projections)

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Curves by name, each with a number for every matrix."""
        if self._projections is None or not self._pairs:
            return {}
        histograms = bool(trainer.loggers) and self._points % HISTOGRAM_EVERY == 0
        columns = _evaluate(self._pairs, self._projections.pop(), histograms)
        self._pairs = {}
        return {("", name): column for name, column in columns.items()}

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        if not numbers:
            return []
        columns = {name: column for (_, name), column in numbers.items()}
        self._histograms = columns.pop("histogram", [])
        points: list[Point] = []
        for i, matrix in enumerate(self._matrices):
            points += self._points_of(matrix.name, step, {name: column[i] for name, column in columns.items()})
        self._tell_of([point.layer for point in points if point.measure == "flag" and point.value == Flag.NOT_CALLED])
        return points + self._aggregates(points, step, columns["residual"])

    @override
    def draw(self, trainer: Trainer, step: int) -> None:
        counts, self._histograms = self._histograms, []
        for i, matrix in enumerate(self._matrices if counts else ()):
            for logger in trainer.loggers:
                own = counts[i * BINS : (i + 1) * BINS]
                log_histogram(logger, f"{self.family}/{matrix.name}/alignment", own, _EDGES, step)

    def _tell_of(self, unseen: Sequence[str]) -> None:
        """Say once which trained matrices no module received the inputs of: functions may be given their weights."""
        left_out = set() if self._projections is None else self._projections.left_out
        frozen = {m.name for m in self._matrices if not any(p.requires_grad for p in m.module.parameters())}
        unseen = [name for name in unseen if name not in left_out | frozen]
        if unseen and not self._told:
            self._told = True
            more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
            self.warn_once(
                f"the inputs of {', '.join(f'`{name}`' for name in unseen[:8])}{more} were not seen before every point;"
                f" curves of {len(unseen)} of {len(self._matrices)} matrices read NaN there. If these never run, or"
                " a function is called with their weights and not the module, choose other `layers`."
            )

    def _choose(self, pl_module: LightningModule) -> list[WeightMatrix]:
        matrices = weight_matrices(pl_module)
        if self.layers is None and (message := left_out_message(pl_module)):
            self.warn_once(message)
        if self.layers is not None:
            try:
                chosen = find_modules(pl_module, self.layers)
            except ValueError as error:
                raise MisconfigurationException(f"{self._call}: {error}") from error
            inside = {id(module) for root in chosen.values() for module in root.modules()}
            matrices = [matrix for matrix in matrices if id(matrix.module) in inside]
        captured = [matrix for matrix in matrices if matrix.input is not None]
        silent = [matrix.name for matrix in matrices if matrix.input is None]
        if self.layers is not None and not captured:
            raise MisconfigurationException(
                f"{self._call} matches no layer whose inputs meet a weight matrix as rows"
                f" ({', '.join(silent) or 'there is no matrix'}). Name linear layers, or modules that hold some."
            )
        if self.layers is None:
            found = f"{len(captured)} weight {'matrix' if len(captured) == 1 else 'matrices'}."
            others = f" Of {len(silent)} other{'s' * (len(silent) > 1)} no module receives the inputs as rows."
            said = f"{found}{others if silent else ''}"
            rank_zero_info(f"`{type(self).__name__}` watches {said} Choose with `layers=[...]`.")
        return captured

    @property
    def _call(self) -> str:
        return f"`{type(self).__name__}(layers={list(self.layers or ())!r})`"

    def _points_of(self, name: str, step: int, found: Mapping[str, float]) -> list[Point]:
        n, flag = int(found["n"]), _flag(found)
        values = {curve: found[curve] for curve in _CURVES}
        if flag in (Flag.NOT_CALLED, Flag.FEW_ROWS) or isnan(found["residual"]):
            values = {curve: value if curve == "spectral_norm" else nan for curve, value in values.items()}
        balanced = 2 - 2 * expected_majority_fraction(n) if n else nan
        nulls = {"sign_diversity": balanced, "sign_diversity_centered": balanced, "alignment_mean": 0.0}
        nulls["mean_energy_share"] = 1 / n if n else nan
        values["flag"] = float(flag)
        return [
            Point(self.family, name, curve, step, value, n, nulls.get(curve, nan), flag)
            for curve, value in values.items()
        ]

    def _aggregates(self, points: Sequence[Point], step: int, residuals: Sequence[float]) -> list[Point]:
        def values(curve: str) -> list[float]:
            found = [point.value for point in points if point.measure == curve]
            return [value for value in found if not isnan(value)] or [nan]

        n = min(point.n for point in points)
        diversities, shares = values("sign_diversity"), values("mean_energy_share")
        collapsed = sum(value < COLLAPSED_BELOW for value in diversities) / len(diversities)
        summary = {
            "sign_diversity": sum(diversities) / len(diversities),
            "collapsed_share": nan if isnan(diversities[0]) else collapsed,
            "mean_energy_share": sum(shares) / len(shares),
            "spectral_norm": max(values("spectral_norm")),
            "residual": max([residual for residual in residuals if not isnan(residual)] or [nan]),
            "n": float(n),
        }
        return [Point(self.family, "all", curve, step, value, n) for curve, value in summary.items()]


_CURVES = ("spectral_norm", "sign_diversity", "sign_diversity_centered", "alignment_mean", "mean_energy_share")


@torch.no_grad()
def _evaluate(
    pairs: Mapping[str, TopSingularPair], captured: Mapping[str, Projected], histograms: bool
) -> dict[str, Tensor]:
    """Numbers of every matrix, by name: seen and finite rows, residual, gap, and the values of the curves.

    Collective: every process calls it with the same matrices; one may have captured nothing.
    """
    weights = torch.stack([x for pair in pairs.values() for x in (pair.residual, pair.gap, pair.norm)]).view(-1, 3)
    captured = {name: captured.get(name) or _silence(pair.direction) for name, pair in pairs.items()}
    dtype = accumulation_dtype(weights.device)
    norms = _padded([of_one.norms for of_one in captured.values()])
    projections = _padded([of_one.projections for of_one in captured.values()])
    finite = norms.isfinite() & (norms >= 0)
    norms, seen = torch.where(finite, norms, nan), (~(norms < 0)).sum(dim=1)
    projections = torch.where(finite, projections, nan)
    alignment = cosines(projections, norms)
    sums = [seen, finite.sum(dim=1), *sign_counts(alignment)]
    sums += [values.nansum(dim=1, dtype=dtype) for values in (alignment, projections, norms.square())]
    table = torch.cat([torch.stack([column.to(dtype) for column in sums], dim=1), weights.to(dtype)], dim=1)
    if histograms:
        table = torch.cat([table, alignment_histogram(alignment).to(dtype)], dim=1)
    totals = torch.cat([of_one.total for of_one in captured.values()]).to(dtype)
    message = all_reduce_sum(torch.cat([table.flatten(), totals]))
    table = message[: table.numel()].view_as(table)
    seen, n, positive, negative, cosine, projection, energy, *weight = table[:, :10].unbind(dim=1)
    # every process found the same for the weights; their mean is one number for all of them to the last bit
    residual, gap, norm = (value / world_size() for value in weight)
    mean = (projection / n).to(projections)
    centered = all_reduce_sum(torch.stack(sign_counts(cosines(projections - mean[:, None], norms))))
    widths = torch.tensor([len(of_one.total) for of_one in captured.values()], device=n.device)
    owners = torch.arange(len(widths), device=n.device).repeat_interleave(widths, output_size=len(totals))
    mean_energy = torch.zeros_like(n).index_add_(0, owners, message[table.numel() :].square())
    columns = {"seen": seen, "n": n, "residual": residual, "gap": gap, "spectral_norm": norm}
    columns |= {"sign_diversity": diversity_of_counts(positive, negative)}
    columns |= {"sign_diversity_centered": diversity_of_counts(*centered).to(dtype), "alignment_mean": cosine / n}
    columns |= {"mean_energy_share": mean_energy / (n * energy)}
    return columns | ({"histogram": table[:, 10:].flatten()} if histograms else {})


def _padded(vectors: Sequence[Tensor]) -> Tensor:
    if len(set(map(len, vectors))) == 1:
        return torch.stack(list(vectors))
    return pad_sequence(list(vectors), batch_first=True, padding_value=-1.0)


def _silence(direction: Tensor) -> Projected:
    return Projected(direction[:0], direction[:0], torch.zeros_like(direction))


def _flag(found: Mapping[str, float]) -> Flag:
    if not found["seen"]:
        return Flag.NOT_CALLED
    if found["n"] < 2:
        return Flag.FEW_ROWS
    if not found["residual"] < UNCONVERGED_ABOVE * found["gap"]:
        return Flag.UNCONVERGED
    return Flag.NONFINITE if found["n"] < found["seen"] else Flag.OK
