"""A loss that remembers goes on, in a resumed run, as if there had been no interruption: through both doors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from lightning_collapse import AntiCollapseMixin, Regularizer
from lightning_collapse.callbacks.guard.rollback import Rollback
from lightning_collapse.layers import ETFClassifier
from lightning_collapse.losses import BalancedSoftmax, CorInfoMax, DotRegression, SIGReg, VICReg
from lightning_collapse.losses.support.state import recall, remembered
from lightning_collapse.utilities.registry import LOSSES
from tests.integration.siamese import MixedSiamese, MixedSingle, Siamese, Single, fit, weights
from tests.losses.cases import CASES

SETTINGS = {name: CASES[name].doors for name in sorted(LOSSES) if remembered(LOSSES[name]())}
# without momentum their stream is empty
SETTINGS |= {name: {"momentum": 0.9} for name in ("EffectiveRankHinge", "LogDetBarrier")}


def make(name: str) -> nn.Module:
    return LOSSES[name](**SETTINGS[name])


def run(door: str, loss: Callable[[], nn.Module], **kwargs: Any) -> tuple[LightningModule, Any]:
    views = loss().views
    kwargs |= {"batches": 2, "batch_size": 32}
    if door == "mixin":
        mixed = {1: MixedSingle, 2: MixedSiamese}[views]
        model, _, trainer = fit(lambda: mixed(it=(0.01, loss())), **kwargs)
    else:
        plain = {1: Single, 2: Siamese}[views]
        model, _, trainer = fit(plain, Regularizer(loss(), layer="projector", weight=0.01), **kwargs)
    return model, trainer


def test_who_remembers() -> None:
    assert set(SETTINGS) >= {"CorInfoMax", "EffectiveRankHinge", "LogDetBarrier", "SIGReg", "VISReg", "WMSE"}


@pytest.mark.parametrize("door", ["callback", "mixin"])
@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_run_is_the_uninterrupted_one(name: str, door: str, tmp_path: Path) -> None:
    whole, _ = run(door, lambda: make(name), max_epochs=2)
    half, trainer = run(door, lambda: make(name), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(door, lambda: make(name), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights(resumed), weights(whole))
    assert list(resumed.state_dict()) == list(Siamese().state_dict())

    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    if door == "mixin":
        del checkpoint["anti_collapse_memory"]
    else:
        checkpoint["callbacks"] = {}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    forgot, _ = run(door, lambda: make(name), max_epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert not torch.equal(weights(forgot), weights(whole))
    assert not torch.equal(weights(forgot), weights(half))


def test_resumed_run_may_begin_with_a_step_that_does_not_fit(tmp_path: Path) -> None:
    class OnceTooOften(Siamese):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch)
            late = self.current_epoch == 1 and batch_idx == 0
            return loss + self.projector(self.encoder(batch)).mean() if late else loss

    def go(**kwargs: Any) -> tuple[LightningModule, Any]:
        model, _, trainer = fit(OnceTooOften, Regularizer(VICReg(), layer="projector"), batches=2, **kwargs)
        return model, trainer

    with pytest.warns(UserWarning, match=r"there were 3.*go without the term"):
        whole, _ = go(max_epochs=2)
    _, trainer = go(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.warns(UserWarning, match=r"there were 3.*go without the term"):
        resumed, _ = go(max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("door", ["callback", "mixin"])
def test_rollback_brings_the_memory_back(door: str, tmp_path: Path) -> None:
    class Back(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            steps.append(int(loss.step))
            if batch_idx == 1:
                rollback.remember(trainer, pl_module, batch_idx, str(tmp_path))
            if batch_idx == 3:
                assert rollback.restore(trainer, pl_module, batch_idx)
                steps.append(int(loss.step))

    rollback, loss, steps = Rollback(), SIGReg(), []
    door_of_it = [Regularizer(loss, layer="projector")] if door == "callback" else []
    with pytest.warns(UserWarning, match="are those of step 1 again"):
        fit(Single if door_of_it else lambda: MixedSingle(it=loss), *door_of_it, Back(), batches=5)
    assert steps == [1, 2, 3, 4, 2, 3]


def test_state_keys_tell_regularizers_apart() -> None:
    regularizers = [
        Regularizer(SIGReg(), layer="encoder"),
        Regularizer(SIGReg(), layer="projector"),
        Regularizer(SIGReg(), layer="encoder", name="other"),
    ]
    assert len({regularizer.state_key for regularizer in regularizers}) == 3
    assert Regularizer(SIGReg(seed=1), layer="encoder").state_key == regularizers[0].state_key


def test_a_loss_without_memory_leaves_the_checkpoint_alone() -> None:
    assert Regularizer(VICReg(), layer="encoder").state_dict() == {}
    checkpoint: dict[str, Any] = {}
    MixedSiamese().on_save_checkpoint(checkpoint)
    assert checkpoint == {}


def test_other_names_and_other_checkpoints() -> None:
    def step(model: MixedSiamese, name: str) -> int:
        return int(model.regularizers[name][1].step)

    model, checkpoint = MixedSiamese(a=SIGReg(), b=SIGReg()), {}
    model.regularizers["a"][1].step += 3
    model.regularizers["b"][1].step += 5
    model.on_save_checkpoint(checkpoint)
    other = MixedSiamese(b=SIGReg(), c=SIGReg(), vicreg=VICReg())
    other.regularizers["c"][1].step += 1
    other.on_load_checkpoint(checkpoint)
    assert (step(other, "b"), step(other, "c")) == (5, 1)
    other.on_load_checkpoint({})
    assert (step(other, "b"), step(other, "c")) == (5, 1)


def test_hooks_of_the_module_run_too() -> None:
    class Hooked(Siamese):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["mine"] = 1

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.mine = checkpoint["mine"]

    class Both(AntiCollapseMixin, Hooked):  # before it chooses any regularizer
        pass

    checkpoint: dict[str, Any] = {}
    Both().on_save_checkpoint(checkpoint)
    model = Both()
    model.on_load_checkpoint(checkpoint)
    assert model.mine == 1


def test_memory_is_a_copy_both_ways_and_goes_back_to_empty() -> None:
    z = torch.randn(8, 4)
    loss = CorInfoMax()
    empty = remembered(loss)
    assert empty == {"means": None, "covariances": None}
    loss(z, z)
    memory = remembered(loss)
    before = {key: value.clone() for key, value in memory.items()}
    other = CorInfoMax()
    recall(other, memory)
    other.means.zero_()
    loss(z, z)
    assert all(torch.equal(memory[key], before[key]) for key in before)
    recall(other, empty)
    assert other.means is other.covariances is None
    sketch = SIGReg()
    memory = remembered(sketch)
    recall(sketch, memory)
    sketch.step += 1
    assert memory == {"step": torch.zeros((), dtype=torch.int64)}


def test_a_fixed_classifier_is_saved_with_the_model_alone() -> None:
    assert remembered(DotRegression(ETFClassifier(4, 3))) == {}


def test_nested_and_persistent_buffers_are_remembered_and_constants_are_not() -> None:
    class Queue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.zeros(3))
            self.inner = SIGReg()
            self.balanced = BalancedSoftmax([1, 2])

        def forward(self, features: Tensor) -> Tensor:
            return self.inner(features)

    first, second = Queue(), Queue()
    first.queue += 1
    first(torch.randn(8, 4))
    assert set(remembered(first)) == {"queue", "inner.step"}
    recall(second, {**remembered(first), "unknown": torch.ones(1), "balanced.class_counts": torch.ones(2)})
    assert second.queue.tolist() == [1, 1, 1]
    assert second.inner.step == 1
    assert second.balanced.class_counts.tolist() == [1, 2]
