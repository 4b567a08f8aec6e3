"""Updates are those that optimizers make, whichever they are and however they are stepped."""

from math import isnan, sqrt

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import UpdateMonitor
from lightning_collapse.functional import adam_rms_null, adam_rms_ratio, stability_edge
from lightning_collapse.utilities.points import Flag
from tests.toys import QUIET, ManualToy, PointKeeper, Toy, batches, fit, weights

pytestmark = pytest.mark.filterwarnings(
    "ignore:The .*dataloader.* does not have many workers", "ignore:Checkpoint directory"
)


class Steps(Callback):
    """All weights after every step, and before the first."""

    def on_train_start(self, trainer, pl_module):
        self.weights = [self._flat(pl_module)]
        self.gradients = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(self._flat(pl_module))
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def _flat(self, pl_module):
        return torch.cat([p.detach().flatten().double() for p in pl_module.parameters()])

    def expected(self, step):
        before, after = self.weights[step], self.weights[step + 1]
        found = {"ratio": ((after - before).norm() / before.norm()).item()}
        if step:
            found["cosine"] = torch.cosine_similarity(after - before, before - self.weights[step - 1], dim=0).item()
        return found


class WithOptimizer(Toy):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


def read(keeper, layer, step):
    return {p.measure: p for p in keeper.points if p.family == "updates" and p.layer == layer and p.step == step}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
}
NULLS = {"sgd": 0.0, "momentum": 0.9}


@pytest.mark.parametrize("clip", [0.0, 1e-3])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 3])
def test_updates_are_those_that_were_made(name, every, clip):
    keeper, steps, model = PointKeeper(), Steps(), WithOptimizer(OPTIMIZERS[name])
    fit(model, [steps, UpdateMonitor(every_n_steps=every), keeper], gradient_clip_val=clip)
    for step in (0, *range(every - 1, 6, every)):
        found, expected = read(keeper, "all", step), steps.expected(step)
        assert found["ratio"].value == pytest.approx(expected["ratio"], rel=1e-5)
        if step:
            assert found["cosine"].value == pytest.approx(expected["cosine"], rel=1e-4)
            assert found["cosine"].null == NULLS.get(name, 0.9)
        assert ("rms_ratio" in found) == (name not in NULLS)
        assert "swallowed" not in found
    if name not in NULLS:
        [state] = [model.trainer.optimizers[0].state[model.encoder[2].weight]]
        second = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
        expected = adam_rms_ratio(steps.gradients[5]["encoder.2.weight"], second).item()
        found = read(keeper, "encoder.2", 5)["rms_ratio"]
        assert found.value == pytest.approx(expected, rel=1e-5)
        assert found.null == pytest.approx(adam_rms_null(0.999))


def test_layers_are_modules_or_parameters():
    keeper, steps = PointKeeper(), Steps()
    fit(WithOptimizer(OPTIMIZERS["adamw"]), [steps, UpdateMonitor(["encoder", "*.bias"], 2), keeper])
    layers = {point.layer for point in keeper.points}
    assert layers == {"encoder", "encoder.0.bias", "encoder.2.bias", "head.bias", "all"}
    before, after = steps.weights[5][512:544], steps.weights[6][512:544]  # after 16 x 32 weights
    expected = ((after - before).norm() / before.norm()).item()
    assert read(keeper, "encoder.0.bias", 5)["ratio"].value == pytest.approx(expected, rel=1e-5)


def test_manual_optimization_and_several_optimizers():
    class Two(ManualToy):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(Toy.training_step(self, batch, batch_idx))
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            first = torch.optim.Adam(self.encoder.parameters(), lr=1e-2, betas=(0.8, 0.99))
            return first, torch.optim.SGD(self.head.parameters(), lr=0.1)

    keeper, steps = PointKeeper(), Steps()
    fit(Two(), [steps, UpdateMonitor(["encoder.2", "head"], every_n_steps=2), keeper])
    found, expected = read(keeper, "all", 5), steps.expected(5)
    assert found["ratio"].value == pytest.approx(expected["ratio"], rel=1e-5)
    assert found["cosine"].value == pytest.approx(expected["cosine"], rel=1e-4)
    assert isnan(found["cosine"].null)  # they differ
    assert read(keeper, "encoder.2", 5)["cosine"].null == 0.8
    assert "rms_ratio" not in read(keeper, "head", 5)  # no state, no curve
    assert "rms_ratio" in read(keeper, "encoder.2", 5)  # although gradients are gone


