"""Heads that grow: old rows stay, optimizers and checkpoints follow, and penalties leave new rows free."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import WeightPenalty, fit_tasks
from lightning_collapse.layers import GrowingClassifier, grow_head
from lightning_collapse.penalties import EWC, MAS, SynapticIntelligence
from tests.toys import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")


@pytest.mark.parametrize("init", ["default", "old"])
def test_old_rows_stay_and_new_ones_are_drawn(init):
    torch.manual_seed(0)
    head = GrowingClassifier(400, 30, init=init)
    with torch.no_grad():
        head.weight.mul_(7.0)
        head.bias.fill_(2.0)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    head.grow(60)
    assert all(torch.equal(p[:30], before[name]) for name, p in head.named_parameters())
    spread = float(head.weight[30:].detach().square().mean().sqrt())
    old = float(before["weight"].square().mean().sqrt())
    assert spread == pytest.approx(old if init == "old" else 1 / (3 * 400) ** 0.5, rel=0.03)
    assert head.bias[30:].eq(2.0).all() == (init == "old")
    assert (head.classes, pickle.loads(pickle.dumps(head)).classes, copy.deepcopy(head).classes) == (60, 60, 60)


@pytest.mark.parametrize("kind", [torch.optim.Adam, lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9)])
def test_old_rows_are_trained_as_if_the_head_had_not_grown(kind):
    """New logits are kept out of the loss, so that old rows see what they would have seen."""

    def train(grows):
        torch.manual_seed(0)
        head = GrowingClassifier(4, 3)
        optimizer = kind(head.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        x, y = torch.randn(16, 4), torch.randint(3, (16,))
        for step in range(6):
            if grows and step == 3:
                head.grow(5, [optimizer])
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(x)[:, :3], y).backward()
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**6)
        assert {id(p) for p in optimizer.state} == {id(p) for p in head.parameters()}
        return head

    still, grown = train(False), train(True)
    torch.testing.assert_close(grown.weight[:3], still.weight)
    torch.testing.assert_close(grown.bias[:3], still.bias)


def test_checkpoints_of_smaller_and_larger_heads():
    small, large = nn.Sequential(GrowingClassifier(4, 2)), nn.Sequential(GrowingClassifier(4, 5))
    resumed = nn.Sequential(GrowingClassifier(4, 2))
    resumed.load_state_dict(large.state_dict())
    assert torch.equal(resumed[0].weight, large[0].weight)
    assert resumed[0].classes == 5
    before = large[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="`0` has 5 classes, and the checkpoint 2: it fills the first rows"):
        large.load_state_dict(small.state_dict())
    assert torch.equal(large[0].weight[:2], small[0].weight)
    assert torch.equal(large[0].weight[2:], before[2:])
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load_state_dict(nn.Sequential(nn.Linear(3, 2)).state_dict())


@pytest.mark.parametrize(
    ("head", "kwargs", "message"),
    [
        (nn.Linear(4, 3), {"classes": 2}, "must be at least 3, those there are, got 2"),
        (nn.Linear(4, 3), {"classes": 4.5}, "`classes` must be an integer"),
        (nn.Linear(4, 3), {"classes": 4, "init": "zero"}, "`init` must be one of"),
        (nn.Conv2d(4, 3, 1), {"classes": 4}, "takes a linear layer, got Conv2d"),
    ],
)
def test_what_cannot_grow_is_refused(head, kwargs, message):
    with pytest.raises(ValueError, match=message):
        grow_head(head, **kwargs)


def _data(task):
    """Two classes more in every task."""
    generator = torch.Generator().manual_seed(task)
    y = torch.randint(2 * task, 2 * task + 2, (24,), generator=generator)
    x = torch.randn(24, 4, generator=generator) + nn.functional.one_hot(y % 4, 4)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Incremental(LightningModule):
    """Grows where a fit starts: its loader says which classes there are."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(4, 6), GrowingClassifier(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))

    def setup(self, stage):
        loader = self.trainer.fit_loop._data_source.instance
        self.head.grow(max(self.head.classes, int(loader.dataset.tensors[1].max()) + 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


PENALTIES = [
    lambda: EWC(10.0, estimator="empirical"),
    lambda: EWC(10.0, estimator="empirical", online=True),
    lambda: MAS(1.0),
    lambda: SynapticIntelligence(1.0),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=["ewc", "online", "mas", "si"])
def test_a_penalty_pulls_old_rows_and_leaves_new_ones_free(penalty, tmp_path):
    callback, model = WeightPenalty(penalty(), name="it"), Incremental()

    def trainer():
        return Trainer(**{**QUIET, "logger": False, "max_epochs": 2}, callbacks=[callback])

    fit_tasks(trainer, model, [_data(0)], directory=tmp_path)
    model.head.grow(4)
    parameters = dict(model.named_parameters())
    callback.penalty.start(parameters)
    importance = callback.penalty.state["importance"]
    assert importance["head.weight"].shape == (4, 6)
    assert not importance["head.weight"][2:].any()
    assert importance["head.weight"][:2].any()
    before = callback.penalty.value(parameters).item()
    with torch.no_grad():
        model.head.weight[2:] += 1.0
    assert callback.penalty.value(parameters).item() == before

    # goes on where it was, from the files of the first task and a model that was built for it
    fresh, resumed = Incremental(), WeightPenalty(penalty(), name="it")
    fit_tasks(
        lambda: Trainer(**{**QUIET, "logger": False, "max_epochs": 2}, callbacks=[resumed]),
        fresh,
        [_data(0), _data(1), _data(2)],
        directory=tmp_path,
    )
    assert fresh.head.classes == 6
    assert resumed.task_index == 3
    assert not resumed.containment.failed
    again, back = Incremental(), WeightPenalty(penalty(), name="it")
    fit_tasks(
        lambda: Trainer(**{**QUIET, "logger": False, "max_epochs": 2}, callbacks=[back]),
        again,
        [_data(0), _data(1), _data(2)],
        directory=tmp_path,
    )
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fresh.parameters(), strict=True))


def test_growth_within_a_fit_is_seen_by_a_penalty():
    """At the start of an epoch, with the optimizer told."""

    class Within(Incremental):
        def setup(self, stage):
            self.head.grow(6)

        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.head.grow(8, [self.optimizers()])

    callback = WeightPenalty(EWC(10.0, estimator="empirical"))
    model = Within()
    for _ in range(2):
        trainer = Trainer(**{**QUIET, "logger": False, "max_epochs": 2}, callbacks=[callback])
        trainer.fit(model, _data(1))
        model.setup = lambda stage: None
        model.on_train_epoch_start = lambda: model.head.grow(10, [model.optimizers()])
    assert not callback.containment.failed
    assert callback.penalty.state["importance"]["head.weight"].shape == (10, 6)
    assert trainer.optimizers[0].param_groups[0]["params"][2] is model.head.weight
