"""Curves of regression collapse on real data: what they read, what weight decay does, and what cannot be read."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, RegressionCollapseMonitor
from lightning_collapse.functional import regression_collapse, two_nn
from lightning_collapse.utilities import CURVES, Flag
from tests.regression import Regressor, diabetes, loader
from tests.toys import QUIET, PointKeeper, fit, weights

NAMES = ["nrc1", "nrc2", "nrc3", "intrinsic_dimension", "target_dimension", "n", "flag"]


def named(keeper: PointKeeper, step: int | None = None, head: str = "head"):
    points = [p for p in keeper.points if step is None or p.step == step]
    return {p.key.removeprefix(f"regression_collapse/{head}/"): p for p in points}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("targets", [1, 3])
def test_values_are_those_of_the_last_rows(targets: int, precision: str) -> None:
    model, keeper = Regressor(targets, lr=0.0), PointKeeper()
    trainer = fit(
        model,
        [RegressionCollapseMonitor(every_n_steps=12, rows=136), keeper],
        loader(targets),
        precision=precision,
    )
    x, y = loader(targets).dataset[8 * 34 : 12 * 34]
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        rows = model.body(x)
    expected = regression_collapse(rows, y.view(136, -1), model.head.weight)
    points = named(keeper)
    assert list(points) == NAMES
    for name in ("nrc1", "nrc2", "nrc3"):
        assert points[name].value == pytest.approx(getattr(expected, name).item(), rel=1e-5, nan_ok=targets == 1)
        assert points[name].n == 136
    assert points["intrinsic_dimension"].value == pytest.approx(two_nn(rows).dimension.item(), rel=1e-6)
    assert points["intrinsic_dimension"].n == two_nn(rows).n
    found = min(two_nn(y.view(136, -1)).dimension.item(), targets)
    assert points["target_dimension"].value == pytest.approx(found, rel=1e-6)
    assert points["n"].value == 136
    assert {point.flag for point in keeper.points} == {Flag.OK}
    assert trainer.callback_metrics["regression_collapse/head/nrc2"].item() == pytest.approx(points["nrc2"].value)


def test_every_registered_curve_is_drawn() -> None:
    drawn = {curve.name for curve in CURVES.values() if curve.family == "regression_collapse"}
    assert drawn == set(NAMES) == set(RegressionCollapseMonitor().curves)


def test_weight_decay_collapses_the_features_and_its_absence_does_not() -> None:
    def read(decay: float) -> dict[str, float]:
        torch.manual_seed(0)
        keeper = PointKeeper()
        monitor = RegressionCollapseMonitor(every_n_steps=650, rows=400)
        fit(Regressor(3, lr=0.1, decay=decay), [monitor, keeper], loader(), max_epochs=100)
        return {name: point.value for name, point in named(keeper, 1299).items()}

    free, decayed = read(0.0), read(2e-2)
    for name in ("nrc1", "nrc2"):
        assert decayed[name] < 0.05
        assert decayed[name] < free[name] / 5
    assert decayed["intrinsic_dimension"] < free["intrinsic_dimension"]


def test_monitoring_changes_nothing() -> None:
    def run(*callbacks):
        torch.manual_seed(0)
        model = Regressor()
        fit(model, callbacks, loader())
        return weights(model), torch.get_rng_state()

    (plain, rng), (watched, rng_watched) = run(), run(RegressionCollapseMonitor(every_n_steps=3))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert torch.equal(rng, rng_watched)


def test_a_compiled_model_reads_the_same_and_compiles_few_graphs() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, plain, compiled = Regressor(lr=0.0), PointKeeper(), PointKeeper()
    fit(model, [RegressionCollapseMonitor(every_n_steps=3, rows=60), plain], loader())
    torch.compiler.reset()
    model = torch.compile(model, backend=backend)
    fit(model, [RegressionCollapseMonitor(every_n_steps=3, rows=60), compiled], loader())
    assert len(graphs) == 1
    assert len(plain.points) == 5 * len(NAMES)
    for expected, found in zip(plain.points, compiled.points, strict=True):
        assert (found.key, found.step, found.n) == (expected.key, expected.step, expected.n)
        assert found.value == pytest.approx(expected.value, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_fit_goes_on_with_its_curves(tmp_path) -> None:
    def run(path=None):
        torch.manual_seed(0)
        keeper, monitor = PointKeeper(), RegressionCollapseMonitor(every_n_steps=3, rows=100)
        save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        options = {**QUIET, "logger": False, "callbacks": [monitor, keeper, save], "enable_checkpointing": True}
        Trainer(**options).fit(Regressor(), loader(), ckpt_path=path)
        return keeper.points, monitor

    whole, monitor = run()
    path = tmp_path / "step=4.ckpt"
    assert monitor.state_key in torch.load(path, weights_only=True)["callbacks"]
    again, _ = run(str(path))
    assert {point.step for point in again} == {5, 8, 11}
    # the loader starts anew in the middle of an epoch, so the rows are others
    assert [(p.key, p.step, p.n) for p in whole if p.step > 3] == [(p.key, p.step, p.n) for p in again]


class Spared(Regressor):
    """Runs on what it is given and does not learn from it."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.head(self.body(batch[0]))
        return 0 * self.head.weight.sum()