def test_accumulated_steps_are_steps():
    keeper, steps = PointKeeper(), Steps()
    fit(
        WithOptimizer(OPTIMIZERS["sgd"]),
        [steps, UpdateMonitor(every_n_steps=2), keeper],
        batches(8),
        accumulate_grad_batches=2,
    )
    found = read(keeper, "all", 3)
    updates = [steps.weights[i + 2] - steps.weights[i] for i in (4, 6)]
    assert found["ratio"].value == pytest.approx((updates[1].norm() / steps.weights[6].norm()).item(), rel=1e-5)
    assert found["cosine"].value == pytest.approx(torch.cosine_similarity(*updates, dim=0).item(), rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_has_no_point(fused):
    class Overflows(Toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * (torch.inf if batch_idx == 3 else 1.0)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=fused)

    keeper, steps = PointKeeper(), Steps()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    fit(Overflows(), [steps, UpdateMonitor(every_n_steps=1), keeper], plugins=plugins)
    assert sorted({point.step for point in keeper.points}) == [0, 1, 2, 4, 5]
    for step in (1, 2, 5):
        assert read(keeper, "all", step)["ratio"].value == pytest.approx(steps.expected(step)["ratio"], rel=1e-5)
    assert read(keeper, "encoder.2", 5)["rms_ratio"].value < 10  # of gradients without the scale


@pytest.mark.parametrize(("relative", "lost"), [(1e-2, 0.0), (1e-3, 0.66), (3e-4, 0.91), (1e-4, 0.97)])
def test_bfloat16_swallows_small_steps(relative, lost):
    class Nudge(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0})

        @torch.no_grad()
        def step(self, closure=None):
            loss = closure() if closure is not None else None
            for parameter in self.param_groups[0]["params"]:
                signs = torch.where(torch.rand(parameter.shape) < 0.5, -1.0, 1.0)
                parameter.copy_(parameter.float() + relative * parameter.float().square().mean().sqrt() * signs)
            return loss

    class Wide(WithOptimizer):
        def __init__(self):
            super().__init__(Nudge)
            self.head = nn.Linear(8, 4096)

    torch.manual_seed(0)
    model, keeper = Wide(), PointKeeper()
    model.head.weight.data.normal_()
    fit(model, [UpdateMonitor(["head.weight"], every_n_steps=1), keeper], precision="bf16-true")
    share = read(keeper, "head.weight", 5)["swallowed"].value
    assert share == pytest.approx(lost, abs=0.05)


class Noise(LightningModule):
    """Weights whose gradients are independent from step to step."""

    def __init__(self, make, last, jump=1.0, constant=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100_000))
        self.make, self.last, self.jump, self.constant = make, last, jump, constant

    def training_step(self, batch, batch_idx):
        gradient = batch.sign() if self.constant else batch
        gradient = gradient * (self.jump if batch_idx == self.last else 1.0)
        return (self.weight * gradient).sum()

    def configure_optimizers(self):
        return self.make(self.parameters())


def noise_points(make, steps, **kwargs):
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(1, 100_000, generator=generator) for _ in range(20)]
    order = torch.randint(20, (steps,), generator=generator).tolist()
    signs = torch.where(torch.rand(steps, generator=generator) < 0.5, -1.0, 1.0)
    stream = (data[i][0].roll(7 * n) * signs[n] for n, i in enumerate(order))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(stream)

    keeper = PointKeeper()
    monitor = UpdateMonitor(["weight"], every_n_steps=steps)
    fit(Noise(make, steps - 1, **kwargs), [monitor, keeper], DataLoader(Stream(), batch_size=None), max_steps=steps)
    return read(keeper, "weight", steps - 1)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_the_cosine_of_updates_of_independent_gradients_is_the_momentum(name):
    found = noise_points(OPTIMIZERS[name], 150)
    assert found["cosine"].value == pytest.approx(0.9, abs=0.004)
    assert found["cosine"].null == 0.9


