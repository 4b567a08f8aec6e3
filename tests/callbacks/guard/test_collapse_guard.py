"""Verdicts on planted curves and on planted failures, and what the guard then does."""

import logging

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_collapse import CollapseGuard, CollapseMonitor
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.points import Flag, Point
from tests.toys import HEALTHY, Claims, PointKeeper, Toy, batches, fit, weights


class Planted(Callback):
    """Publishes the readings of a script, one point per step, instead of a monitor's."""

    def __init__(self, script, flag=Flag.OK, null=60.0):
        self.script, self.flag, self.null = script, flag, null

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = {**HEALTHY, **self.script[batch_idx]}
        points = [Point("collapse", "z", name, batch_idx, v, 64, self.null, self.flag) for name, v in values.items()]
        publish(trainer, pl_module, points)


class Still(Toy):
    """A loss that does not fall."""

    def training_step(self, batch, batch_idx):
        return 0 * super().training_step(batch, batch_idx) + 1


def judged(script, guard=None, **kwargs):
    guard = guard or CollapseGuard(action="log")
    keeper = PointKeeper()
    monitor = Claims()
    callbacks = [monitor, guard, Planted(script, **kwargs), keeper]
    trainer = fit(Still(), callbacks, batches(len(script)), log_every_n_steps=1)
    return guard, keeper, trainer


LOW = {"effective_rank": 1.02, "eigenvalue_effective_rank": 1.0}
STILL = {"feature_std": 0.002}


def test_healthy_curves_get_no_verdict():
    guard, keeper, _ = judged([{}] * 12)
    assert guard.verdicts == []
    assert {point.value for point in keeper.curve("guard/complete_collapse")} == {0.0}


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (LOW, "dimensional_collapse"),
        ({"effective_rank": 8.0, "eigenvalue_effective_rank": 1.15}, "dimensional_collapse"),
        (STILL, "complete_collapse"),
        ({"relative_spread": 0.001}, "complete_collapse"),
        ({"relative_spread": 0.09}, "complete_collapse"),
        ({"direction_spread": 0.001}, "complete_collapse"),  # lengths vary, directions do not
        ({"direction_spread": 0.09}, "complete_collapse"),
        ({"direction_spread": 0.09, "eigenvalue_effective_rank": 1.2}, "dimensional_collapse"),  # a ray
        ({"direction_spread": 0.09, "eigenvalue_effective_rank": 1.2, "relative_spread": 0.2}, "complete_collapse"),
    ],
)
def test_collapse_is_named_with_its_first_step(bad, kind):
    guard, keeper, _ = judged([{}] * 8 + [bad] * 4)
    [verdict] = guard.verdicts
    assert (verdict.kind, verdict.layer, verdict.since, verdict.step) == (kind, "z", 8, 9)
    assert "64 rows" in verdict.evidence
    assert [point.value for point in keeper.curve(f"guard/{kind}")] == [0.0] * 9 + [1.0] * 3


def test_a_layer_that_began_near_one_direction_has_little_to_lose():
    natural = {"effective_rank": 2.5, "eigenvalue_effective_rank": 1.4}
    near = {"effective_rank": 1.9, "eigenvalue_effective_rank": 1.2}
    assert judged([natural] * 4 + [near] * 4)[0].verdicts == []
    assert [v.kind for v in judged([{}] * 4 + [near] * 4)[0].verdicts] == ["dimensional_collapse"]
    assert [v.kind for v in judged([natural] * 4 + [LOW] * 4)[0].verdicts] == ["dimensional_collapse"]


def test_collapse_before_the_first_point_is_seen_too():
    guard, _, _ = judged([LOW] * 10)  # from the eighth point on a loss that does not fall tells
    assert [(verdict.kind, verdict.since, verdict.step) for verdict in guard.verdicts] == [
        ("dimensional_collapse", 7, 8)
    ]


@pytest.mark.parametrize(
    "script",
    [
        [{}] * 4 + [LOW, {}] * 4,  # single points
        [{}] * 4 + [{"eigenvalue_effective_rank": 1.01}] * 5,  # one loud direction beside many
        [{}] * 4 + [{"effective_rank": 1.5}] * 5,
        [{}] * 4 + [{"effective_rank": 10.0, "eigenvalue_effective_rank": 1.1}] * 5,
        [{}] * 4 + [{"effective_rank": 3.0, "eigenvalue_effective_rank": 1.3}] * 5,  # a tenth of 12 is 1.2
        [{}] * 4 + [{"feature_std": 0.1}] * 5,  # shrinks, but not to nothing
        [{}] * 4 + [{"relative_spread": 0.12, "direction_spread": 0.12}] * 5,  # a large mean, as after a ReLU
        [{"relative_spread": 0.3, "direction_spread": 0.3}] * 4 + [{"relative_spread": 0.09}] * 5,  # large before too
        [{"eigenvalue_effective_rank": 1.01, "effective_rank": 9.0}] * 8,  # a healthy binary classifier
    ],
)
def test_what_only_looks_like_a_collapse_gets_no_verdict(script):
    guard, _, _ = judged(script)
    assert guard.verdicts == []


