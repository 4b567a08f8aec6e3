"""The rows behind a point: whose they are, of how many batches, and of which layers."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import (
    CollapseMonitor,
    GeometryPhaseMonitor,
    IntrinsicDimensionMonitor,
    NeuralCollapseMonitor,
    PlasticityMonitor,
    SpectralAlignmentMonitor,
)
from lightning_collapse.utilities.registry import CURVES, MONITORS
from tests.toys import QUIET, PointKeeper, Toy, batches, fit

N = "collapse/encoder/n"


def test_a_point_that_falls_on_a_short_batch_rests_on_those_before_it_too():
    keeper = PointKeeper()
    loader = DataLoader(torch.randn(2 * 81 + 5, 16), batch_size=81)
    fit(Toy(), [CollapseMonitor(["encoder"], every_n_steps=1, rows=81), keeper], loader, max_epochs=2)
    assert [point.n for point in keeper.curve(N)] == [81] * 6
    ranks = [point.value for point in keeper.curve("collapse/encoder/effective_rank")]
    assert min(ranks) > 0.8 * max(ranks)


def test_so_do_sums_over_rows():
    class Classifier(Toy):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.head(self.encoder(batch[0])), batch[1])

    keeper = PointKeeper()
    data = [(torch.randn(n, 16), torch.arange(n) % 2) for n in (64, 64, 3)]
    monitor = NeuralCollapseMonitor(every_n_steps=1, rows=64)
    fit(Classifier(), [monitor, keeper], DataLoader(data, batch_size=None), max_epochs=2)
    assert [point.n for point in keeper.curve("neural_collapse/head.input/nc1")] == [64, 64, 67] * 2


def test_rows_of_long_ago_do_not_stand_in_for_a_layer_that_rests():
    class Resting(Toy):
        def training_step(self, batch, batch_idx):
            features = self.encoder(batch)
            return self.head(features).pow(2).mean() if batch_idx < 2 else features.pow(2).mean()

    keeper = PointKeeper()
    monitor = CollapseMonitor(["head"], every_n_steps=2, rows=32)
    with_warning = DataLoader(torch.randn(6 * 32, 16), batch_size=32)
    with pytest.warns(UserWarning, match="did not run before every point"):
        fit(Resting(), [monitor, keeper], with_warning)
    assert [point.n for point in keeper.curve("collapse/head/n")] == [32, 32, 0, 0]


def test_passes_of_other_callbacks_are_no_training_rows():
    class Probe(Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            pl_module.encoder(torch.zeros(50, 16))

        on_train_batch_end = on_before_zero_grad = on_train_batch_start

    def read(*callbacks):
        torch.manual_seed(0)
        keeper = PointKeeper()
        fit(Toy(), [*callbacks, CollapseMonitor(["encoder"], every_n_steps=1, rows=32), keeper])
        return [(point.key, point.step, point.value) for point in keeper.points]

    assert repr(read(Probe())) == repr(read())


class Backwards(Toy):
    """Registers its layers in the other order than it runs them."""

    def __init__(self):
        super().__init__()
        encoder, head = self.encoder, self.head
        del self.encoder, self.head
        self.head, self.act, self.encoder = head, nn.Tanh(), nn.Sequential(*encoder)

    def training_step(self, batch, batch_idx):
        return self.act(self.head(self.encoder(batch))).pow(2).mean()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # it is the point
def test_default_layers_follow_the_first_batch(tmp_path):
    loader = DataLoader(torch.randn(32, 16).repeat(6, 1), batch_size=32)

    def watched(**kwargs):
        torch.manual_seed(0)
        keeper, save = PointKeeper(), ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        monitors = [CollapseMonitor(every_n_steps=2), IntrinsicDimensionMonitor(every_n_steps=2, rows=32, k=5)]
        callbacks = [*monitors, PlasticityMonitor(every_n_steps=2), keeper, save]
        model = Backwards()
        if ckpt_path := kwargs.pop("ckpt_path", None):
            Trainer(**{**QUIET, "enable_checkpointing": True, "logger": False, "callbacks": callbacks}).fit(
                model, loader, ckpt_path=ckpt_path
            )
        else:
            fit(model, callbacks, loader, enable_checkpointing=True)
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
        return keeper.points

    points = watched()
    for family in ("collapse", "intrinsic_dimension"):
        later = {point.layer for point in points if point.family == family and point.step > 0}
        assert "head.input" in later
        assert "encoder.2.input" not in later
    rest = watched(ckpt_path=str(tmp_path / "step=3.ckpt"))
    assert {(p.key, p.step): repr(p.value) for p in rest} == {
        (p.key, p.step): repr(p.value) for p in points if p.step > 2
    }


def test_hooks_are_off_while_the_model_is_validated():
    """Torch has a faster way through a transformer without hooks, which rounds otherwise."""

    class Seen(Toy):
        hooks = 0

        def validation_step(self, batch, batch_idx):
            self.hooks += sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in self.modules())
            return super().validation_step(batch, batch_idx)

    keeper, model = PointKeeper(), Seen()
    options = {**QUIET, "limit_val_batches": None, "num_sanity_val_steps": 2, "max_epochs": 2, "logger": False}
    monitors = [CollapseMonitor(every_n_steps=1), SpectralAlignmentMonitor(every_n_steps=1)]
    trainer = Trainer(**options, callbacks=[*monitors, keeper])
    trainer.fit(model, batches(), batches(3))
    assert model.hooks == 0
    assert [point.n for point in keeper.curve("spectral_alignment/head/sign_diversity")] == [32] * 12
    assert len(keeper.curve("collapse/head/n")) == 12


def test_a_monitor_of_the_users_may_have_the_name_of_one_of_ours():
    class CollapseMonitor(GeometryPhaseMonitor):
        family = "mine"

    try:
        assert MONITORS["CollapseMonitor"].__module__.startswith("lightning_collapse.")
    finally:
        for name in [name for name, curve in CURVES.items() if curve.family == "mine"]:
            del CURVES[name]  # or they stand in the tables that other tests read


def test_names_that_no_logger_knows_stay_apart_and_are_explained(tmp_path):
    class Foreign(Toy):
        def __init__(self):
            super().__init__()
            self.add_module("\u7f16\u7801", nn.Linear(16, 8))
            self.add_module("\u89e3\u7801", nn.Linear(8, 8))

        def training_step(self, batch, batch_idx):
            return self.get_submodule("\u89e3\u7801")(self.get_submodule("\u7f16\u7801")(batch)).pow(2).mean()

    keeper, logger = PointKeeper(), CSVLogger(tmp_path)
    names = ["\u7f16\u7801", "\u89e3\u7801"]
    fit(Foreign(), [CollapseMonitor(names, every_n_steps=2), keeper], logger=logger)
    layers = {point.layer for point in keeper.points}
    assert len(layers) == 2
    assert all(point.key.isascii() for point in keeper.points)
    text = (Path(logger.log_dir) / "texts.md").read_text(encoding="utf-8")
    assert all(f"`{layer}` is `{name}`" in text for layer, name in zip(sorted(layers), names, strict=True))
