"""``import pytorch_lightning as pl``: the same classes under another name, with which everything works as well."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_collapse as lc
import lightning_collapse.reporting
import lightning_collapse.utilities
from lightning_collapse.losses import VarianceLoss
from lightning_collapse.penalties import EWC
from lightning_collapse.reporting import log_image
from lightning_collapse.utilities.trainer import tensorboard_writer
from lightning_collapse.utilities.twin_packages import is_kind
from tests.toys import Claims, MemoryLogger, PointKeeper, weights

pl = pytest.importorskip("pytorch_lightning")
import lightning.pytorch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")


def module(package: Any, *mixins: type) -> Any:
    class Lit(*mixins, package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            regularizers = lc.AntiCollapseMixin in mixins
            return loss + self.anti_collapse_loss(self.encoder(batch[0])) if regularizers else loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Lit()


def loader() -> Any:
    generator = torch.Generator().manual_seed(0)
    rows, labels = torch.randn(192, 16, generator=generator), torch.randint(3, (192,), generator=generator)
    return DataLoader(TensorDataset(rows, labels), batch_size=32)


def make_trainer(package: Any, callbacks: list[Any], **kwargs: Any) -> Any:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 2, "logger": False, **quiet, **kwargs}
    return package.Trainer(callbacks=callbacks, **settings)


def watchers() -> list[Any]:
    regularizer = lc.Regularizer(VarianceLoss(), "encoder")
    guard = lc.CollapseGuard(action=["warn", "log", lc.Rollback(), lc.SwitchOn("variance", ramp=2)])
    monitors = [lc.CollapseMonitor(), lc.NeuralCollapseMonitor(), lc.PlasticityMonitor(), lc.SpectralAlignmentMonitor()]
    return [*monitors, regularizer, lc.WeightPenalty(EWC(weight=1.0)), lc.Distillation(), guard, PointKeeper()]


def test_same_points_and_weights_under_both(tmp_path: Path) -> None:
    ends, points, tasks = [], [], []
    for package in (pl, lightning.pytorch):
        model, callbacks = module(package), watchers()
        trainer = make_trainer(package, callbacks, default_root_dir=tmp_path)
        trainer.fit(model, loader())
        ends.append(weights(model))
        points.append([(point.key, point.step, point.value) for point in callbacks[-1].points])
        tasks.append(callbacks[-2].task)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert [key for key, *_ in points[0]] == [key for key, *_ in points[1]]
    np.testing.assert_array_equal([value for *_, value in points[0]], [value for *_, value in points[1]])
    assert {key.partition("/")[0] for key, *_ in points[0]} >= {"collapse", "neural_collapse", "plasticity", "guard"}
    assert tasks[0] == tasks[1]
    assert tasks[0].name == "classification"


def test_pictures_text_and_curves_reach_its_loggers(tmp_path: Path) -> None:
    board = pl.loggers.TensorBoardLogger(tmp_path, name="board")
    table = pl.loggers.CSVLogger(tmp_path, name="table")
    assert tensorboard_writer(board) is not None
    make_trainer(pl, [lc.CollapseMonitor()], logger=[board, table]).fit(module(pl), loader())
    found = EventAccumulator(board.log_dir).Reload().Tags()
    assert "collapse/effective_rank" in found["images"]
    assert "collapse/encoder.0/effective_rank" in found["scalars"]
    assert found["tensors"]
    assert list(Path(table.log_dir).glob("figures/collapse/effective_rank/*.png"))
    assert (Path(table.log_dir) / "texts.md").exists()


def test_a_handler_for_one_of_its_loggers_is_used() -> None:
    class Mine(pl.loggers.CSVLogger):
        pass

    class Yours(pl.loggers.logger.DummyLogger):
        pass

    seen = []

    @log_image.register
    def _(logger: Mine, name: str, image: Any, step: int) -> None:
        seen.append(name)

    picture = np.zeros((1, 1, 3), dtype=np.uint8)
    log_image(Mine("unused"), "mine", picture, 0)
    log_image(Yours(), "yours", picture, 0)  # has none
    assert seen == ["mine"]


@pytest.mark.parametrize("action", ["stop", "checkpoint"])
def test_guard_acts(action: str, tmp_path: Path) -> None:
    guard = lc.CollapseGuard(action=action, dirpath=str(tmp_path), rules=["non_finite"], patience=1)

    class Plant(Claims):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            point = lc.utilities.Point("collapse", "encoder", "nonfinite_fraction", step, 1.0)
            lc.reporting.publish(trainer, pl_module, [point])

    trainer = make_trainer(pl, [Plant(), guard])
    trainer.fit(module(pl), loader())
    assert [verdict.kind for verdict in guard.verdicts] == ["non_finite"]
    assert (trainer.global_step < 6) == (action == "stop")
    assert len(list(tmp_path.glob("non_finite*.ckpt"))) == (action == "checkpoint")


def test_mixins() -> None:
    regularized = module(pl, lc.AntiCollapseMixin)
    regularized.set_regularizers({"variance": VarianceLoss()})
    first = make_trainer(pl, [])
    first.fit(regularized, loader())
    assert "regularizer/variance/value" in first.callback_metrics
    second = make_trainer(pl, [])
    second.fit(module(pl, lc.EWCMixin), loader())
    assert "penalty/ewc/value" in second.callback_metrics
    with pytest.raises(TypeError, match="the mixin goes first"):
        type("Lit", (pl.LightningModule, lc.AntiCollapseMixin), {})


def test_tasks_one_after_another(tmp_path: Path) -> None:
    metrics, logger = lc.ContinualMetrics([loader(), loader()]), MemoryLogger()

    def make() -> Any:
        return make_trainer(pl, [metrics, lc.Distillation()], logger=logger, default_root_dir=tmp_path)

    lc.fit_tasks(make, module(pl), [loader(), loader()])
    assert metrics.table().count("task1") == 2


def test_classes_of_both_are_one_kind() -> None:
    for package in (pl, lightning.pytorch):
        trainer = package.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        assert is_kind(trainer, lightning.pytorch.Trainer)
        assert is_kind(trainer, pl.Trainer)
        assert not is_kind(trainer, lightning.pytorch.LightningModule)