@pytest.mark.parametrize("other", [{"relative_spread": 0.2}, {"eigenvalue_effective_rank": 1.4}])
def test_what_trembles_about_a_ray_is_found_all_the_same(other):
    ray = {"direction_spread": 0.02, "eigenvalue_effective_rank": 1.1, "effective_rank": 20.0}
    guard, _, _ = judged([{}] * 8 + [ray, {**ray, **other}] * 3)
    assert [verdict.kind for verdict in guard.verdicts] == ["dimensional_collapse"]
    assert guard.verdicts[0].also == ("complete collapse in `z`",)


def test_a_hundredth_is_a_collapse_wherever_the_run_began():
    guard, _, _ = judged([{"relative_spread": 0.02}] * 8 + [{"relative_spread": 0.008}] * 3)
    assert [(verdict.kind, verdict.since) for verdict in guard.verdicts] == [("complete_collapse", 8)]
    guard, _, _ = judged([{"relative_spread": 0.0009}] * 3)  # a thousandth tells at once
    assert [(verdict.kind, verdict.since) for verdict in guard.verdicts] == [("complete_collapse", 0)]


def test_a_narrow_layer_on_a_ray_has_collapsed():
    ray = {"direction_spread": 0.02, "eigenvalue_effective_rank": 1.1}
    assert [v.kind for v in judged([{}] * 8 + [ray] * 3, null=3.0)[0].verdicts] == ["complete_collapse"]


def test_directions_are_judged_where_they_are_drawn():
    class Without(Planted):
        def __init__(self, script):
            super().__init__(script)
            self.script = [{**HEALTHY, **values} for values in script]
            for values in self.script:
                del values["direction_spread"]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            points = [Point("collapse", "z", k, batch_idx, v, 64, 60.0) for k, v in self.script[batch_idx].items()]
            publish(trainer, pl_module, points)

    guard = CollapseGuard(action="log")
    monitor = Claims(curves=["feature_std", "relative_spread"])
    script = [{}] * 8 + [{"relative_spread": 0.05}] * 4
    fit(Still(), [monitor, guard, Without(script)], batches(len(script)), log_every_n_steps=1)
    assert [verdict.kind for verdict in guard.verdicts] == ["complete_collapse"]
    assert "directions" not in guard.verdicts[0].evidence


def test_directions_that_were_unknown_at_first_are_compared_with_their_own_beginning():
    unknown, narrow = {"direction_spread": float("nan")}, {"direction_spread": 0.09}
    assert judged([unknown] * 2 + [narrow] * 8)[0].verdicts == []


def test_a_single_feature_has_no_direction():
    script = [{}] * 4 + [{"direction_spread": 0.0, "relative_spread": 0.05}] * 4
    assert judged(script)[0].verdicts
    assert judged(script, null=float("nan"))[0].verdicts == []


def test_narrow_layers_are_not_judged_by_rank():
    guard, _, _ = judged([LOW] * 6, null=2.0)
    assert guard.verdicts == []


@pytest.mark.parametrize("flag", [Flag.NOT_CALLED, Flag.FEW_ROWS, Flag.SOLVER])
def test_points_without_a_reading_change_nothing(flag):
    guard, _, _ = judged([{}] * 3 + [LOW] * 5, flag=flag)
    assert guard.verdicts == []


def test_hysteresis_and_recovery():
    between = {"effective_rank": 12.0, "eigenvalue_effective_rank": 1.8}  # above the line, below twice the line
    guard, keeper, _ = judged([{}] * 3 + [LOW] * 3 + [between] * 3 + [LOW] * 2 + [{}] * 3 + [LOW] * 3)
    assert [verdict.since for verdict in guard.verdicts] == [3, 14]
    curve = [point.value for point in keeper.curve("guard/dimensional_collapse")]
    assert curve == [0.0] * 4 + [1.0] * 8 + [0.0] * 3 + [1.0] * 2


def test_constant_features_are_complete_collapse_alone():
    guard, _, _ = judged([{"effective_rank": 0.0, "eigenvalue_effective_rank": 0.0}] * 3, flag=Flag.CONSTANT)
    assert [verdict.kind for verdict in guard.verdicts] == ["complete_collapse"]


