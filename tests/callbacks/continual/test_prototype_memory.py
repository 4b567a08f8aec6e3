"""Prototypes of every task's classes: what is kept, what is drawn, what a run does not notice, and resuming."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import ContinualMixin, NeuralCollapseMonitor, PrototypeMemory, TaskBoundary
from lightning_collapse.functional.prototypes import prototype_logits, sample_prototypes
from tests.continual import Learner, task
from tests.losses.test_no_wait import NoWait
from tests.toys import QUIET, weights

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")


class Rehearsing(Learner):
    """Has the head tell pseudo-features of old classes too."""

    def __init__(self, memory: PrototypeMemory) -> None:
        super().__init__()
        self.body[3] = nn.Identity()  # no number of the run is drawn
        self.memory = memory
        self.drawn: list[Tensor] = []

    def training_step(self, batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if (drawn := self.memory.sample(5)) is not None:
            self.drawn.append(drawn[0])
            loss = loss + nn.functional.cross_entropy(self.head(drawn[0]), drawn[1])
        return loss


def loader(seed: int, *classes: int, shuffle: bool = False) -> DataLoader:
    x, y = task(seed).tensors
    kept = torch.isin(y, torch.tensor(classes or (0, 1, 2)))
    return DataLoader(TensorDataset(x[kept], y[kept]), batch_size=8, shuffle=shuffle)


def fit(model: LightningModule, *callbacks, data: DataLoader, ckpt_path=None, **kwargs) -> Trainer:
    trainer = Trainer(**{**QUIET, "logger": False, "callbacks": list(callbacks), **kwargs})
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


def means(model: Learner, data: DataLoader, normalize: bool) -> dict[int, Tensor]:
    x, y = data.dataset.tensors
    with torch.no_grad():
        features = model.body.eval()(x).double()
    model.body.train()
    features = nn.functional.normalize(features, dim=1) if normalize else features
    found = {int(c): features[y == c].mean(dim=0) for c in y.unique()}
    return {c: nn.functional.normalize(mean, dim=0) if normalize else mean for c, mean in found.items()}


@pytest.mark.parametrize("normalize", [True, False])
def test_classes_of_a_task_get_their_mean_and_others_keep_theirs(normalize: bool) -> None:
    memory, model = PrototypeMemory("body", normalize=normalize), Learner()
    assert memory.sample(3) is None
    fit(model, memory, data=loader(1, 0))
    first, radius = means(model, loader(1, 0), normalize), memory.radius.clone()
    assert memory.prototypes.shape == (1, 12)
    fit(model, memory, data=loader(2, 2))
    second = means(model, loader(2, 2), normalize)
    assert memory.prototypes[1].isnan().all()
    for c, mean in (first | second).items():
        torch.testing.assert_close(memory.prototypes[c], mean.float(), rtol=1e-5, atol=1e-6)
    assert torch.equal(memory.radius, radius)
    fit(model, memory, data=loader(3, 0))
    torch.testing.assert_close(memory.prototypes[0], means(model, loader(3, 0), normalize)[0].float())
    features, labels = memory.sample(40)
    assert features.isfinite().all()
    assert set(labels.tolist()) <= {0, 2}


def test_a_run_does_not_notice() -> None:
    found = []
    for callbacks in ([], [PrototypeMemory("body")]):
        torch.manual_seed(0)
        model = Learner()
        for seed in (1, 2):
            fit(model, *callbacks, data=loader(seed, shuffle=True))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        found.append((weights(model), torch.get_rng_state()))
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())
    assert torch.equal(found[0][1], found[1][1])


def test_draws_are_another_each_time_and_of_a_generator_of_their_own() -> None:
    memory, twin = PrototypeMemory("body"), PrototypeMemory("body", seed=1)
    for each in (memory, twin):
        fit(Learner(), each, data=loader(1))
    state = torch.get_rng_state()
    first, second, other = memory.sample(6)[0], memory.sample(6)[0], twin.sample(6)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)
    memory._draws = 0
    assert torch.equal(memory.sample(6)[0], first)
    still, labels = sample_prototypes(memory.prototypes, 0.0, 6)
    assert torch.equal(still, memory.prototypes[labels])


class Saver(Callback):
    """Saves once in the middle of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 3):
            trainer.save_checkpoint(self.path)


