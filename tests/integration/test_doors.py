"""Both doors of a regularizer, the callback and the mixin, in real fits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_collapse.callbacks.loss_terms.regularizer import Regularizer
from lightning_collapse.losses import (
    CovarianceLoss,
    LinearWarmup,
    LongTailCollapse,
    VarianceLoss,
    VICReg,
    variance_loss,
)
from lightning_collapse.losses.support.state import remembered
from lightning_collapse.mixins.anti_collapse import AntiCollapseMixin
from lightning_collapse.utilities.registry import LOSSES
from tests.integration.siamese import Memory, MixedSiamese, MixedSingle, Siamese, Single, curve, fit, weights
from tests.losses.cases import CASES

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # on purpose
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_doors_are_bit_equal(precision: str, accumulate: int) -> None:
    kwargs = {"precision": precision, "accumulate_grad_batches": accumulate, "batches": 5}
    callback, callback_log, trainer = fit(Siamese, Regularizer(VICReg(), layer="projector", weight=0.1), **kwargs)
    mixin, mixin_log, _ = fit(lambda: MixedSiamese(vicreg=(0.1, VICReg())), **kwargs)
    plain, _, _ = fit(Siamese, **kwargs)
    assert torch.equal(weights(callback), weights(mixin))
    assert not torch.equal(weights(callback), weights(plain))
    assert weights(callback).isfinite().all()
    assert callback_log.rows == mixin_log.rows
    steps = [step for step, _ in curve(callback_log, "regularizer/vicreg/value")]
    assert steps == list(range(math.ceil(5 / accumulate)))
    assert "regularizer/vicreg/variance" in trainer.callback_metrics


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_doors_of_every_loss_are_bit_equal(name: str, accumulate: int) -> None:
    def loss() -> nn.Module:
        return LOSSES[name](**CASES[name].doors)

    plain, mixed = {1: (Single, MixedSingle), 2: (Siamese, MixedSiamese)}[LOSSES[name].views]
    kwargs = {"accumulate_grad_batches": accumulate, "batches": 3, "batch_size": 32}
    callback, callback_log, _ = fit(plain, Regularizer(loss(), layer="projector", weight=0.01, name="it"), **kwargs)
    mixin, mixin_log, _ = fit(lambda: mixed(it=(0.01, loss())), **kwargs)
    without, _, _ = fit(plain, **kwargs)
    assert torch.equal(weights(callback), weights(mixin))
    assert not torch.equal(weights(callback), weights(without))
    assert weights(callback).isfinite().all()
    assert callback_log.rows == mixin_log.rows
    assert {f"regularizer/it/{term}" for term in loss().coefficients} < set(callback_log.rows[-1][1])


def test_doors_are_close_where_more_operations_read_the_layer() -> None:
    class Twice(Single):
        def training_step(self, batch: Tensor) -> Any:
            features = self.projector(self.encoder(batch))
            return (features - features.roll(1, 0)).square().mean()

    class MixedTwice(MixedSingle):
        def training_step(self, batch: Tensor) -> Any:
            features = self.projector(self.encoder(batch))
            return (features - features.roll(1, 0)).square().mean() + self.anti_collapse_loss(features)

    callback, _, _ = fit(Twice, Regularizer(VarianceLoss(), layer="projector"))
    mixin, _, _ = fit(lambda: MixedTwice(variance=VarianceLoss()))
    without, _, _ = fit(Twice)
    torch.testing.assert_close(weights(callback), weights(mixin), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights(callback), weights(without), rtol=1e-5, atol=1e-6)


def test_gradient_scaler() -> None:
    def half() -> dict[str, Any]:
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))]}

    callback, _, _ = fit(Siamese, Regularizer(VICReg(), layer="projector"), **half())
    mixin, _, _ = fit(MixedSiamese, **half())
    exact, _, _ = fit(MixedSiamese)
    assert torch.equal(weights(callback), weights(mixin))
    torch.testing.assert_close(weights(callback), weights(exact), rtol=0.05, atol=0.02)


def test_curves_are_total_and_unweighted_terms() -> None:
    _, logger, _ = fit(Siamese, Regularizer(VICReg(), layer="projector", weight=0.5), batches=6, log_every_n_steps=3)
    assert [step for step, row in logger.rows] == [2, 5]
    row = logger.rows[0][1]
    terms = {name: row[f"regularizer/vicreg/{name}"] for name in ("invariance", "variance", "covariance")}
    assert set(row) == {"regularizer/vicreg/value"} | {f"regularizer/vicreg/{name}" for name in terms}
    expected = 0.5 * (25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"])
    assert row["regularizer/vicreg/value"] == pytest.approx(expected, rel=1e-5)


def test_nothing_waits_for_the_device_when_no_point_is_due() -> None:
    class NoWait(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return func(*args, **(kwargs or {}))

    class Watched(MixedSiamese):
        def training_step(self, batch: Tensor) -> Any:
            with NoWait():
                return super().training_step(batch)

    with NoWait():  # forward and backward of the loss itself
        VICReg()(torch.randn(8, 4, requires_grad=True), torch.randn(8, 4)).backward()
    fit(Watched, log_every_n_steps=0)
    regularizer = Regularizer(VICReg(), layer="projector")
    run = regularizer._run

    def watched(*args: Any, **kwargs: Any) -> Any:
        with NoWait():
            return run(*args, **kwargs)

    regularizer._run = watched
    fit(Siamese, regularizer)  # also at logging steps: the callback publishes after the batch


def test_collapses_without_and_not_with() -> None:
    # the behaviour claim: complete collapse of the plain model, all eight directions alive with the regularizer
    def spread(model: LightningModule) -> Tensor:
        x = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return model.projector(model.encoder(x)).std(dim=0)

    def make() -> LightningModule:
        return Siamese(lr=0.1)

    kwargs = {"batches": 100, "batch_size": 64}
    collapsed, _, _ = fit(make, **kwargs)
    # the task already pulls views together
    saved, _, _ = fit(make, Regularizer(VICReg(invariance=0.0), layer="projector", weight=0.2), **kwargs)
    assert spread(collapsed).max() < 0.1
    assert spread(saved).min() > 0.5


def test_state_dict_is_that_of_the_plain_model() -> None:
    class Buffered(VICReg):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.zeros(3))

    plain, mixed = Siamese(), MixedSiamese(vicreg=VICReg(), queued=(0.5, Buffered()))
    assert list(mixed.state_dict()) == list(plain.state_dict())
    mixed.load_state_dict(plain.state_dict())
    plain.load_state_dict(mixed.state_dict())


def test_trainable_loss_becomes_part_of_the_model() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, features: Tensor) -> Tensor:
            return (features * self.scale).square().mean()

    class Lit(MixedSiamese):
        def __init__(self) -> None:
            super().__init__(learned=Learned())

        def training_step(self, batch: Tensor) -> Tensor:
            return self.anti_collapse_loss(self.views(batch)[0])

    model, logger, _ = fit(Lit)
    assert "trained_regularizers.learned.scale" in model.state_dict()
    assert not torch.equal(model.trained_regularizers["learned"].scale, torch.ones(8))
    assert set(logger.rows[0][1]) == {"regularizer/learned/value"}
    with pytest.raises(MisconfigurationException, match=r"trainable parameters of Learned.*AntiCollapseMixin"):
        fit(Siamese, Regularizer(Learned(), layer="projector"))


def test_schedule() -> None:
    warmup = LinearWarmup(weight=1.0, steps=2)
    model, logger, _ = fit(Siamese, Regularizer(VICReg(), layer="projector", weight=warmup))
    mixed, mixed_logger, _ = fit(lambda: MixedSiamese(vicreg=(warmup, VICReg())))
    assert torch.equal(weights(model), weights(mixed))
    assert logger.rows == mixed_logger.rows
    factors = []
    for _, row in logger.rows:
        unweighted = sum(
            c * row[f"regularizer/vicreg/{name}"]
            for name, c in {"invariance": 25, "variance": 25, "covariance": 1}.items()
        )
        factors.append(row["regularizer/vicreg/value"] / unweighted)
    assert factors == pytest.approx([0.0, 0.5, 1.0, 1.0], rel=1e-5)


def test_manual_optimization_is_for_the_mixin() -> None:
    class Manual(MixedSiamese):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch))
            optimizer.step()

    with pytest.raises(MisconfigurationException, match=r"Manual optimizes by hand.*anti_collapse_loss"):
        fit(Manual, Regularizer(VICReg(), layer="projector"))
    manual, logger, _ = fit(Manual)
    automatic, _, _ = fit(MixedSiamese)
    assert torch.equal(weights(manual), weights(automatic))
    assert len(curve(logger, "regularizer/vicreg/value")) == 4


def test_too_few_rows_are_left_out_with_one_warning() -> None:
    kwargs = {"batches": 2, "batch_size": 1}
    plain, _, _ = fit(Siamese, **kwargs)
    with pytest.warns(UserWarning, match="at least 2 rows over all processes, got 1") as caught:
        model, logger, _ = fit(Siamese, Regularizer(VICReg(), layer="projector"), **kwargs)
    assert sum("at least 2 rows" in str(w.message) for w in caught) == 1
    with pytest.warns(UserWarning, match=r"'vicreg' was left out of a step: .*got 1") as caught:
        mixed, _, _ = fit(MixedSiamese, **kwargs)
    assert sum("at least 2 rows" in str(w.message) for w in caught) == 1
    assert torch.equal(weights(model), weights(plain))
    assert torch.equal(weights(mixed), weights(plain))
    assert not logger.rows


@pytest.mark.parametrize("how", ["module", "layer", "layer in place"])
def test_compiled(how: str) -> None:
    def compiled(make: Callable[[], LightningModule]) -> Callable[[], LightningModule]:
        def build() -> LightningModule:
            torch.compiler.reset()
            model = make()
            if how == "module":
                return torch.compile(model, backend="eager")
            if how == "layer":
                model.projector = torch.compile(model.projector, backend="eager")
            else:
                model.projector.compile(backend="eager")
            return model

        return build

    plain, plain_log, _ = fit(Siamese, Regularizer(VICReg(), layer="projector"))
    made = []
    model, logger, _ = fit(
        lambda: made.append(compiled(Siamese)()) or made[0], Regularizer(VICReg(), layer="projector")
    )
    mixed, mixed_log, _ = fit(compiled(lambda: MixedSiamese(vicreg=(LinearWarmup(1.0, 0), VICReg()))))
    for other, log in ((model, logger), (mixed, mixed_log)):
        torch.testing.assert_close(weights(other), weights(plain))
        assert [step for step, _ in log.rows] == [step for step, _ in plain_log.rows]
    inner = getattr(model, "_orig_mod", model)
    assert not any(m._forward_hooks for m in inner.modules())


@pytest.mark.parametrize("door", ["callback", "mixin"])
def test_compiled_code_is_not_compiled_again_every_step(door: str) -> None:
    def graphs(batches: int) -> int:
        def backend(module: Any, inputs: Any) -> Any:
            compiled.append(module)
            return module.forward

        compiled: list[Any] = []
        torch.compiler.reset()
        warmup = LinearWarmup(1.0, steps=100)
        if door == "mixin":
            fit(lambda: torch.compile(MixedSiamese(vicreg=(warmup, VICReg())), backend=backend), batches=batches)
        else:
            regularizer = Regularizer(VICReg(), layer="projector", weight=warmup)
            fit(lambda: torch.compile(Siamese(), backend=backend), regularizer, batches=batches)
        return len(compiled)

    expected = {"callback": 1, "mixin": 4}[door]
    assert graphs(2) == graphs(6) == expected


@pytest.mark.parametrize(
    ("name", "how"), [("CorInfoMax", "plain"), ("WMSE", "plain"), ("SIGReg", "plain"), ("SIGReg", "compiled")]
)
def test_losses_of_the_mixin_remember_nothing_of_validation(name: str, how: str) -> None:
    loss = LOSSES[name](**CASES[name].doors)
    model = {1: MixedSingle, 2: MixedSiamese}[loss.views](it=loss)
    batch = torch.randn(32, 16)
    model.training_step(batch)
    before = remembered(loss)
    model.eval()
    torch.compiler.reset()
    step = torch.compile(model.training_step, backend="aot_eager") if how == "compiled" else model.training_step
    value = step(batch)  # as a shared step of `validation_step`
    torch.testing.assert_close(remembered(loss), before, rtol=0, atol=0)
    torch.testing.assert_close(step(batch), value)
    assert loss.training
    model.train().training_step(batch)
    assert any(not torch.equal(kept, before[key]) for key, kept in remembered(loss).items())


def test_wrong_base_order_is_refused() -> None:
    for base in (LightningModule, pytorch_lightning.LightningModule, Siamese):
        with pytest.raises(TypeError, match="mixin goes first"):
            type("Bad", (base, AntiCollapseMixin), {})
        type("Good", (AntiCollapseMixin, base), {})


def test_mixin_without_a_trainer() -> None:
    class Plain(AntiCollapseMixin, nn.Module):
        pass

    z = torch.randn(8, 4)
    for model in (Plain(), MixedSiamese()):
        model.set_regularizers({"variance": (2.0, VarianceLoss()), "covariance": (lambda step: 3.0, CovarianceLoss())})
        expected = 2 * VarianceLoss()(z) + 3 * CovarianceLoss()(z)
        torch.testing.assert_close(model.anti_collapse_loss(z), expected)
        torch.testing.assert_close(model.anti_collapse_loss(z, names=["variance"]), 2 * VarianceLoss()(z))
        model.set_regularizers({})
        assert model.anti_collapse_loss(z) == 0


@pytest.mark.parametrize("how", ["plain", "compiled"])
def test_schedules_without_a_trainer_count_evaluations_in_training_mode(how: str) -> None:
    """Each regularizer its own, since not every step evaluates all; without a graph of its own for every weight."""
    z = torch.randn(8, 4)
    model = MixedSingle(early=(LinearWarmup(1.0, steps=2), VarianceLoss()), late=(LinearWarmup(1.0, 4), VarianceLoss()))
    graphs = CompileCounter()
    torch.compiler.reset()
    loss = torch.compile(model.anti_collapse_loss, backend=graphs) if how == "compiled" else model.anti_collapse_loss
    full = VarianceLoss()(z)
    for step, factor in enumerate([0.0, 0.5, 1.0, 1.0]):
        torch.testing.assert_close(loss(z, names=["early"]), factor * full)
        if step == 1:
            count = graphs.frame_count
    assert graphs.frame_count == count
    torch.testing.assert_close(loss(z, names=["late"]), 0 * full)
    model.eval()
    for _ in range(2):
        torch.testing.assert_close(loss(z, names=["late"]), full / 4)


def test_mixin_misuse_is_refused() -> None:
    class Forgot(AntiCollapseMixin, nn.Module):
        pass

    z = torch.randn(8, 4)
    with pytest.raises(MisconfigurationException, match=r"Forgot.*has no regularizers. Call"):
        Forgot().anti_collapse_loss(z)
    with pytest.raises(MisconfigurationException, match=r"'vicreg' \(VICReg\) takes 2 view\(s\), got 1"):
        MixedSiamese().anti_collapse_loss(z)
    for names in (["x"], "vicreg"):
        with pytest.raises(MisconfigurationException, match=r"`names` must be a list out of \['vicreg'\], got"):
            MixedSiamese().anti_collapse_loss(z, z, names=names)
    for entry in (1.0, VICReg, (VICReg(), 1.0), (1.0, VICReg(), 2)):
        with pytest.raises(ValueError, match=r"`regularizers\['a'\]` must be a module or .*, got .*Pass"):
            MixedSiamese(a=entry)
    for weight in ("0.1", None):
        with pytest.raises(ValueError, match=r"`weight` must be a number or a function .*, got .* `LinearWarmup`"):
            MixedSiamese(a=(weight, VICReg()))
        with pytest.raises(ValueError, match=r"`weight` must be a number or a function"):
            Regularizer(VICReg(), layer="projector", weight=weight)
    for weight in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"`weight` must be finite, got {weight}"):
            MixedSiamese(a=(weight, VICReg()))
        with pytest.raises(ValueError, match=f"`weight` must be finite, got {weight}"):
            Regularizer(VICReg(), layer="projector", weight=weight)
    for name in ("a.b", "keys", ""):
        MixedSiamese().set_regularizers({name: VICReg()})  # stays out of the module tree
        with pytest.raises(ValueError, match=rf"`regularizers\['{name}'\]` has parameters, .* Choose another name"):
            MixedSiamese().set_regularizers({name: LongTailCollapse(3, 8)})
    with pytest.raises(ValueError, match=r"`regularizers` must be losses by name, got VICReg. Write"):
        MixedSiamese().set_regularizers(VICReg())
    for loss in (VICReg, "vicreg", variance_loss):
        with pytest.raises(ValueError, match=r"`loss` must be a module, got .*. Pass an instance"):
            Regularizer(loss, layer="projector")
    with pytest.raises(ValueError, match=r"`layer` must be the name of a layer, got \['projector'\]. Pass"):
        Regularizer(VICReg(), layer=["projector"])
    with pytest.raises(ValueError, match="VarianceLoss takes 1, got chunk=2"):
        Regularizer(VarianceLoss(), layer="projector", chunk=2)


def test_a_second_choice_takes_the_place_of_the_first() -> None:
    model = MixedSiamese(means=LongTailCollapse(3, 8))
    assert "trained_regularizers.means.means" in model.state_dict()
    model.set_regularizers({"vicreg": VICReg()})
    assert list(model.state_dict()) == list(Siamese().state_dict())


def test_in_the_other_lightning_package() -> None:
    class Lit(AntiCollapseMixin, pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 8)
            self.set_regularizers({"variance": VarianceLoss()})

        def training_step(self, batch: Tensor) -> Tensor:
            return self.anti_collapse_loss(self.layer(batch))

        configure_optimizers = Siamese.configure_optimizers
        lr = 0.05

    logger = Memory()
    trainer = pytorch_lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        log_every_n_steps=1,
        callbacks=[Regularizer(VarianceLoss(), layer="layer", name="again")],
    )
    trainer.fit(Lit(), DataLoader(torch.randn(32, 16), batch_size=16))
    assert {"regularizer/variance/value", "regularizer/again/value"} <= set(trainer.callback_metrics)
    assert not logger.rows