class Shrinking(Toy):
    """Loses all spread but one direction's, step by step."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(16, 32)
        self.head = nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.encoder.weight[1:] *= 0.1
        return self.head(self.encoder(batch)).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_from_a_model_to_a_verdict():
    guard = CollapseGuard(action=["log"])
    fit(Shrinking(), [CollapseMonitor(["encoder"], every_n_steps=1), guard], batches(10))
    assert {verdict.kind for verdict in guard.verdicts} == {"dimensional_collapse"}
    assert {verdict.layer for verdict in guard.verdicts} == {"encoder"}


def test_actions(tmp_path, caplog):
    called = []
    guard = CollapseGuard(
        action=["warn", "log", "checkpoint", lambda trainer, module, verdict: called.append(verdict), "stop"],
        dirpath=str(tmp_path / "saved"),
    )
    logger = TensorBoardLogger(tmp_path)
    monitor = Claims()
    planted = Planted([{}] * 3 + [LOW] * 9)
    trainer = fit(Toy(), [monitor, guard, planted], batches(12), logger=logger)
    [said] = [record.message for record in caplog.records if record.name == "lightning_collapse"]
    assert said.startswith(
        "`CollapseGuard` at step 4:\n- Only few directions are left of the features in `z`. Dimensional"
    )
    assert " since step 3, noticed at step 4: over 64 rows" in said
    assert " Add `Regularizer(VICReg(), layer=...)`" in said
    assert trainer.global_step == 5
    assert called == guard.verdicts
    saved = torch.load(tmp_path / "saved" / "dimensional_collapse-step=4.ckpt", weights_only=True)
    assert saved["global_step"] == 5
    events = EventAccumulator(logger.log_dir).Reload()
    [text] = events.Tensors("guard/verdict/text_summary")
    assert b"eigenvalue effective rank is 1.00" in text.tensor_proto.string_val[0]


def test_a_verdict_is_said_on_the_console_without_the_path_of_a_file(monkeypatch, capsys):
    # pytest gives every logger a handler by way of the root; without one Python writes to `stderr`
    monkeypatch.setattr(logging.getLogger("lightning_collapse"), "propagate", False)
    fit(Toy(), [Claims(), CollapseGuard(action="warn"), Planted([{}] * 3 + [STILL] * 3)])
    said = capsys.readouterr().err
    assert "\n- All inputs are mapped to nearly one point in `z`. Complete collapse since step 3, noticed" in said
    assert ".py" not in said


def test_checkpoints_go_beside_the_logs_by_default(tmp_path):
    guard = CollapseGuard(action="checkpoint")
    monitor = Claims()
    logger = TensorBoardLogger(tmp_path)
    fit(Toy(), [monitor, guard, Planted([STILL, {}, {}] + [STILL] * 3)], logger=logger)
    [file] = tmp_path.rglob("*.ckpt")
    assert file.name == "complete_collapse-step=4.ckpt"


def test_full_disk_does_not_end_the_run(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    guard = CollapseGuard(action="checkpoint", dirpath=str(blocked / "below"))
    monitor = Claims()
    with pytest.warns(UserWarning, match="could not save a checkpoint"):
        trainer = fit(Toy(), [monitor, guard, Planted([{}] * 3 + [LOW] * 3)])
    assert trainer.global_step == 6


def test_guarded_run_leaves_the_weights_as_they_are():
    def run(callbacks):
        torch.manual_seed(0)
        model = Toy()
        fit(model, callbacks)
        return weights(model)

    guarded = run([CollapseMonitor(every_n_steps=1), CollapseGuard(action="log")])
    assert all(torch.equal(value, guarded[name]) for name, value in run([]).items())


def test_nor_does_a_verdict_that_is_only_said_change_anything(caplog):
    def run(callbacks):
        torch.manual_seed(0)
        model = Toy()
        fit(model, callbacks)  # into a logger that takes no text
        return weights(model), torch.get_rng_state()

    bare, state = run([])
    monitor = Claims()
    guarded, after = run([monitor, CollapseGuard(action=["warn", "log"]), Planted([{}] * 3 + [LOW] * 3)])
    assert "Only few directions are left of the features in `z`." in caplog.text
    assert all(torch.equal(value, guarded[name]) for name, value in bare.items())
    assert torch.equal(state, after)


def test_resumed_guard_remembers(tmp_path):
    guard, keeper = CollapseGuard(action="log"), PointKeeper()
    save = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    monitor = Claims()
    script = [{}] * 4 + [LOW] * 2
    fit(Toy(), [monitor, guard, Planted(script), keeper, save], enable_checkpointing=True)
    again = CollapseGuard(action="log")
    again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["CollapseGuard"])
    fit(Toy(), [Claims(), again, Planted([LOW] * 3 + [{}] * 3)])
    assert again.verdicts == guard.verdicts
    assert len(again.verdicts) == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            {"action": "shout"},
            "`action` must be among warn, log, checkpoint, stop, a `Rollback`, a `SkipStep`, a `SwitchOn` or callable",
        ),
        ({"action": ["warn", 3]}, "got 3"),
        ({"patience": 0}, "`patience` must be at least 1, got 0"),
        ({"calibration": 0}, "`calibration` must be at least 1"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        CollapseGuard(**arguments)


@pytest.mark.parametrize("monitors", [[], [CollapseMonitor(["encoder"], measures=["stable_rank"])]])
def test_guard_without_its_curves_says_which_line_to_add(monitors):
    with pytest.raises(MisconfigurationException, match=r"Add `CollapseMonitor\(\)`.*of collapse eigenvalue"):
        fit(Toy(), [*monitors, CollapseGuard()])
