"""Curves of intrinsic dimension of a real fit: what they read, and that the fit does not notice."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import IntrinsicDimensionMonitor
from lightning_collapse.functional import local_intrinsic_dimension, two_nn
from lightning_collapse.utilities import CURVES, Flag
from tests.toys import QUIET, ManualToy, PointKeeper, Toy, batches, fit, weights


class Still(Toy):
    """Never learns, so that its features can be computed again."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def named(keeper: PointKeeper, layer: str, step: int | None = None):
    start = f"intrinsic_dimension/{layer}/"
    return {
        p.key[len(start) :]: p for p in keeper.points if p.key.startswith(start) and (step is None or p.step == step)
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_values_are_those_of_the_last_rows(precision: str) -> None:
    model, loader, keeper = Still(), batches(8), PointKeeper()
    monitor = IntrinsicDimensionMonitor(["encoder", "head:input", "encoder.0:input"], 4, rows=96)
    trainer = fit(model, [monitor, keeper], loader, precision=precision)
    x = loader.dataset[-96:]
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        features = model.encoder(x)
    for layer, rows in (("encoder", features), ("head.input", features), ("encoder.0.input", x)):
        points, expected = named(keeper, layer, 7), two_nn(rows)
        assert points["two_nn"].value == pytest.approx(expected.dimension.item(), rel=1e-6)
        assert points["lid"].value == pytest.approx(local_intrinsic_dimension(rows).dimension.item(), rel=1e-6)
        assert points["n"].value == points["two_nn"].n == expected.n
        assert points["ties"].value == expected.ties
        assert points["flag"].flag == Flag.OK
    assert {point.step for point in keeper.points} == {0, 3, 7}
    assert trainer.callback_metrics["intrinsic_dimension/encoder.0.input/lid"].item() == pytest.approx(
        points["lid"].value
    )


def test_every_registered_curve_is_drawn() -> None:
    keeper = PointKeeper()
    monitor = IntrinsicDimensionMonitor(every_n_steps=3)
    trainer = fit(Toy(), [monitor, keeper])
    drawn = {point.key.rpartition("/")[2] for point in keeper.points}
    assert drawn == {curve.name for curve in CURVES.values() if curve.family == "intrinsic_dimension"}
    assert drawn == set(monitor.curves)
    assert {key for key in trainer.callback_metrics if key.startswith("intrinsic")} == {p.key for p in keeper.points}
    assert trainer.logger.curve("intrinsic_dimension/encoder.0/two_nn")


def test_a_manifold_is_told_from_its_span() -> None:
    angles = torch.rand(320, 2, generator=torch.Generator().manual_seed(0)) * 6.28
    lift = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    rows = (angles @ lift + torch.arange(16)).sin()  # two coordinates bent through sixteen
    keeper = PointKeeper()
    fit(Toy(), [IntrinsicDimensionMonitor(["encoder.0:input"], 10), keeper], DataLoader(rows, batch_size=32))
    found = named(keeper, "encoder.0.input")["two_nn"]
    assert found.n == 320
    # standard error of about 1.5 / sqrt(0.9 * 320)
    assert found.value == pytest.approx(2, rel=3 * 1.5 / (0.9 * 320) ** 0.5)


@pytest.mark.parametrize("model", [Toy, ManualToy])
def test_monitoring_changes_nothing(model) -> None:
    def run(*callbacks):
        torch.manual_seed(0)
        lit = model()
        fit(lit, callbacks)
        return weights(lit), torch.get_rng_state()

    (plain, rng), (watched, rng_watched) = run(), run(IntrinsicDimensionMonitor(every_n_steps=2))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert torch.equal(rng, rng_watched)


def test_a_compiled_model_reads_the_same_and_compiles_few_graphs() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, plain, compiled = Still(), PointKeeper(), PointKeeper()
    fit(model, [IntrinsicDimensionMonitor(["encoder"], 3, rows=64), plain])
    torch.compiler.reset()
    fit(torch.compile(model, backend=backend), [], batches(12))
    alone = len(graphs)
    graphs.clear()
    torch.compiler.reset()
    fit(
        torch.compile(model, backend=backend),
        [IntrinsicDimensionMonitor(["encoder"], 3, rows=64), compiled],
        batches(12),
    )
    assert len(graphs) == alone
    for expected, found in zip(plain.points, compiled.points, strict=False):
        assert (found.key, found.step, found.n) == (expected.key, expected.step, expected.n)
        assert found.value == pytest.approx(expected.value, rel=1e-5)


def test_rows_that_cannot_be_used() -> None:
    model, keeper = Toy(), PointKeeper()
    model.unused = nn.Linear(3, 3)
    loader = batches(4)
    loader.dataset[100:110] = torch.nan
    loader.dataset[120:124] = loader.dataset[119]
    with torch.no_grad():
        model.encoder[0].weight.zero_()
    monitor = IntrinsicDimensionMonitor(["unused", "encoder.0", "encoder.0:input", "encoder.2"], 4, rows=128)
    model.training_step = lambda batch, batch_idx: model.head(model.encoder(batch)).nan_to_num().sum() * 0
    with pytest.warns(UserWarning, match="`unused` did not run before every point"):
        fit(model, [monitor, keeper], loader)
    flags = {name: named(keeper, name)["flag"].flag for name in ("unused", "encoder.0", "encoder.0.input")}
    assert flags == {"unused": Flag.NOT_CALLED, "encoder.0": Flag.CONSTANT, "encoder.0.input": Flag.NONFINITE}
    assert named(keeper, "encoder.0")["two_nn"].value != named(keeper, "encoder.0")["two_nn"].value
    found = named(keeper, "encoder.0.input")
    assert (found["n"].value, found["ties"].value) == (128 - 10 - 4, 4)
    assert found["two_nn"].value > 3


def test_a_fit_of_nothing_but_nan_goes_on() -> None:
    loader, keeper = batches(4), PointKeeper()
    loader.dataset.fill_(torch.nan)
    fit(Toy(), [IntrinsicDimensionMonitor(["encoder"], 2), keeper], loader)
    assert {point.flag for point in keeper.points} == {Flag.FEW_ROWS}


def test_wide_layers_are_projected() -> None:
    class Wide(Toy):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 2100), nn.Tanh(), nn.Linear(2100, 8))

    keeper = PointKeeper()
    fit(Wide(), [IntrinsicDimensionMonitor(["encoder.1"], 6, rows=64), keeper])
    found = named(keeper, "encoder.1")
    assert found["flag"].flag == Flag.SKETCHED
    assert 4 < found["two_nn"].value < 20


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_fit_goes_on_with_its_curves(tmp_path) -> None:
    def run(*callbacks, path=None, **kwargs):
        torch.manual_seed(0)
        keeper, monitor = PointKeeper(), IntrinsicDimensionMonitor(["encoder"], 3, rows=96)
        model = Toy()
        options = {**QUIET, "logger": False, "callbacks": [monitor, keeper, *callbacks], **kwargs}
        Trainer(**options).fit(model, batches(9), ckpt_path=path)
        return keeper.points, monitor

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole, monitor = run(save, enable_checkpointing=True, max_steps=9)
    path = tmp_path / "step=4.ckpt"
    assert monitor.state_key in torch.load(path, weights_only=True)["callbacks"]
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    again, _ = run(save, path=str(path), enable_checkpointing=True, max_steps=9)
    assert {point.step for point in again} == {5, 8}
    # the loader starts anew in the middle of an epoch, so the rows are others
    assert [(p.key, p.step, p.n) for p in whole if p.step > 3] == [(p.key, p.step, p.n) for p in again]
    # two steps later there is no new point, and no warning that there was none
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    assert not run(save, path=str(path), enable_checkpointing=True, max_steps=5)[0]


