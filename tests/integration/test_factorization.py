"""Models of embeddings alone: a factorization whose users all end with one list, and a healthy one."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseGuard, CollapseMonitor
from tests.toys import fit

USERS, ITEMS = 200, 100


class Factorization(LightningModule):
    """Preferred items above others, by the product of two vectors and a number of each item (BPR)."""

    def __init__(self, decay):
        super().__init__()
        self.user, self.item, self.popular = nn.Embedding(USERS, 16), nn.Embedding(ITEMS, 16), nn.Embedding(ITEMS, 1)
        self.decay = decay
        for table in (self.user, self.item, self.popular):
            nn.init.normal_(table.weight, std=0.1)

    def score(self, user, item):
        return (self.user(user) * self.item(item)).sum(1) + self.popular(item).squeeze(1)

    def training_step(self, batch, batch_idx):
        user, item, other = batch
        return -nn.functional.logsigmoid(self.score(user, item) - self.score(user, other)).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02, weight_decay=self.decay)


@pytest.mark.parametrize(("decay", "kinds"), [(1e-5, set()), (0.05, {"complete_collapse"})])
def test_users_that_all_get_one_list(decay, kinds):
    torch.manual_seed(0)
    tastes = torch.randn(USERS, 6) @ torch.randn(6, ITEMS) + 0.7 * torch.randn(ITEMS)
    user = torch.randint(USERS, (256 * 90,))
    item = tastes.softmax(1)[user].multinomial(1).squeeze(1)
    data = TensorDataset(user, item, torch.randint(ITEMS, user.shape))
    guard = CollapseGuard(action="log")
    trainer = fit(Factorization(decay), [CollapseMonitor(every_n_steps=3), guard], DataLoader(data, 256))
    assert {verdict.kind for verdict in guard.verdicts} == kinds
    assert {verdict.layer for verdict in guard.verdicts} <= {"user", "item"}
    assert guard.task.name == "self-supervised"
    drawn = {key.split("/")[1] for key in trainer.callback_metrics if key.startswith("collapse/")}
    assert drawn == {"user", "item"}