def test_rows_with_bad_numbers_are_left_out() -> None:
    model, keeper, batches = Spared(lr=0.0), PointKeeper(), loader()
    x, y = batches.dataset.tensors
    x[40], y[50, 1] = torch.nan, torch.inf
    fit(model, [RegressionCollapseMonitor(every_n_steps=13, rows=1000), keeper], batches)
    points = named(keeper)
    assert (points["n"].value, points["flag"].flag) == (440, Flag.NONFINITE)
    keep = torch.ones(442, dtype=torch.bool)
    keep[[40, 50]] = False
    expected = regression_collapse(model.body(diabetes()[0][keep]), diabetes()[1][keep], model.head.weight)
    assert points["nrc1"].value == pytest.approx(expected.nrc1.item(), rel=1e-5)
    assert points["nrc3"].value == pytest.approx(expected.nrc3.item(), rel=1e-5)


def test_a_fit_of_nothing_but_nan_and_one_of_equal_features_go_on() -> None:
    batches, keeper = loader(), PointKeeper()
    batches.dataset.tensors[0].fill_(torch.nan)
    fit(Regressor(), [RegressionCollapseMonitor(every_n_steps=5), keeper], batches)
    assert {point.flag for point in keeper.points} == {Flag.FEW_ROWS}
    model, keeper = Regressor(lr=0.0), PointKeeper()
    nn.init.zeros_(model.body[2].weight)
    fit(model, [RegressionCollapseMonitor(every_n_steps=13), keeper], loader())
    assert {point.flag for point in keeper.points} == {Flag.CONSTANT}
    assert named(keeper)["intrinsic_dimension"].value != named(keeper)["intrinsic_dimension"].value


class Mapped(Regressor):
    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch[self.key]), batch_idx)


def mapped(key: str) -> DataLoader:
    x, y = diabetes()
    return DataLoader([{"x": x[i : i + 34], key: y[i : i + 34]} for i in range(0, 340, 34)], batch_size=None)


@pytest.mark.parametrize("key", ["y", "labels", "progression"])
def test_targets_of_mappings_and_of_a_function(key: str) -> None:
    model, keeper = Mapped(lr=0.0), PointKeeper()
    model.key = key
    function = (lambda batch: batch["progression"]) if key == "progression" else None
    fit(model, [RegressionCollapseMonitor(targets=function, every_n_steps=10, rows=340), keeper], mapped(key))
    expected = regression_collapse(model.body(diabetes()[0][:340]), diabetes()[1][:340], model.head.weight)
    assert named(keeper)["nrc3"].value == pytest.approx(expected.nrc3.item(), rel=1e-5)


class Tabular(Regressor):
    """Receives categories, numbers and targets, in this order."""

    def __init__(self, step) -> None:
        super().__init__(lr=0.0)
        self.table, self.step = nn.Embedding(2, 16), step

    def features(self, batch):
        return self.body(batch[1]) + self.table(batch[0])

    def training_step(self, batch, batch_idx):
        return self.step(self.head(self.features(batch)), batch[2])


def pinball(predictions, y):
    error = y - predictions
    return torch.maximum(0.9 * error, -0.1 * error).mean()


