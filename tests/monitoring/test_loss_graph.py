"""What the graph of a loss tells: roles of the batch's tensors, the task, and the layer compared with the targets."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard
from lightning_collapse.monitoring import CallRecord, read_loss
from tests.monitoring.loss_cases import ROWS, Net
from tests.toys import Claims, fit


class Lit(LightningModule):
    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.step = Net(), step

    def training_step(self, batch, batch_idx):
        return self.step(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)


def read(net, step, batch):
    record = CallRecord(net)
    record.armed = True
    loss = step(net, batch)
    record.armed = False
    use = read_loss(loss, batch, record)
    record.clear()
    return use


@pytest.mark.parametrize("name", ROWS)
def test_the_table(name):
    step, batch, task, directions, outputs, roles = ROWS[name]
    torch.manual_seed(0)
    use = read(Net(), step, batch)
    assert use.task == task, use.why
    assert dict(use.roles) == roles
    assert set(use.compared) == outputs
    assert use.directions == directions
    assert use.why


@pytest.mark.filterwarnings("ignore:`.*Monitor`. the fit ended before")
@pytest.mark.parametrize("name", ROWS)
def test_the_table_in_a_trainer(name):
    step, batch, task, directions, outputs, _ = ROWS[name]
    guard = CollapseGuard(action="log")
    lit = Lit(step)
    fit(lit, [Claims(), guard], DataLoader([batch, batch], batch_size=None))
    assert (guard.task.name, guard.task.directions) == (task, directions)
    assert guard.task.outputs == {f"net.{layer}" for layer in outputs}
    bare = Lit(step)
    fit(bare, [], DataLoader([batch, batch], batch_size=None))
    assert all(torch.equal(one, other) for one, other in zip(lit.parameters(), bare.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lit.modules())
