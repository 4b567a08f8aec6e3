"""A classifier's features on their class means, measured while it trains."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_collapse import NeuralCollapseMonitor
from lightning_collapse.functional import minority_cosine, minority_norm
from lightning_collapse.metrics import NeuralCollapse
from lightning_collapse.utilities.points import Flag
from tests.toys import QUIET, PointKeeper, fit, weights

NAMES = [
    "nc1",
    "nc2_equinorm",
    "nc2_equiangular",
    "nc2_etf",
    "nc3",
    "cdnv",
    "log_cdnv",
    "gnc2",
    "unc3",
    "vci",
    "minority_cosine",
    "minority_norm",
    "gof_error",
    "norm_count_slope",
    "norm_count_slope_means",
    "classes",
    "n",
    "flag",
]

RARE = ["minority_cosine", "minority_norm"]


class Classifier(LightningModule):
    """Of batches ``(x, y)``, mappings, or tokens ``(x, y)`` with one label each."""

    def __init__(self, lr: float = 0.0, width: int = 12, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, width), nn.ReLU())
        self.head = nn.Linear(width, classes)
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["label"]) if isinstance(batch, dict) else batch[:2]
        logits = self.head(self.body(x))
        if not torch.is_tensor(y) or y.is_floating_point():
            return logits.square().mean()
        return nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data(count: int = 10, size: int = 24, tokens: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        y = torch.randint(5, (size, *tokens), generator=generator)
        x = torch.randn(*y.shape, 8, generator=generator) + y.unsqueeze(-1)
        batches.append((x, y))
    return batches


def run(model: LightningModule, batches: list[Any], *callbacks: Any, **kwargs: Any) -> PointKeeper:
    keeper = PointKeeper()
    fit(model, [*callbacks, keeper], DataLoader(batches, batch_size=None), **kwargs)
    return keeper


def last(keeper: PointKeeper) -> dict[str, float]:
    step = keeper.points[-1].step
    return {point.key.rpartition("/")[2]: point.value for point in keeper.points if point.step == step}


def expected(model: Classifier, batches: list[Any]) -> dict[str, float]:
    metric = NeuralCollapse(5, 12)
    for x, y in batches:
        metric.update(model.body(x).flatten(0, -2).detach(), y.flatten())
    return {name: value.item() for name, value in metric.compute(model.head.weight).items()}


@pytest.mark.parametrize("tokens", [(), (3,)])
def test_values_are_those_of_the_last_batches(tokens: tuple[int, ...]) -> None:
    model, batches = Classifier(), data(tokens=tokens)
    keeper = run(model, batches, NeuralCollapseMonitor(every_n_steps=5))
    found = last(keeper)
    size = batches[0][1].numel()
    window = -(-80 // size)  # as many as hold sixteen rows of each of five classes
    assert found["n"] == size * window
    reference = expected(model, batches[-window:])
    for name in NAMES[:-1]:
        assert found[name] == pytest.approx(reference[name], rel=1e-4, nan_ok=True), name
    assert [point.key for point in keeper.points[: len(NAMES)]] == [f"neural_collapse/head.input/{n}" for n in NAMES]


@pytest.mark.parametrize(
    ("form", "labels"),
    [
        (lambda x, y: {"x": x, "label": y}, None),
        (lambda x, y: (x, y, "more"), None),
        (lambda x, y: (x, y.roll(1), y.int()), lambda batch: batch[2]),
    ],
)
def test_labels_are_found_in_the_usual_batches(form: Any, labels: Any) -> None:
    model, batches = Classifier(), data()
    if labels is not None:
        batches = [(x, y) for x, y in batches]
        model.training_step = lambda batch, batch_idx: model.head(model.body(batch[0])).square().mean()
    found = last(run(model, [form(x, y) for x, y in batches], NeuralCollapseMonitor(None, labels, 5)))
    assert found["nc1"] == pytest.approx(expected(model, batches[-4:])["nc1"], rel=1e-4)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda x, y: (x, nn.functional.one_hot(y, 5).float()),
            "the batch has no integer labels.*`labels=lambda batch",
        ),
        (lambda x, y: (x, torch.cat([y, y])), "the classifier received 24 rows and the batch has 48 labels"),
    ],
)
def test_batches_without_fitting_labels_are_left_out_with_a_warning(spoil: Any, match: str) -> None:
    model = Classifier()
    model.training_step = lambda batch, batch_idx: model.head(model.body(batch[0])).square().mean()
    with pytest.warns(UserWarning, match=match), pytest.warns(UserWarning, match="received no labelled rows"):
        keeper = run(model, [spoil(x, y) for x, y in data()], NeuralCollapseMonitor(every_n_steps=5))
    assert {point.flag for point in keeper.points} == {Flag.NOT_CALLED}


def test_rare_classes_are_those_of_all_points_so_far_also_when_resumed(tmp_path) -> None:
    model = Classifier()
    batches = [(x, y.clamp_max(1)) for x, y in data(8)]
    for _, y in batches[::4]:  # windows of four batches: the rare classes come in the first of each
        y[:3] = torch.tensor([2, 3, 4])
    for _, y in batches[4:]:
        y[:] = torch.arange(len(y)) % 2
    first = NeuralCollapseMonitor(every_n_steps=4)
    save = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=4)
    early = run(model, batches[:4], first, save, enable_checkpointing=True)
    again = NeuralCollapseMonitor(every_n_steps=4)
    again.load_state_dict(torch.load(tmp_path / "mid.ckpt", weights_only=True)["callbacks"][first.state_key])
    late = run(model, batches[4:], again)
    counts = torch.bincount(torch.cat([y for _, y in batches[:4]]), minlength=5)
    cosine, norm = minority_cosine(model.head.weight, counts).item(), minority_norm(model.head.weight, counts).item()
    for keeper in (early, late):
        assert [last(keeper)[name] for name in RARE] == pytest.approx([cosine, norm], rel=1e-5)
    alone = run(model, batches[4:], NeuralCollapseMonitor(every_n_steps=4))
    assert all(last(alone)[name] != last(alone)[name] for name in RARE)


@pytest.mark.filterwarnings("ignore:.*the fit ended before the first point", "ignore:Checkpoint directory")
def test_the_first_point_after_a_resume_has_its_rows_where_the_classifier_is_not_registered_last(tmp_path) -> None:
    class Unused(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 3)

    def start(epochs: int) -> tuple[Trainer, PointKeeper]:
        save, keeper = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=3), PointKeeper()
        options = {**QUIET, "logger": False, "enable_checkpointing": True, "max_epochs": epochs}
        return Trainer(callbacks=[NeuralCollapseMonitor(every_n_steps=4), keeper, save], **options), keeper

    loader = DataLoader(data(3), batch_size=None)
    start(epochs=1)[0].fit(Unused(), loader)
    trainer, keeper = start(epochs=2)
    trainer.fit(Unused(), loader, ckpt_path=tmp_path / "mid.ckpt")
    assert last(keeper)["n"] == 48


@pytest.mark.filterwarnings("ignore:.*the batch has no integer labels", "ignore:.*received no labelled rows")
def test_labels_in_every_second_batch_are_read_though_the_batches_of_points_have_none() -> None:
    batches = [(x, y if i % 2 == 0 else y.float()) for i, (x, y) in enumerate(data(12))]
    batches[0] = (batches[0][0], batches[0][1].float())  # nor has the first, which asks how many rows there are
    keeper = run(Classifier(), batches, NeuralCollapseMonitor(every_n_steps=4))
    rows = [point.value for point in keeper.points if point.measure == "n"]
    assert rows[:2] == [0, 24]
    assert all(n >= 48 for n in rows[2:])
    assert last(keeper)["nc1"] > 0


def test_bad_rows_and_labels_are_counted_and_left_out() -> None:
    model, batches = Classifier(), data()
    for x, y in batches:
        x[0], y[1], y[2] = torch.nan, -100, 99

    def step(batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():  # gradients would be NaN
            model.head(model.body(batch[0]))
        return model.head.weight.square().mean()

    model.training_step = step
    with pytest.warns(UserWarning, match="labels other than 0 to 4, .* left out. Count classes from 0"):
        keeper = run(model, batches, NeuralCollapseMonitor(every_n_steps=5))
    clean = [(x[3:], y[3:]) for x, y in batches]
    assert last(keeper)["n"] == 84
    assert last(keeper)["nc1"] == pytest.approx(expected(model, clean[-4:])["nc1"], rel=1e-4)
    assert keeper.points[-1].flag == Flag.NONFINITE


def test_padding_does_not_count() -> None:
    model, batches = Classifier(), data(tokens=(4,))
    mask = torch.ones(24, 4, dtype=torch.long)
    mask[::2, 3] = 0
    padded = [{"x": x, "label": y, "attention_mask": mask} for x, y in batches]
    found = last(run(model, padded, NeuralCollapseMonitor(every_n_steps=5, rows=96)))
    x, y = batches[-1]
    assert found["n"] == 84
    assert found["nc1"] == pytest.approx(expected(model, [(x[mask > 0], y[mask > 0])])["nc1"], rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_monitoring_changes_nothing_and_sees_collapse_on_digits(precision: str) -> None:
    images, digits = load_digits(return_X_y=True)
    rows = torch.tensor(images, dtype=torch.float32) / 16
    batches = list(zip(rows.split(128), torch.tensor(digits).split(128), strict=True)) * 12

    class Digits(Classifier):
        def __init__(self) -> None:
            super().__init__(0.5, 32, 10)
            self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())

    plain = Digits()
    run(plain, batches, precision=precision)
    state = torch.get_rng_state()
    watched = Digits()  # seeds
    keeper = run(watched, batches, NeuralCollapseMonitor(every_n_steps=20), precision=precision)
    assert torch.equal(torch.get_rng_state(), state)
    found = weights(watched)
    assert all(torch.equal(value, found[name]) for name, value in weights(plain).items())
    nc1 = [point.value for point in keeper.curve("neural_collapse/head.input/nc1")]
    assert nc1[-1] < 0.5 * nc1[0]


def test_compiled_model_reads_the_same() -> None:
    plain = run(Classifier(), data(), NeuralCollapseMonitor(every_n_steps=5))
    torch.compiler.reset()
    compiled = run(torch.compile(Classifier(), backend="eager"), data(), NeuralCollapseMonitor(every_n_steps=5))
    assert [p.value for p in compiled.points] == pytest.approx([p.value for p in plain.points], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"layer": 3}, "`layer` takes one name, .* got 3"),
        ({"labels": "y"}, "`labels` takes a function from a batch to its labels, got 'y'"),
        ({"rows": 1}, "`rows` must be at least 2, .* got 1"),
        ({"rows": 64.0}, r"`rows` must be at least 2, .* got 64\.0"),
        ({"rows": "all"}, "`rows` must be at least 2, .* got 'all'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NeuralCollapseMonitor(**arguments)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        ("haed", "'haed' matches no submodule"),
        ("body.1", "a classifier has a weight of shape"),
        ("*", "it matches 4 layers, body.input, .* Name one"),
    ],
)
def test_what_is_no_classifier_is_refused_at_the_start(layer: str, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        run(Classifier(), data(1), NeuralCollapseMonitor(layer))


def test_a_classifier_whose_weight_is_computed() -> None:
    def call(module: Any, batch: Any) -> Any:
        return module.head(module.body(batch[0]))

    model, batches = Classifier(), data()
    nn.utils.parametrizations.weight_norm(model.head)
    found = last(run(model, batches, NeuralCollapseMonitor(every_n_steps=5, loader=batches, inputs=call)))
    window, clean = expected(model, batches[-4:]), expected(model, batches)
    assert found["nc3"] == pytest.approx(clean["nc3"], rel=1e-4)  # of the pass over the loader, which comes last
    assert window["nc3"] != pytest.approx(clean["nc3"], rel=1e-4)