OPTIONS = [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "accumulated", "bf16"])
def test_resumed_in_the_middle_of_a_task_is_bit_equal(tmp_path: Path, options) -> None:
    x, y = task(2).tensors
    same = DataLoader(TensorDataset(x[:8].repeat(6, 1), y[:8].repeat(6)), batch_size=8)  # whichever batch comes next
    torch.manual_seed(0)
    memory = PrototypeMemory("body")
    model = Rehearsing(memory)
    fit(model, memory, data=loader(1, 0, 1), **options)
    fit(model, memory, Saver(tmp_path / "middle.ckpt"), data=same, max_epochs=3, **options)

    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(Learner().state_dict())
    resumed = PrototypeMemory("body")
    again = Rehearsing(resumed)
    fit(again, resumed, data=same, max_epochs=3, ckpt_path=tmp_path / "middle.ckpt", **options)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(model).items())
    assert len(again.drawn) == 8
    assert all(map(torch.equal, again.drawn, model.drawn[-8:]))
    assert torch.equal(resumed.prototypes.nan_to_num(), memory.prototypes.nan_to_num())
    assert resumed.state_dict()["draws"] == memory.state_dict()["draws"] == 18
    assert resumed.task_index == memory.task_index == 2


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_pseudo_features_fit_the_head_in_any_precision(precision) -> None:
    memory = PrototypeMemory("body")
    model = Rehearsing(memory)
    for seed in (1, 2):
        fit(model, memory, data=loader(seed), precision=precision)
    assert {rows.dtype for rows in model.drawn} == {model.head.weight.dtype}


def test_draws_wait_for_nothing() -> None:
    memory = PrototypeMemory("body")
    fit(Learner(), memory, data=loader(1))
    with NoWait():
        features, _ = memory.sample(4)
        prototype_logits(features, memory.prototypes)


def test_within_one_fit_and_beside_a_monitor_of_the_head() -> None:
    memory = PrototypeMemory("head:input")
    model = Rehearsing(memory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the monitor says that a head that gets other rows too cannot be paired
        fit(model, memory, TaskBoundary(every_n_epochs=1), NeuralCollapseMonitor(), data=loader(1), max_epochs=3)
    assert memory.task_index == 3
    assert memory.prototypes.shape == (3, 12)


def test_data_and_labels_may_be_said() -> None:
    model = Learner()
    memory = PrototypeMemory(
        "bod?",
        loader=lambda: [{"image": loader(5).dataset.tensors[0], "kind": loader(5).dataset.tensors[1]}],
        labels=lambda batch: batch["kind"],
        inputs=lambda module, batch: module(batch["image"]),
        normalize=False,
    )
    fit(model, memory, data=loader(1))
    for c, mean in means(model, loader(5), False).items():
        torch.testing.assert_close(memory.prototypes[c], mean.float())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"loader": [(torch.zeros(4, 9), torch.zeros(4).long())]}, "a pass over `loader` failed"),
        ({"labels": lambda batch: None}, "no integer labels"),
        ({"labels": lambda batch: 0 * batch[1] - 100}, "since no row had a class"),
        ({"loader": [(torch.full((4, 6), torch.nan), torch.zeros(4).long())]}, "since no row had a class"),
        ({"labels": lambda batch: batch[1][:1]}, "1 labels"),
        ({"labels": lambda batch: batch[1] + 100_000}, "`labels` name class 100002, and there is room for 65536"),
    ],
)
def test_what_fails_once_training_runs_is_a_warning(wrong, told: str) -> None:
    memory = PrototypeMemory("body", **wrong)
    with pytest.warns(UserWarning, match=f"leaves no prototypes|{told}") as warned:
        fit(Learner(), memory, data=loader(1))
    messages = [str(warning.message) for warning in warned]
    assert sum(told in message for message in messages) == 1  # and not one for every batch
    assert sum("task 0 leaves no prototypes" in message for message in messages) == 1
    assert memory.prototypes is None
    assert memory.sample(4) is None
    assert memory.task_index == 1


def test_another_width_drops_what_no_longer_fits() -> None:
    memory, model = PrototypeMemory("body"), Learner()
    fit(model, memory, data=loader(1))
    model.body, model.head = nn.Sequential(nn.Linear(6, 7), nn.ReLU()), nn.Linear(7, 3)
    with pytest.warns(UserWarning, match="the layer has 7 features now, and prototypes of"):
        fit(model, memory, data=loader(2))
    assert memory.prototypes.shape == (3, 7)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"`layer` must be a name, .* got 3"):
        PrototypeMemory(3)
    with pytest.raises(ValueError, match="`labels` takes a function from a batch to its classes, got 'y'"):
        PrototypeMemory("body", labels="y")
    with pytest.raises(ValueError, match="`inputs` takes a function of the module and a batch, got 3"):
        PrototypeMemory("body", inputs=3)
    for layer, told in (("boddy", "Did you mean `body`"), ("*", "must name one layer: it matches 6, as body and")):
        with pytest.raises(MisconfigurationException, match=told):
            fit(Learner(), PrototypeMemory(layer), data=loader(1))
    with pytest.raises(MisconfigurationException, match="the training data are an iterator"):
        fit(Learner(), PrototypeMemory("body"), data=iter(loader(1)))


class Mixed(ContinualMixin, Learner):
    """A module that has a task of its own to finish."""


def test_beside_the_mixin() -> None:
    memory = PrototypeMemory("body")
    fit(Mixed(), memory, data=loader(1))
    assert memory.prototypes.isfinite().all()