@pytest.mark.parametrize(("jump", "constant", "expected"), [(1, False, 0.995), (10, True, 7.09), (10, False, 5.9)])
def test_the_rms_ratio_of_a_jump(jump, constant, expected):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=1e-4, betas=(0.9, 0.99))

    found = noise_points(adam, 600, jump=jump, constant=constant)  # six memories: 0.2 % of the first is left
    assert found["rms_ratio"].value == pytest.approx(expected, rel=0.02)
    assert found["rms_ratio"].null == pytest.approx(0.995, abs=1e-3)


class Bowl(LightningModule):
    """A quadratic loss of known curvature."""

    def __init__(self, make):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))
        self.register_buffer("curvature", torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, -3.0]))
        self.make, self.calls = make, 0

    def training_step(self, batch, batch_idx):
        loss = 0.5 * (self.curvature * self.weight.square()).sum() * batch.mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make(self.parameters())


def sharpness(keeper, name):
    return [point.value for point in keeper.points if point.key == f"sharpness/all/{name}"]


def test_sharpness_is_the_largest_curvature_and_its_edge_that_of_the_optimizer():
    for make, edge in (
        (lambda p: torch.optim.SGD(p, lr=0.01), 2 / 0.01),
        (lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), 3.8 / 0.01),
        (lambda p: torch.optim.Adam(p, lr=0.01), 38 / 0.01),
    ):
        keeper, model = PointKeeper(), Bowl(make)
        fit(model, [UpdateMonitor(every_n_steps=2, sharpness=True), keeper], DataLoader(torch.ones(6, 1), batch_size=1))
        assert sharpness(keeper, "raw") == pytest.approx([8.0] * 4, rel=1e-4)
        assert sharpness(keeper, "edge") == pytest.approx([edge] * 4)
        assert bool(sharpness(keeper, "preconditioned")) == (edge == 38 / 0.01)
    state = model.trainer.optimizers[0].state[model.weight]
    root = (state["exp_avg_sq"] / (1 - 0.999**6)).sqrt() + 1e-8
    assert sharpness(keeper, "preconditioned")[-1] == pytest.approx((model.curvature / root).max().item(), rel=0.02)


@pytest.mark.parametrize("others", [-6.0, -1.0])
def test_the_largest_curvature_is_read_beside_large_negative_ones(others):
    class Saddle(Bowl):
        def __init__(self):
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.0))
            self.curvature.copy_(torch.tensor([1.0, 0.4, 0.2, 0.1, others / 2, others]))

    keeper = PointKeeper()
    loader = DataLoader(torch.ones(6, 1), batch_size=1)
    fit(Saddle(), [UpdateMonitor(every_n_steps=1, sharpness=True), keeper], loader)
    assert sharpness(keeper, "raw")[-1] == pytest.approx(1.0, rel=0.02)


def test_sharpness_by_differences_where_nothing_can_be_derived_twice():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x.square() * torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0])).sum() / 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, slope):
            return slope * ctx.saved_tensors[0] * torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    class Fused(Bowl):
        def training_step(self, batch, batch_idx):
            return Once.apply(self.weight)

    keeper = PointKeeper()
    model = Fused(lambda p: torch.optim.SGD(p, lr=0.01))
    fit(model, [UpdateMonitor(every_n_steps=2, sharpness=True), keeper], DataLoader(torch.ones(6, 1), batch_size=1))
    assert sharpness(keeper, "raw") == pytest.approx([3.0] * 4, rel=1e-3)


