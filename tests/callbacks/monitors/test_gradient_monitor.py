"""What ``GradientMonitor`` draws, through a real ``Trainer``."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import GradientMonitor
from lightning_collapse.functional import gradient_coherence, gradient_noise_scale
from lightning_collapse.utilities.points import Flag
from tests.toys import QUIET, ManualToy, PointKeeper, Toy, batches, fit, weights

ALL = "gradients/all/norm"
SCALER = {"init_scale": 1024.0}


def scaled():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **SCALER))


def gradients(model, rows):
    """One flat gradient of the mean loss over rows."""
    model.zero_grad()
    model.training_step(rows, 0).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


class Frozen(Toy):
    """Weights that stay, so that gradients can be computed again."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("kind", ["auto", "manual", "clipped", "16-mixed", "fused"])
def test_norms_are_those_of_autograd(kind):
    class Fused(Frozen):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.0, fused=True)

    class ByHand(ManualToy):
        configure_optimizers = Frozen.configure_optimizers

    model = {"manual": ByHand, "fused": Fused}.get(kind, Frozen)()
    kwargs = {"gradient_clip_val": 1e-3} if kind == "clipped" else {}
    if kind in ("16-mixed", "fused"):
        kwargs["plugins"] = [scaled()]
    loader = batches(2)
    trainer = fit(model, [GradientMonitor(["encoder", "head"], every_n_steps=1)], loader, **kwargs)
    plain = Frozen()
    plain.load_state_dict(model.state_dict())
    rel = 5e-3 if "plugins" in kwargs else 1e-6  # activations in half precision
    for step, rows in enumerate(loader):
        assert trainer.logger.curve(ALL)[step][1] == pytest.approx(gradients(plain, rows).norm().item(), rel=rel)
        for name in ("encoder", "head"):
            own = torch.cat([p.grad.flatten() for p in getattr(plain, name).parameters()])
            assert trainer.logger.curve(f"gradients/{name}/norm")[step][1] == pytest.approx(own.norm().item(), rel=rel)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_every_precision(precision):
    def run(callbacks):
        torch.manual_seed(0)
        model = Toy()
        return model, fit(model, callbacks, precision=precision, accumulate_grad_batches=2)

    watched, trainer = run([GradientMonitor(every_n_steps=1)])
    state = torch.random.get_rng_state()
    plain, _ = run([])
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    torch.manual_seed(0)
    full = fit(Toy(), [GradientMonitor(every_n_steps=1)], accumulate_grad_batches=2)
    for key in (ALL, "gradients/all/noise_trace"):
        expected = [value for _, value in full.logger.curve(key)]
        assert [value for _, value in trainer.logger.curve(key)] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("scaler", [False, True])
def test_noise_of_micro_batches_is_that_of_their_gradients(scaler):
    model, loader = Frozen(), DataLoader(torch.randn(40, 16), batch_size=8)
    callback = GradientMonitor(every_n_steps=1, smoothing=0.5)
    kwargs = {"plugins": [scaled()]} if scaler else {}
    trainer = fit(model, [callback], loader, accumulate_grad_batches=4, **kwargs)
    plain = Frozen()
    plain.load_state_dict(model.state_dict())
    each = torch.stack([gradients(plain, rows) for rows in loader])[:4]
    small, big = each.square().sum(dim=1).mean(), each.mean(dim=0).square().sum()
    trace, signal, scale = gradient_noise_scale(small, big, 8, 32)
    coherence = gradient_coherence(each.sum(dim=0).square().sum(), each.square().sum(), 4)
    rel = 2e-2 if scaler else 1e-5
    for name, value in {"trace": trace, "signal": signal, "scale": scale}.items():
        drawn = trainer.logger.curve(f"gradients/all/noise_{name}")
        # the odd last micro-batch is a window of its own, from which nothing can be learnt
        assert [x for _, x in drawn] == pytest.approx([value.item()] * 2, rel=rel)
    drawn = [value for _, value in trainer.logger.curve("gradients/all/coherence")]
    assert drawn == pytest.approx([coherence.item(), math.nan], rel=rel, nan_ok=True)


