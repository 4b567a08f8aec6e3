"""When a classifier has collapsed, which is news, and when its rare classes have, which is an alarm."""

import logging
from collections.abc import Sequence
from math import nan
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseGuard, NeuralCollapseMonitor, Rollback
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Flag, Point
from tests.toys import Claims, MemoryLogger, PointKeeper, Toy, batches, fit

LAYER = "neural_collapse/head.input"
Script = Sequence[dict[str, float]]


class Planted(Callback):
    """Publishes readings of the classifier, one point per step."""

    def __init__(self, script: Script, n: int, null: float, flag: Flag) -> None:
        self.script, self.n, self.null, self.flag = script, n, null, flag

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        points = [
            Point(*LAYER.split("/"), name, batch_idx, value, self.n, self.null if name == "nc1" else nan, self.flag)
            for name, value in self.script[batch_idx].items()
        ]
        publish(trainer, pl_module, points)


def judged(
    script: Script, n: int = 500, null: float = 50.0, flag: Flag = Flag.OK, action: Any = "log"
) -> tuple[CollapseGuard, PointKeeper]:
    guard, keeper = CollapseGuard(action=action), PointKeeper()
    callbacks = [Claims("neural_collapse"), guard, Planted(script, n, null, flag), keeper]
    fit(Toy(), callbacks, batches(len(script)), log_every_n_steps=1)
    return guard, keeper


def reading(nc1: float, equinorm: float = 0.1, nc3: float = 0.1, cosine: float = nan, norm: float = 0.5) -> Any:
    values = {"nc1": nc1, "nc2_equinorm": equinorm, "nc3": nc3, "classes": 10.0}
    return values | {"minority_cosine": cosine, "minority_norm": norm}


def test_neural_collapse_is_news_and_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an action was taken")

    script = [reading(2.0)] * 3 + [reading(0.005)] * 3 + [reading(1.0)] * 3 + [reading(0.005)] * 3
    with caplog.at_level(logging.INFO):
        guard, keeper = judged(script, action=[refuse, "warn", "stop"])
    assert guard.verdicts == []
    [notice] = guard.notices
    assert (notice.kind, notice.layer, notice.since, notice.step) == ("neural_collapse_reached", "head.input", 3, 4)
    assert notice.evidence == (
        "over 500 rows of 10 classes NC1 is 0.005, where no class structure would read 50 and the run began with 2; the"
        " class means' lengths vary by 10 %, and NC3 is 0.1; in classification this is no failure"
    )
    assert sum("onto one point in `head.input`. Neural collapse" in record.message for record in caplog.records) == 1
    # classes in balance have no minority that could be judged beside it
    assert caplog.records[-1].message == "`CollapseGuard`: no failure found in 1 layer over 12 points."
    values = [point.value for point in keeper.curve("guard/neural_collapse_reached")]
    assert values == [0.0] * 4 + [1.0] * 3 + [0.0] * 3 + [1.0] * 2


@pytest.mark.parametrize(
    ("script", "facts"),
    [
        ([reading(2.0)] * 3 + [reading(0.02)] * 4, {}),
        ([reading(2.0)] * 3 + [reading(0.005, equinorm=0.3)] * 4, {}),
        ([reading(2.0)] * 3 + [reading(0.005, nc3=0.3)] * 4, {}),
        ([reading(0.008)] * 8, {}),  # the data are separated so well
        ([reading(2.0)] * 3 + [reading(0.005)] * 4, {"n": 99}),
        ([reading(2.0)] * 3 + [reading(0.005)] * 4, {"null": 0.4}),  # as small as from any few rows
        ([reading(2.0)] * 3 + [reading(nan)] * 4, {}),  # all features are equal
        ([reading(2.0)] * 3 + [reading(0.005)] * 4, {"flag": Flag.NOT_CALLED}),
    ],
    ids=["above", "lengths", "weight", "from the start", "few rows", "null", "no means", "not called"],
)
def test_what_only_looks_like_neural_collapse_is_no_news(script: Script, facts: dict[str, Any]) -> None:
    guard, _ = judged(script, **facts)
    assert guard.notices == guard.verdicts == []


def test_without_a_null_enough_rows_do() -> None:
    guard, _ = judged([reading(2.0)] * 3 + [reading(0.005)] * 2, n=100, null=nan)
    assert [notice.evidence.partition(";")[0] for notice in guard.notices] == [
        "over 100 rows of 10 classes NC1 is 0.005, where the run began with 2"
    ]


def test_news_does_not_stand_in_the_way_of_a_rollback(tmp_path: Any) -> None:
    remembered = []

    class Counting(Rollback):
        def remember(self, trainer: Any, pl_module: Any, step: int, folder: str) -> None:
            remembered.append(step)

    guard = CollapseGuard(action=Counting(), dirpath=str(tmp_path))
    healthy = reading(2.0, cosine=0.1), reading(0.005, cosine=0.45)
    planted = Planted([healthy[0]] * 3 + [healthy[1]] * 3, 500, 50.0, Flag.OK)
    fit(Toy(), [Claims("neural_collapse"), guard, planted], batches(6), log_every_n_steps=1)
    assert guard.notices
    assert remembered == list(range(6))