def test_sharpness_is_read_unseen(tmp_path):
    class Net(Toy):
        def __init__(self, dropout):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(dropout), nn.Linear(32, 8))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=True, on_epoch=True)
            return loss

    def run(sharp, dropout=0.3, **kwargs):
        torch.manual_seed(0)
        model, keeper = Net(dropout), PointKeeper()
        save = ModelCheckpoint(tmp_path / str(dropout), every_n_train_steps=4, save_top_k=-1, filename="{step}")
        options = {**QUIET, "enable_checkpointing": True, "max_epochs": 2, "log_every_n_steps": 1, "logger": False}
        monitor = UpdateMonitor(every_n_steps=3, sharpness=sharp)
        trainer = Trainer(**options, callbacks=[monitor, keeper, save])
        loader = DataLoader(batches(1).dataset.repeat(4, 1), batch_size=32)
        trainer.fit(model, loader, **kwargs)
        return model, keeper, trainer, torch.rand(1)

    plain, _, first, drawn = run(False)
    sharp, _, trainer, again = run(True)
    assert all(torch.equal(value, weights(sharp)[name]) for name, value in weights(plain).items())
    assert torch.equal(drawn, again)
    assert {n: v for n, v in trainer.callback_metrics.items() if n.startswith("loss")} == {
        n: v for n, v in first.callback_metrics.items() if n.startswith("loss")
    }
    assert "log" not in vars(sharp)
    _, keeper, _, _ = run(True, 0.0)
    _, rest, _, _ = run(True, 0.0, ckpt_path=str(tmp_path / "0.0" / "step=4.ckpt"))
    expected = {(p.key, p.step): p.value for p in keeper.points if p.step > 4}
    found = {(p.key, p.step): p.value for p in rest.points if p.step > 4}
    assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_a_checkpoint_between_the_two_steps_of_a_cosine_loses_nothing(tmp_path):
    def run(keeper, **kwargs):
        torch.manual_seed(0)
        save = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        options = {**QUIET, "enable_checkpointing": True, "max_epochs": 1, "log_every_n_steps": 1, "logger": False}
        trainer = Trainer(**options, callbacks=[UpdateMonitor(every_n_steps=3), keeper, save])
        trainer.fit(WithOptimizer(OPTIMIZERS["adamw"]), DataLoader(batches(1).dataset.repeat(6, 1), 32), **kwargs)

    whole, rest = PointKeeper(), PointKeeper()
    run(whole)
    run(rest, ckpt_path=str(tmp_path / "step=5.ckpt"))
    [before], [after] = ([p.value for p in k.curve("updates/all/cosine") if p.step == 5] for k in (whole, rest))
    assert after == pytest.approx(before, rel=1e-9)


def test_bad_gradients_are_flagged_and_unannounced_steps_are_told_of():
    class Bad(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.nan

    keeper = PointKeeper()
    fit(Bad(), [UpdateMonitor(every_n_steps=6), keeper])
    assert read(keeper, "all", 5)["ratio"].flag == Flag.NONFINITE
    assert isnan(read(keeper, "all", 5)["ratio"].value)

    class Raw(ManualToy):
        def training_step(self, batch, batch_idx):
            optimizer = self.trainer.optimizers[0]
            optimizer.zero_grad()
            self.manual_backward(Toy.training_step(self, batch, batch_idx))
            optimizer.step()

    with pytest.warns(UserWarning, match="no optimizer step was announced"):
        fit(Raw(), [UpdateMonitor(every_n_steps=2)])


def test_no_hook_stays_on_an_optimizer_and_no_copy_is_kept():
    monitor, model = UpdateMonitor(every_n_steps=2), WithOptimizer(OPTIMIZERS["adamw"])
    trainer = fit(model, [monitor])
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert monitor._reader is None


def test_arguments():
    with pytest.raises(ValueError, match="`layers`"):
        UpdateMonitor(layers="encoder")
    with pytest.raises(MisconfigurationException, match=r"`UpdateMonitor\(layers=\['nothing'\]\)`"):
        fit(Toy(), [UpdateMonitor(["nothing"])])
    with pytest.raises(MisconfigurationException, match="manual optimization steps itself"):
        fit(ManualToy(), [UpdateMonitor(sharpness=True)])
    with pytest.raises(MisconfigurationException, match="weights of 32 bits"):
        fit(Toy(), [UpdateMonitor(sharpness=True)], precision="bf16-true")
    monitor = UpdateMonitor()
    trainer = Trainer(**QUIET, logger=False)
    trainer.strategy.__class__ = type("Sharded", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match="flattened parameters"):
        monitor.start(trainer, Toy())
    for bad in ({"learning_rate": 0.0}, {"learning_rate": 1.0, "momentum": 1.0}):
        with pytest.raises(ValueError, match="`learning_rate` must be positive"):
            stability_edge(**bad)
    with pytest.raises(ValueError, match="`beta2` must be above 0"):
        adam_rms_null(1.0)
    assert stability_edge(1.0, 0.9, "average") == pytest.approx(38.0)
    assert adam_rms_null(0.99) ** 2 == pytest.approx(1 - 0.02 * 0.99 / 1.99, abs=1e-3)  # to the second order
    assert sqrt(1 / (1 - 0.99)) == pytest.approx(10)