def test_unequal_micro_batches_and_shorter_windows():
    class Half(Frozen):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[: 16 if batch_idx % 3 else 4], batch_idx)

    keeper, torch_seed = PointKeeper(), torch.randn(5, 16, 16)
    model = Half()
    sizes = [4, 16, 16, 4, 16]

    class Sizes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trainer.callbacks[1].micro_batch_size = sizes[batch_idx]

    loader = DataLoader(torch_seed.flatten(0, 1), batch_size=16)
    fit(model, [Sizes(), GradientMonitor(every_n_steps=1, smoothing=0.0), keeper], loader, accumulate_grad_batches=3)
    plain = Frozen()
    plain.load_state_dict(model.state_dict())
    each = torch.stack([gradients(plain, rows[:size]) for rows, size in zip(torch_seed, sizes, strict=True)])
    for part, point in zip((slice(0, 3), slice(3, 5)), keeper.curve("gradients/all/noise_trace"), strict=True):
        inverse = torch.tensor([1 / size for size in sizes[part]], dtype=torch.float64)
        small, big = each[part].square().sum(dim=1).mean(), each[part].mean(dim=0).square().sum()
        expected = gradient_noise_scale(small, big, 1 / inverse.mean(), len(inverse) / inverse.mean())
        assert point.value == pytest.approx(expected.trace.item(), rel=1e-5)
        assert point.n == round((len(inverse) / inverse.mean()).item())


def test_only_norms_where_nothing_is_accumulated(caplog):
    with caplog.at_level("INFO"):
        trainer = fit(Toy(), [GradientMonitor(every_n_steps=2)])
    assert caplog.text.count("draws norms only") == 1
    assert [step for step, _ in trainer.logger.curve(ALL)] == [0, 1, 3, 5]
    assert not any("noise" in key for key in trainer.callback_metrics)
    assert {key.split("/")[1] for key in trainer.callback_metrics} == {"encoder.0", "encoder.2", "head", "all"}


def test_each_optimizer_counts_with_its_own_parameters():
    class Two(ManualToy):
        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.manual_backward(self.head(self.encoder(batch)).pow(2).mean())
            first.step()
            first.zero_grad()
            second.zero_grad()
            for _ in range(2):  # the last of several steps counts
                second.zero_grad()
                self.manual_backward(100 * self.head(self.encoder(batch)).pow(2).mean())
                second.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.encoder, self.head)]

    model, loader = Two(), batches(1)
    trainer = fit(model, [GradientMonitor(["encoder", "head"], every_n_steps=1)], loader)
    plain = Frozen()
    plain.load_state_dict(model.state_dict())
    gradients(plain, next(iter(loader)))
    for name, factor in (("encoder", 1), ("head", 100)):
        own = factor * torch.cat([p.grad.flatten() for p in getattr(plain, name).parameters()]).norm().item()
        assert trainer.callback_metrics[f"gradients/{name}/norm"].item() == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_gradients_are_flagged_where_they_are(bad):
    class Bad(Toy):
        def on_after_backward(self):
            self.head.bias.grad[0] = bad

    keeper = PointKeeper()
    fit(Bad(), [GradientMonitor(every_n_steps=1), keeper], batches(1))
    flags = {point.key.split("/")[1]: point.flag for point in keeper.points}
    assert flags == {"encoder.0": 0, "encoder.2": 0, "head": Flag.NONFINITE, "all": Flag.NONFINITE}
    assert math.isnan(keeper.curve("gradients/head/norm")[0].value)
    assert keeper.curve("gradients/encoder.0/norm")[0].value > 0


def test_overflow_of_the_loss_scale_is_flagged_and_the_average_goes_on():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))
    keeper = PointKeeper()
    fit(Toy(), [GradientMonitor(every_n_steps=1), keeper], batches(80), plugins=[plugin], accumulate_grad_batches=2)
    flags = [point.flag for point in keeper.curve(ALL)]
    assert flags[0] == Flag.NONFINITE
    assert flags[-1] == Flag.OK
    assert math.isnan(keeper.curve("gradients/all/noise_scale")[0].value)
    assert keeper.curve("gradients/all/noise_trace")[-1].value > 0


def test_layer_without_a_gradient_is_flagged_with_one_warning():
    class Idle(Toy):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(3, 3)

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="no gradient of `idle`") as caught:
        fit(Idle(), [GradientMonitor(["idle", "head"], every_n_steps=2), keeper])
    assert len([w for w in caught if "no gradient" in str(w.message)]) == 1
    assert [point.flag for point in keeper.curve("gradients/idle/norm")] == [Flag.NOT_CALLED] * 4
    assert [point.flag for point in keeper.curve("gradients/head/norm")] == [Flag.OK] * 4


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_batch_that_is_skipped():
    class Skips(Toy):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 4, 5) else super().training_step(batch, batch_idx)

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="no gradient of"):
        fit(Skips(), [GradientMonitor(every_n_steps=1), keeper], accumulate_grad_batches=2)
    assert next(point.flag for point in keeper.curve("gradients/all/coherence")) == Flag.FEW_ROWS
    assert keeper.curve(ALL)[1].flag == Flag.OK


