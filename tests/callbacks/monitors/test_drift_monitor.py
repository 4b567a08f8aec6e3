"""What is special about drift: three references, what each compares, what is refused at the start, and resuming."""

from copy import deepcopy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import DriftMonitor
from lightning_collapse.functional import drift
from lightning_collapse.monitoring.drift_course import DriftCourse
from lightning_collapse.utilities.points import Flag
from tests.toys import QUIET, PointKeeper, Toy, batches, fit, weights


class Classifier(Toy):
    """With what a pass could disturb: dropout and a normalization; learns, or stands still."""

    def __init__(self, lr=0.0):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 8))
        self.lr = lr

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, batch_idx):
        return self(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def made(lr=0.0):
    torch.manual_seed(0)
    return Classifier(lr)


def probe(count=1, size=64, seed=9):
    return batches(count, size, seed=seed)


def last(keeper, layer="encoder.3"):
    step = max(point.step for point in keeper.points)
    return {point.measure: point for point in keeper.points if point.step == step and point.layer == layer}


@pytest.mark.parametrize("kind", ["module", "batches"])
def test_a_network_that_stands_still_has_not_drifted(kind):
    model, keeper = made(), PointKeeper()
    model.encoder[1].momentum = 0.0  # else the statistics move, and so do the features
    reference = deepcopy(model) if kind == "module" else probe()
    fit(model, [DriftMonitor(["encoder.3"], reference, every_n_steps=2), keeper])
    found = last(keeper)
    for name in ("mmd2", "w1", "ks", "psi"):
        assert found[name].value == found[name].null == 0
    assert found["cka"].value == pytest.approx(1, rel=1e-4)
    assert last(keeper, "output")["output_kl"].value == 0


def test_two_networks_are_compared_on_the_batch_of_the_point():
    model, keeper = made(0.5), PointKeeper()
    reference = deepcopy(model)
    fit(model, [DriftMonitor(["encoder.3"], reference, every_n_steps=6), keeper])
    x = list(batches())[-1]
    with torch.no_grad():
        before, now = (net.eval()(x).double() for net in (reference, model))
        features = [net.encoder(x).double() for net in (reference, model)]
    assert last(keeper, "output")["output_kl"].value == pytest.approx(drift.output_kl(before, now).item(), rel=1e-3)
    assert last(keeper)["cka"].value == pytest.approx(drift.debiased_cka(*features).item(), rel=1e-3)
    assert not any(part._forward_hooks for net in (model, reference) for part in net.modules())


@pytest.mark.parametrize("kind", ["module", "batches"])
def test_the_pass_leaves_no_trace(kind):
    class Modes(Callback):
        seen = ()

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.seen = (*self.seen, tuple(part.training for part in pl_module.modules()), float(torch.rand(1)))

    plain, watched, modes = made(0.1), made(0.1), (Modes(), Modes())
    fit(plain, [modes[0]])
    rows = list(torch.randn(64, 16, generator=torch.Generator().manual_seed(3)))
    drawing = DataLoader(rows, 32)  # it draws a seed for its workers, even without any
    reference = deepcopy(watched) if kind == "module" else drawing
    torch.manual_seed(0)
    Classifier()
    fit(watched, [DriftMonitor(reference=reference, every_n_steps=2), modes[1]])
    assert modes[0].seen == modes[1].seen
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())


def test_rows_of_training_batches_are_compared_with_the_first():
    """Without learning, the reading is that of the functions on the layer's input, and about its null."""
    keeper, loader = PointKeeper(), batches(4, 512)
    fit(made(), [DriftMonitor(["encoder.0:input"], every_n_steps=1), keeper], loader)
    found = last(keeper, "encoder.0.input")
    assert found["n"].value == 512
    for name in ("w1", "ks", "psi", "rate"):
        assert found[name].value == pytest.approx(found[name].null, rel=0.25)
    assert abs(found["mmd2"].value) < 5 * found["mmd2"].error
    assert found["changed"].value == 0
    assert "cka" not in found  # not of the same inputs