@pytest.mark.parametrize("step", [nn.functional.mse_loss, pinball])
@pytest.mark.parametrize("every", [1, 10])
def test_targets_are_those_of_the_first_loss(step, every: int) -> None:
    x, y = diabetes()
    rows = DataLoader([((x[i : i + 34, 0] > 0).long(), x[i : i + 34], y[i : i + 34]) for i in range(0, 340, 34)], None)
    model, keeper = Tabular(step), PointKeeper()
    fit(model, [RegressionCollapseMonitor(every_n_steps=every, rows=34 * every), keeper], rows)
    last = slice(340 - 34 * every, 340)
    features = model.features(((x[last, 0] > 0).long(), x[last]))
    expected = regression_collapse(features, y[last], model.head.weight)
    assert named(keeper, 9)["nrc3"].value == pytest.approx(expected.nrc3.item(), rel=1e-5)
    assert {point.flag for point in keeper.points} == {Flag.OK}
    assert not any(point.value != point.value for point in keeper.points)


@pytest.mark.filterwarnings("ignore:.*there were no rows of `head` with targets")
@pytest.mark.filterwarnings("ignore:.*the fit ended before the first point")
def test_targets_that_are_not_found_are_said_at_the_first_batch() -> None:
    class Untold(Mapped):
        def training_step(self, batch, batch_idx):
            return pinball(self.head(self.body(batch["x"])), batch["progression"])

    model, keeper = Untold(), PointKeeper()
    with pytest.warns(UserWarning, match="found no targets in a batch of type dict: .*Pass `targets=` a function"):
        fit(model, [RegressionCollapseMonitor(every_n_steps=100), keeper], mapped("progression"))
    with pytest.warns(UserWarning, match=r"`targets` raised KeyError\('price'\) for a batch of type dict"):
        fit(
            model,
            [RegressionCollapseMonitor(targets=lambda b: b["price"], every_n_steps=5), keeper],
            mapped("progression"),
        )
    assert {point.flag for point in keeper.points} == {Flag.NOT_CALLED}
    assert {point.step for point in keeper.points} == {0, 4, 9}


@pytest.mark.filterwarnings("ignore:.*there were no rows of `head` with targets")
def test_targets_and_heads_that_do_not_fit() -> None:
    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="`head` received 34 rows for 33 targets"):
        fit(Regressor(), [RegressionCollapseMonitor(targets=lambda b: b[1][1:], every_n_steps=5), keeper], loader())
    assert {point.flag for point in keeper.points} == {Flag.NOT_CALLED}
    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="`head` returns 3 numbers for 2 targets; `nrc2` and `nrc3` read NaN"):
        fit(Regressor(), [RegressionCollapseMonitor(targets=lambda b: b[1][:, :2], every_n_steps=5), keeper], loader())
    points = named(keeper)
    assert points["nrc2"].value != points["nrc2"].value
    assert 0 <= points["nrc1"].value <= 1


def test_a_head_that_never_runs() -> None:
    model, keeper = Regressor(), PointKeeper()
    model.unused = nn.Linear(3, 3)
    with pytest.warns(UserWarning, match="there were no rows of `unused` with targets before a point"):
        fit(model, [RegressionCollapseMonitor("unused", every_n_steps=5), keeper], loader())
    assert {point.flag for point in keeper.points} == {Flag.NOT_CALLED}


@pytest.mark.parametrize(
    ("head", "match"),
    [("haed", "'haed' matches no submodule"), ("*", "it matches 5 layers"), ("body", "holds 2 weight matrices")],
)
def test_a_head_that_is_not_one_is_refused_at_the_start(head: str, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(Regressor(), [RegressionCollapseMonitor(head)], loader())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rows": 2}, "`rows` must be at least 3, got 2"),
        ({"targets": "y"}, "`targets` must be a function of a batch, or None, got 'y'"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RegressionCollapseMonitor(**arguments)


def test_the_guard_reads_it() -> None:
    class Poor(Regressor):
        """Passes on one number of three targets."""

        def __init__(self):
            super().__init__(lr=0.0)
            self.body = nn.Sequential(nn.Linear(7, 1), nn.Linear(1, 16))

    guard = CollapseGuard(action="log")
    fit(Poor(), [RegressionCollapseMonitor(every_n_steps=6, rows=200), guard], loader(), max_epochs=5)
    assert [(verdict.kind, verdict.layer) for verdict in guard.verdicts] == [("regression_over_compression", "head")]
    guard = CollapseGuard(action="log")
    fit(Regressor(), [RegressionCollapseMonitor(every_n_steps=6, rows=200), guard], loader(), max_epochs=5)
    assert guard.verdicts == []
