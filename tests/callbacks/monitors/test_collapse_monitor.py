"""What ``CollapseMonitor`` draws, through a real ``Trainer``."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import CollapseMonitor, register_measure
from lightning_collapse.functional import effective_rank, expected_under_isotropy, feature_std
from lightning_collapse.spectral import singular_values
from lightning_collapse.utilities.points import Flag
from lightning_collapse.utilities.registry import MEASURES
from tests.toys import QUIET, ManualToy, MemoryLogger, PointKeeper, Toy, batches, fit

ENCODER = "collapse/encoder/effective_rank"


def monitor(**kwargs):
    return CollapseMonitor(**{"layers": ["encoder"], "every_n_steps": 2, **kwargs})


@pytest.mark.parametrize(
    ("toy", "accumulate", "steps"), [(Toy, 1, [0, 1, 3, 5]), (ManualToy, 1, [0, 1, 3, 5]), (Toy, 2, [0, 1])]
)
def test_points_land_at_the_logging_steps_of_lightning(toy, accumulate, steps):
    trainer = fit(toy(), [monitor()], accumulate_grad_batches=accumulate)
    assert [step for step, _ in trainer.logger.curve(ENCODER)] == steps
    assert trainer.callback_metrics[ENCODER] == pytest.approx(trainer.logger.curve(ENCODER)[-1][1])


def test_odd_accumulation_window_at_the_end_of_an_epoch_ends_in_a_point():
    trainer = fit(Toy(), [monitor(every_n_steps=1)], batches(5), accumulate_grad_batches=2, max_epochs=2)
    assert [step for step, _ in trainer.logger.curve(ENCODER)] == [0, 1, 2, 3, 4, 5]


def test_default_cadence_is_the_trainers():
    trainer = fit(Toy(), [CollapseMonitor(layers=["encoder"])], log_every_n_steps=3)
    assert [step for step, _ in trainer.logger.curve(ENCODER)] == [0, 2, 5]


def test_values_are_those_of_the_rows_before_the_point():
    seen = []

    class Spy(Toy):
        def training_step(self, batch, batch_idx):
            features = self.encoder(batch)
            seen.append(features.detach().clone())
            return self.head(features).pow(2).mean()

    trainer = fit(Spy(), [monitor(rows=64, every_n_steps=6)])
    rows = torch.cat(seen[-2:])
    [_, (_, value)], [_, (_, n)] = trainer.logger.curve(ENCODER), trainer.logger.curve("collapse/encoder/n")
    assert n == 64
    assert value == pytest.approx(effective_rank(singular_values(rows.double())).item(), rel=1e-6)
    [_, (_, std)] = trainer.logger.curve("collapse/encoder/feature_std")
    assert std == pytest.approx(feature_std(rows).item(), rel=1e-5)


def test_points_tell_n_null_and_flag():
    keeper = PointKeeper()
    fit(Toy(), [monitor(rows=64), keeper])
    [first, point, *_] = keeper.curve(ENCODER)
    assert (first.step, first.n, first.flag) == (0, 32, Flag.OK)
    assert (point.step, point.n, point.flag) == (1, 64, Flag.OK)
    assert point.null == pytest.approx(expected_under_isotropy("effective_rank", 64, 8))
    assert len(keeper.curve(ENCODER)) == 4


def test_default_layers_work_without_an_argument():
    trainer = fit(Toy(), [CollapseMonitor()], log_every_n_steps=2)
    layers = {key.split("/")[1] for _, row in trainer.logger.rows for key in row}
    assert layers == {"encoder.0", "encoder.2", "head", "head.input"}


def test_input_of_a_layer():
    trainer = fit(Toy(), [monitor(layers=["encoder", "head:input"])])
    assert trainer.logger.curve("collapse/head.input/effective_rank") == trainer.logger.curve(ENCODER)


def test_every_call_of_a_siamese_encoder_counts():
    class Siamese(Toy):
        def training_step(self, batch, batch_idx):
            return (self.encoder(batch) - self.encoder(-batch)).pow(2).mean() + self.head(self.encoder(batch)).mean()

    trainer = fit(Siamese(), [monitor(every_n_steps=6, rows=96)])
    assert [n for _, n in trainer.logger.curve("collapse/encoder/n")] == [96, 96]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_in_backward_is_not_a_call(reentrant):
    class Checkpointed(Toy):
        def training_step(self, batch, batch_idx):
            features = torch.utils.checkpoint.checkpoint(self.encoder, batch.requires_grad_(), use_reentrant=reentrant)
            return self.head(features).pow(2).mean()

    plain = fit(Toy(), [monitor(every_n_steps=1, rows=1000)])
    torch.manual_seed(0)
    again = fit(Checkpointed(), [monitor(every_n_steps=1, rows=1000)])
    assert [n for _, n in again.logger.curve("collapse/encoder/n")] == [32] * 6
    assert [n for _, n in plain.logger.curve("collapse/encoder/n")] == [32] * 6


def test_operation_in_place_after_the_layer_does_not_change_the_rows():
    class InPlace(Toy):
        def training_step(self, batch, batch_idx):
            return self.head(self.encoder(batch).mul(1.0).zero_() + self.encoder(batch).mul_(0)).pow(2).mean()

    trainer = fit(InPlace(), [monitor(every_n_steps=1)])
    assert all(value > 0.01 for _, value in trainer.logger.curve("collapse/encoder/feature_std"))


def test_padding_does_not_count():
    class Tokens(Toy):
        def training_step(self, batch, batch_idx):
            return self.head(self.encoder(batch["x"])).pow(2).mean()

    x = torch.randn(32, 5, 16)
    mask = torch.ones(32, 5).long()
    mask[:, 3:] = 0
    loader = DataLoader([{"x": a, "attention_mask": b} for a, b in zip(x, mask, strict=True)], batch_size=32)
    trainer = fit(Tokens(), [monitor(every_n_steps=1, rows=1000)], loader)
    assert trainer.logger.curve("collapse/encoder/n") == [(0, 96.0)]
    assert trainer.callback_metrics["collapse/encoder/nonfinite_fraction"] == 0


def test_window_holds_four_rows_per_feature_where_the_budget_allows():
    trainer = fit(Toy(), [monitor(every_n_steps=6, layers=["encoder.0"], max_overhead=1e9)])
    assert trainer.logger.curve("collapse/encoder.0/n") == [(0, 32.0), (5, 128.0)]


def test_validation_curves_on_request():
    logger = MemoryLogger()
    trainer = Trainer(**{**QUIET, "limit_val_batches": None, "logger": logger, "callbacks": [monitor(validation=True)]})
    trainer.fit(Toy(), batches(), batches(3, seed=2))
    [(step, value)] = logger.curve("val/collapse/encoder/effective_rank")
    assert step == 5
    assert 1 < value <= 8
    assert [step for step, _ in logger.curve(ENCODER)] == [0, 1, 3, 5]
    assert "val/collapse/encoder/n" in trainer.callback_metrics


def test_validation_may_keep_more_rows_of_a_batch_than_training():
    # training spreads its rows over two batches; validation has one, which holds them all
    logger, callback = MemoryLogger(), monitor(validation=True, rows=24)
    trainer = Trainer(**{**QUIET, "limit_val_batches": None, "logger": logger, "callbacks": [callback]})
    trainer.fit(Toy(), batches(8, size=16), batches(1, size=64, seed=2))
    assert logger.curve("collapse/encoder/n")[-1][1] == 24
    assert logger.curve("val/collapse/encoder/n")[-1][1] == 24


def test_stand_alone_validation_test_and_predict_draw_nothing():
    callback = monitor(validation=True)
    trainer = fit(Toy(), [callback])
    drawn = len(trainer.logger.rows)
    model = trainer.lightning_module
    trainer.limit_val_batches = 2
    for run in (trainer.validate, trainer.test):
        run(model, batches(), verbose=False)
    trainer.predict(model, batches())
    assert len(trainer.logger.rows) == drawn
    assert not any(module._forward_hooks for module in model.modules())


class Folding(Toy):
    """From the third epoch on all rows of the encoder lie on one line."""

    def on_train_epoch_start(self):
        if self.current_epoch == 2:
            with torch.no_grad():
                last = self.encoder[2]
                last.weight[1:] = last.weight[:1].clone()


@pytest.mark.parametrize(("module", "epochs"), [(Toy, 5), (Folding, 3)])
def test_early_stopping_ends_a_collapsing_run_and_no_healthy_one_and_the_checkpoint_is_of_before(
    module, epochs, tmp_path
):
    settings = {"monitor": ENCODER, "mode": "max"}
    stop = EarlyStopping(
        **settings, divergence_threshold=2.0, patience=1000, strict=False, check_on_train_epoch_end=True
    )
    best = ModelCheckpoint(tmp_path, filename="{epoch}", **settings, save_on_train_epoch_end=True)
    trainer = fit(module(), [monitor(), stop, best], max_epochs=5, enable_checkpointing=True)
    assert trainer.current_epoch == epochs
    assert best.best_model_score >= trainer.callback_metrics[ENCODER]
    assert module is Toy or best.best_model_path.endswith(("epoch=0.ckpt", "epoch=1.ckpt"))


def test_hooks_are_gone_after_the_fit_and_after_a_failure():
    for model, raises in ((Toy(), False), (Toy(fail_at=3), True)):
        callback = monitor(validation=True)
        if raises:
            with pytest.raises(ValueError, match="boom"):
                fit(model, [callback])
        else:
            fit(model, [callback])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_callback_can_watch_one_model_after_another():
    class Wide(Toy):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 24))
            self.head = nn.Linear(24, 2)

    callback, keeper = monitor(rows=32), PointKeeper()
    fit(Toy(), [callback, keeper])
    fit(Wide(), [callback, keeper])
    assert [point.flag for point in keeper.curve(ENCODER)] == [Flag.OK] * 8


def test_two_monitors_of_one_trainer():
    trainer = fit(Toy(), [monitor(), monitor(layers=["head"], every_n_steps=3)])
    assert [step for step, _ in trainer.logger.curve("collapse/head/effective_rank")] == [0, 2, 5]
    assert [step for step, _ in trainer.logger.curve(ENCODER)] == [0, 1, 3, 5]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # it is the point
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_continues_its_curves(tmp_path, accumulate):
    # Lightning starts the loader of a half-done epoch anew, so every batch must be the same
    loader = DataLoader(torch.randn(32, 16).repeat(6, 1), batch_size=32)

    def run(**kwargs):
        torch.manual_seed(0)
        keeper = PointKeeper()
        save = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        fit(Toy(), [monitor(every_n_steps=3, rows=64), keeper, save], loader, enable_checkpointing=True, **kwargs)
        return keeper.curve(ENCODER)

    whole = run(max_epochs=3, accumulate_grad_batches=accumulate)
    assert len(whole) == 6 // accumulate + 1
    keeper, save = (
        PointKeeper(),
        ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="again-{step}"),
    )
    again = Trainer(
        **{
            **QUIET,
            "max_epochs": 3,
            "logger": MemoryLogger(),
            "accumulate_grad_batches": accumulate,
            "callbacks": [monitor(every_n_steps=3, rows=64), keeper, save],
            "enable_checkpointing": True,
        }
    )
    # step 5 lies inside the window before the point of step index 5
    again.fit(Toy(), loader, ckpt_path=str(tmp_path / "step=5.ckpt"))
    rest = keeper.curve(ENCODER)
    assert rest
    assert rest == whole[-len(rest) :]


def test_state_is_small_and_loads_with_weights_only(tmp_path):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="last")
    fit(Toy(), [monitor(), save], enable_checkpointing=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("collapse" in key for key in state["state_dict"])
    assert any("CollapseMonitor" in key for key in state["callbacks"])


def test_bad_numbers_are_counted_and_left_out():
    class Holes(Toy):
        def training_step(self, batch, batch_idx):
            batch = batch.clone()
            batch[:8] = torch.inf
            return self.head(self.encoder(batch))[8:].pow(2).mean()

    keeper = PointKeeper()
    # the hole reaches the weights with the first update
    trainer = fit(Holes(), [monitor(every_n_steps=1, rows=32), keeper])
    assert trainer.logger.curve("collapse/encoder/nonfinite_fraction")[0] == (0, 0.25)
    point, *_, last = keeper.curve(ENCODER)
    assert last.flag == Flag.FEW_ROWS
    assert point.n == 24
    assert point.flag == Flag.NONFINITE
    assert 1 < point.value <= 8


@pytest.mark.parametrize(("fill", "flag"), [(0.0, Flag.CONSTANT), (3.7, Flag.CONSTANT), (math.nan, Flag.FEW_ROWS)])
def test_degenerate_features_are_flagged(fill, flag):
    class Constant(Toy):
        def training_step(self, batch, batch_idx):
            return self.head(self.encoder(torch.full_like(batch, fill))).pow(2).mean()

    keeper = PointKeeper()
    trainer = fit(Constant(), [monitor(every_n_steps=6, rows=32, measures="all"), keeper])
    assert {point.flag for point in keeper.points} == {flag}
    assert trainer.logger.curve("collapse/encoder/flag") == [(0, float(flag)), (5, float(flag))]
    [_, point] = keeper.curve(ENCODER)
    assert point.value == 0 if flag == Flag.CONSTANT else math.isnan(point.value)


def test_batch_of_one_row():
    keeper = PointKeeper()
    fit(Toy(), [monitor(every_n_steps=1), keeper], batches(2, size=1))
    assert [point.flag for point in keeper.curve(ENCODER)] == [Flag.FEW_ROWS] * 2


def test_layer_that_never_runs_is_flagged_with_one_warning():
    class Idle(Toy):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(3, 3)

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="`idle` did not run before every point") as caught:
        fit(Idle(), [monitor(layers=["encoder", "idle"]), keeper])
    assert len([w for w in caught if "did not run" in str(w.message)]) == 1
    assert [point.flag for point in keeper.curve("collapse/idle/effective_rank")] == [Flag.NOT_CALLED] * 4
    assert [point.flag for point in keeper.curve(ENCODER)] == [Flag.OK] * 4


def test_layer_that_runs_later():
    class Late(Toy):
        def training_step(self, batch, batch_idx):
            features = self.encoder(batch)
            return self.head(features).pow(2).mean() if batch_idx > 2 else features.pow(2).mean()

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="`head` did not run"):
        fit(Late(), [monitor(layers=["head"]), keeper])
    flags = [point.flag for point in keeper.curve("collapse/head/effective_rank")]
    assert flags == [Flag.NOT_CALLED, Flag.NOT_CALLED, Flag.OK, Flag.OK]


def test_tuple_integer_and_odd_outputs():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x):
            return torch.arange(3), {"hidden": self.linear(x)}, None

    class Argmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return x.argmax(dim=1)

    class Module(Toy):
        def __init__(self):
            super().__init__()
            self.odd, self.classes, self.lstm = Odd(), Argmax(), nn.LSTM(8, 8, batch_first=True)

        def training_step(self, batch, batch_idx):
            features = self.odd(batch)[1]["hidden"]
            self.classes(features)
            return self.head(self.lstm(features.unsqueeze(1))[0]).pow(2).mean()

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="reading layer `classes` failed with NoFeaturesError"):
        fit(Module(), [monitor(layers=["odd", "classes", "lstm"]), keeper])
    assert {point.flag for point in keeper.curve("collapse/odd/effective_rank")} == {Flag.OK}
    assert {point.flag for point in keeper.curve("collapse/lstm/effective_rank")} == {Flag.OK}


def test_wide_layer_is_sketched():
    keeper = PointKeeper()
    fit(Toy(), [monitor(layers=["encoder.0"], max_dim=8, rows=64, measures="all"), keeper])
    points = {point.key.split("/")[-1]: point for point in keeper.points}
    assert points["flag"].value == Flag.SKETCHED
    assert 1 <= points["effective_rank"].value <= 8
    assert math.isnan(points["rankme"].value)
    assert points["participation_ratio"].value > 1


def test_failing_measure_of_the_users_own_reads_nan():
    @register_measure
    def broken(singular_values):
        raise RuntimeError("oops")

    try:
        with pytest.warns(UserWarning, match="`broken` failed and reads NaN: oops"):
            trainer = fit(Toy(), [monitor(measures=["broken", "effective_rank"])])
    finally:
        del MEASURES["broken"]
    assert all(math.isnan(value) for _, value in trainer.logger.curve("collapse/encoder/broken"))
    assert len(trainer.logger.curve(ENCODER)) == 4


def test_fit_shorter_than_the_cadence_says_so():
    with pytest.warns(UserWarning, match="ended before the first point, due after 50 steps"):
        fit(Toy(), [CollapseMonitor(layers=["encoder"], every_n_steps=50)])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1.*got 0"),
        ({"measures": ["speed"]}, "Unknown measure 'speed'. Choose from: alignment"),
        ({"measures": ["alignment"]}, "compares two views"),
        ({"measures": []}, "`measures` takes a list"),
        ({"measures": "effective_rank"}, "`measures` takes a list of names or 'all', got 'effective_rank'"),
        ({"layers": "encoder"}, "`layers` takes a list"),
        ({"layers": []}, "`layers` is empty"),
        ({"rows": 1}, "`rows` must be at least 2"),
        ({"max_overhead": 0}, "`max_overhead` is a share"),
        ({"max_dim": 1}, "`max_dim` must be at least 2"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        CollapseMonitor(**arguments)


def test_pattern_without_a_match_lists_what_there_is():
    match = r"'nope\*' matches no submodule of Toy. It has: encoder, encoder.0, encoder.1, encoder.2, head"
    with pytest.raises(MisconfigurationException, match=match):
        fit(Toy(), [monitor(layers=["encoder", "nope*"])])