def test_another_law_is_seen_at_its_first_point():
    data = [*batches(2, 512), *(x + 0.5 for x in batches(2, 512, seed=2))]
    keeper = PointKeeper()
    fit(made(), [DriftMonitor(["encoder.0:input"], every_n_steps=1), keeper], DataLoader(data, batch_size=None))
    changed = [point.value for point in keeper.curve("drift/encoder.0.input/changed")]
    assert changed[1:] == [0, 1, 1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*in the middle of an epoch")
def test_a_resumed_run_has_the_reference_of_the_first(tmp_path):
    points = []
    for path in (None, str(tmp_path / "step=3.ckpt")):
        torch.manual_seed(0)
        keeper = PointKeeper()
        save = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        options = {**QUIET, "enable_checkpointing": True, "logger": False}
        model = made(0.1)
        model.encoder[2].p = 0.0
        loader = DataLoader([next(iter(batches(1)))] * 6, batch_size=None)
        monitor = DriftMonitor(["encoder.3"], probe(), every_n_steps=2)
        Trainer(**options, callbacks=[monitor, keeper, save]).fit(model, loader, ckpt_path=path, weights_only=True)
        points.append({(p.key, p.step): p.value for p in keeper.points if p.step > 3})
    assert points[0] == pytest.approx(points[1], rel=1e-9, nan_ok=True)


def test_bad_references_are_refused():
    for bad in ("end", 3, {"x": torch.ones(2)}, iter([torch.ones(2)]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"`reference` takes 'start'.* got"):
            DriftMonitor(reference=bad)
    with pytest.raises(ValueError, match="`kl_bound` compares outputs"):
        DriftMonitor(kl_bound=0.1)
    with pytest.raises(ValueError, match="`level` must be between 0 and 1, got 1"):
        DriftMonitor(level=1)
    with pytest.raises(ValueError, match="`kl_bound` must be positive, got 0"):
        DriftMonitor(reference=[], kl_bound=0)


def other_width():
    model = Classifier()
    model.encoder[3] = nn.Linear(32, 6)
    return model


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (other_width, r"`weight` of layer `encoder.3` has shape \(8, 32\), and \(6, 32\) there"),
        (lambda: nn.Linear(2, 2), "has no layer `encoder.3`. Pass a copy"),
        (list, "there is no batch in it"),
        (lambda: DataLoader(torch.ones(32, 16), shuffle=True), "its loader shuffles, .*`shuffle=False`"),
        (lambda: probe(size=4), "its batches bring 4 rows of finite features, and 16 are needed"),
        (lambda: [torch.ones(32, 7)], "the pass over its batches failed: RuntimeError: mat1 and mat2"),
    ],
)
def test_what_cannot_be_compared_is_said_at_the_start(reference, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(made(), [DriftMonitor(["encoder.3"], reference())])


@pytest.mark.parametrize("kind", ["start", "module", "batches"])
def test_what_a_reference_cannot_have_is_no_curve(kind):
    model, keeper = made(0.1), PointKeeper()
    reference = {"start": "start", "module": deepcopy(model), "batches": probe()}[kind]
    fit(model, [DriftMonitor(["encoder.*"], reference, every_n_steps=2), keeper])
    drawn = {point.measure for point in keeper.points if point.layer == "encoder.3"}
    assert ("cka" in drawn) == (kind != "start")
    assert ("changed" in drawn) == (kind == "start")
    assert {"rate", "jump"} & drawn == (set() if kind == "module" else {"rate", "jump"})
    assert "overlap" not in drawn  # eight directions of eight
    assert {"overlap", "level"} < {point.measure for point in keeper.points if point.layer == "encoder.0"}


def test_the_model_itself_is_no_reference():
    model = made()
    with pytest.raises(MisconfigurationException, match="holds weights of the model itself"):
        fit(model, [DriftMonitor(reference=model)])
    with pytest.raises(MisconfigurationException, match="calls the module, and Toy has no `forward`"):
        fit(Toy(), [DriftMonitor(reference=probe())])


def test_constant_features_are_said_at_the_start():
    model, keeper = made(), PointKeeper()
    nn.init.zeros_(model.encoder[3].weight)
    with pytest.warns(UserWarning, match=r"features of `encoder.3` in the reference are all equal"):
        fit(model, [DriftMonitor(["encoder.3", "encoder.0"], probe(), every_n_steps=3), keeper])
    assert last(keeper)["w1"].flag == Flag.CONSTANT
    assert last(keeper, "encoder.0")["w1"].flag == Flag.OK


def test_outputs_that_leave_the_reference_are_told_once():
    model = made(1.0)
    with pytest.warns(UserWarning, match=r"outputs have left those of the reference: .* passed 1e-06") as said:
        fit(model, [DriftMonitor(reference=deepcopy(model), every_n_steps=1, kl_bound=1e-6)])
    assert sum("divergence" in str(w.message) for w in said) == 1


def test_a_jump_of_the_rate_is_found_and_what_goes_on_growing_is_not_bounded():
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0)).tolist()
    course, alarms = DriftCourse(300, 1, 0.01), []
    for step, x in enumerate(noise):
        statistic, new = course.jump(step, 2.718 ** (0.1 * x + (step >= 200)))
        alarms += [(step, course.since)] * new
        settled = course.settle(1 + 0.1 * x)
        assert statistic >= 0
    assert 200 <= alarms[0][0] <= 205
    assert 190 <= alarms[0][1] < 200
    assert settled["bounded"] == 1
    assert settled["level"] == pytest.approx(1, abs=4 * settled["error"])
    growing = DriftCourse(300, 1, 0.01)
    for step, x in enumerate(noise):
        settled = growing.settle(step + x)
    assert settled["bounded"] == 0