def test_two_instances_have_states_of_their_own() -> None:
    keys = {
        IntrinsicDimensionMonitor(layers, every_n_steps=n).state_key
        for layers in (None, ["encoder"], ["head"])
        for n in (None, 3)
    }
    assert len(keys) == 6


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rows": 2}, "`rows` must be at least 3, got 2"),
        ({"k": 0}, "`k` must be at least 3, got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1"),
        ({"layers": "encoder"}, r"Write `layers=\['encoder'\]`"),
    ],
)
def test_bad_arguments(arguments, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        IntrinsicDimensionMonitor(**arguments)


def test_a_layer_that_is_not_there_is_refused_at_the_start() -> None:
    with pytest.raises(MisconfigurationException, match="'haed' matches no submodule of Toy"):
        fit(Toy(), [IntrinsicDimensionMonitor(["haed"])])


def test_by_default_points_are_seldom() -> None:
    keeper = PointKeeper()
    fit(Toy(), [IntrinsicDimensionMonitor(["encoder"], rows=64), keeper], batches(24), log_every_n_steps=1)
    assert [point.step for point in keeper.curve("intrinsic_dimension/encoder/two_nn")] == [0, 9, 19]
    with pytest.warns(UserWarning, match="ended before the first point, due after 30 steps. Set `every_n_steps`"):
        fit(Toy(), [IntrinsicDimensionMonitor(["encoder"])], batches(4), log_every_n_steps=3)