def test_sparse_gradients():
    class Sparse(Toy):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 16, sparse=True)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch + self.table(torch.tensor([1, 1, 2, 3] * 8)), batch_idx)

    trainer = fit(Sparse(), [GradientMonitor(["table"], every_n_steps=1)], batches(1))
    assert trainer.callback_metrics["gradients/table/norm"] > 0


def test_shared_parameters_count_once():
    class Tied(Frozen):
        def __init__(self):
            super().__init__()
            self.again = self.head

    model = Tied()
    trainer = fit(model, [GradientMonitor(every_n_steps=1)], batches(1))
    expected = gradients(model, next(iter(batches(1)))).norm().item()
    assert trainer.callback_metrics[ALL].item() == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_run_continues_its_averages(tmp_path):
    loader = DataLoader(torch.randn(32, 16).repeat(8, 1), batch_size=32)

    def run(**kwargs):
        torch.manual_seed(0)
        keeper = PointKeeper()
        save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        options = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": True}
        trainer = fit(Toy(), [GradientMonitor(every_n_steps=2), keeper, save], loader, **options, **kwargs)
        return trainer, keeper.curve("gradients/all/noise_scale")

    _, whole = run()
    keeper = PointKeeper()
    callbacks = [GradientMonitor(every_n_steps=2), keeper, ModelCheckpoint(tmp_path, filename="again")]
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "enable_checkpointing": True, "logger": False}
    again = Trainer(**{**QUIET, **options, "callbacks": callbacks})
    again.fit(Toy(), loader, ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    rest = keeper.curve("gradients/all/noise_scale")
    assert len(whole) == 5
    assert [point.value for point in rest] == [point.value for point in whole[3:]]
    torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)


def test_compiled_model_is_not_compiled_again():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(callbacks):
        graphs.clear()
        torch.compiler.reset()
        torch.manual_seed(0)
        return fit(torch.compile(Toy(), backend=backend), callbacks, batches(12)), len(graphs)

    (_, plain), (trainer, watched) = run([]), run([GradientMonitor(every_n_steps=1)])
    assert watched == plain
    torch.manual_seed(0)
    eager = fit(Toy(), [GradientMonitor(every_n_steps=1)], batches(12))
    expected = [value for _, value in eager.logger.curve(ALL)]
    assert [value for _, value in trainer.logger.curve(ALL)] == pytest.approx(expected)


def test_nothing_is_kept_and_nothing_waits_between_points(monkeypatch):
    waits = []
    to_list, item = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append("tolist") or to_list(tensor))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: waits.append("item") or item(tensor))
    callback, seen = GradientMonitor(every_n_steps=4, noise=False), []
    for hook in ("on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"):
        original = getattr(callback, hook)

        def counted(trainer, *args, original=original, hook=hook):
            waits.clear()
            original(trainer, *args)
            seen.extend((trainer.fit_loop.epoch_loop._batches_that_stepped, hook, wait) for wait in waits)

        monkeypatch.setattr(callback, hook, counted)
    fit(Toy(), [callback], batches(8), logger=False)
    assert seen == [(step, "on_train_batch_end", "tolist") for step in (0, 3, 7)]
    assert callback._norms == []
    assert callback._window is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "head"}, r"Write `layers=\['head'\]`"),
        ({"layers": []}, "`layers` is empty"),
        ({"smoothing": 1.0}, "`smoothing` must be at least 0 and less than 1, got 1.0"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be at least 1"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientMonitor(**arguments)


def test_unknown_layer():
    with pytest.raises(MisconfigurationException, match=r"GradientMonitor\(layers=\['nothing'\]\).*It has: encoder"):
        fit(Toy(), [GradientMonitor(["nothing"])])


def test_flattened_gradients_are_refused():
    trainer = Trainer(**QUIET, logger=False)
    trainer.strategy.__class__ = FSDPStrategy  # a real one needs an accelerator
    with pytest.raises(MisconfigurationException, match="Use `ModelParallelStrategy` with `fully_shard`"):
        GradientMonitor().start(trainer, Toy())


class SparseTable(LightningModule):
    """The rows that have a gradient differ between micro-batches."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 8, sparse=True)
        self.head = nn.Linear(8, 4)

    def training_step(self, batch, batch_idx):
        return self.head(self.table(batch)).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_sparse_gradients_have_no_part_in_the_noise():
    tokens = DataLoader(torch.arange(64).remainder(50).view(32, 2), batch_size=4)
    trainer = fit(SparseTable(), [GradientMonitor(every_n_steps=1)], tokens, accumulate_grad_batches=2)
    metrics = trainer.callback_metrics
    assert metrics["gradients/all/norm"] > 0
    assert metrics["gradients/all/noise_trace"].isfinite()
