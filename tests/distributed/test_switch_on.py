"""Two processes raise the weight of a regularizer at the same steps."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_collapse import CollapseGuard, CollapseMonitor, Regularizer, SwitchOn
from lightning_collapse.losses import VarianceLoss
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper, Toy, batches


class Shrinking(Toy):
    """Loses all spread but one direction's, step by step."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(16, 32)
        self.head = nn.Linear(32, 2)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.encoder.weight[1:] *= 0.1
        return super().training_step(batch, batch_idx)


def _check(rank):
    torch.manual_seed(0)
    guard, keeper = CollapseGuard(action=SwitchOn("variance", ramp=4)), PointKeeper()
    monitor, regularizer = CollapseMonitor(["encoder"], every_n_steps=1), Regularizer(VarianceLoss(), layer="encoder")
    options = {**QUIET, "devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), "logger": False}
    trainer = Trainer(
        **options, use_distributed_sampler=False, callbacks=[regularizer, monitor, guard, keeper], log_every_n_steps=1
    )
    trainer.fit(Shrinking(), batches(12, seed=rank))
    shares = torch.tensor([point.value for point in keeper.curve("guard/switch_on/variance")])
    added = torch.tensor([point.value for point in keeper.curve("regularizer/variance/value")])
    assert len(guard.verdicts) == 1
    assert 0 in shares
    assert 1 in shares
    for mine in (shares, added):
        theirs = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(theirs, mine)
        assert torch.equal(*theirs)
    assert added[0] == 0 < added[-1]


def test_two_processes():
    on_two_processes(_check)