def test_news_is_kept_in_a_checkpoint() -> None:
    guard, _ = judged([reading(2.0)] * 3 + [reading(0.005)] * 2)
    again = CollapseGuard()
    again.load_state_dict(guard.state_dict())
    assert again.notices == guard.notices != []


@pytest.mark.parametrize(
    ("ill", "evidence"),
    [
        ({"cosine": 0.95}, "a mean cosine of 0.95, where the run began with 0.20, and 0.5 times the length"),
        ({"cosine": 0.3, "norm": 0.01}, "a mean cosine of 0.30, where the run began with 0.20, and 0.01 times"),
    ],
)
def test_rare_classes_that_fold_or_vanish(ill: dict[str, float], evidence: str) -> None:
    guard, keeper = judged([reading(2.0, cosine=0.2)] * 4 + [reading(2.0, **ill)] * 3)
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer, verdict.since, verdict.step) == ("minority_collapse", "head.input", 4, 5)
    assert evidence in verdict.evidence
    assert [point.value for point in keeper.curve("guard/minority_collapse")] == [0.0] * 5 + [1.0] * 2


@pytest.mark.parametrize(
    "script",
    [
        [reading(2.0, cosine=0.95)] * 2 + [reading(2.0, cosine=0.2)] * 6,  # a fresh classifier in few dimensions
        [reading(2.0, cosine=0.65)] * 8,
        [reading(2.0, cosine=0.2), reading(2.0, cosine=0.95)] * 4,
        [reading(2.0, cosine=nan)] * 8,  # balanced
        [reading(2.0, cosine=0.2, norm=0.03)] * 8,  # of one to a million
    ],
    ids=["beginning", "below", "flicker", "balanced", "short"],
)
def test_what_only_looks_like_minority_collapse_gets_no_verdict(script: Script) -> None:
    guard, _ = judged(script)
    assert guard.verdicts == []


class Classifier(LightningModule):
    """10 -> 32 -> 16 features, and a head."""

    def __init__(self, classes: int, decay: float, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.body = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(16, classes)
        self.decay = decay

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=self.decay)


def blobs(counts: list[int], distance: float = 2.0) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    centers = distance * torch.randn(len(counts), 10, generator=generator)
    y = torch.cat([torch.full((count,), c) for c, count in enumerate(counts)])
    return TensorDataset(centers[y] + torch.randn(len(y), 10, generator=generator), y)


def trained(counts: list[int], decay: float, epochs: int = 24) -> tuple[CollapseGuard, PointKeeper, MemoryLogger]:
    data, guard, keeper = blobs(counts), CollapseGuard(action="log"), PointKeeper()
    monitor = NeuralCollapseMonitor(every_n_steps=14, loader=DataLoader(data, batch_size=256))
    train = DataLoader(data, batch_size=64, shuffle=True)
    trainer = fit(Classifier(len(counts), decay), [monitor, guard, keeper], train, max_epochs=epochs)
    return guard, keeper, trainer.logger


def test_strong_decay_and_rare_classes_collapse_the_minority() -> None:
    guard, keeper, _ = trained([200, 200, 2, 2, 2], decay=2e-2)
    assert {(verdict.kind, verdict.layer) for verdict in guard.verdicts} == {
        ("minority_collapse", "head.input"),
        ("minority_collapse", "head.input.eval"),
    }
    cosines = [point.value for point in keeper.curve(f"{LAYER}.eval/minority_cosine")]
    assert cosines[0] < 0.5 < 0.95 < cosines[-1]


@pytest.mark.parametrize(
    ("counts", "decay"),
    [([80] * 5, 2e-2), ([200, 200, 2, 2, 2], 1e-4), ([200, 200, 40, 40, 40], 2e-3)],
    ids=["balanced", "little decay", "less rare"],
)
def test_no_false_alarm(counts: list[int], decay: float) -> None:
    guard, keeper, _ = trained(counts, decay)
    assert guard.verdicts == []
    cosines = [point.value for point in keeper.curve(f"{LAYER}.eval/minority_cosine")]
    assert all(cosine < 0.5 for cosine in cosines) != all(cosine != cosine for cosine in cosines)


@pytest.mark.filterwarnings("ignore:`NeuralCollapseMonitor`. the fit ended before")  # of batches: it reads the loader
def test_a_deep_balanced_classifier_reaches_neural_collapse_and_trains_on() -> None:
    model = Classifier(5, decay=1e-2, lr=0.05)
    hidden = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    model.body = nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.ReLU(), *hidden, nn.Linear(64, 16), nn.ReLU())
    data, guard, keeper = blobs([60] * 5), CollapseGuard(action=["warn", "stop"]), PointKeeper()
    monitor = NeuralCollapseMonitor(every_n_steps=10_000, loader=DataLoader(data, batch_size=300))
    trainer = fit(model, [monitor, guard, keeper], DataLoader(data, batch_size=100, shuffle=True), max_epochs=56)
    assert [notice.kind for notice in guard.notices] == ["neural_collapse_reached"]
    assert guard.verdicts == []
    assert trainer.current_epoch == 56
    first, *_, last = keeper.curve(f"{LAYER}.eval/nc1")
    assert last.value < 0.01 < 0.1 < first.value
    assert last.null == pytest.approx((60 - 1) * 4 / (16 - 5))
