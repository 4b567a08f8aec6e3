"""Two processes with uneven batches draw the codes of all their rows; one of them alone may choose any."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import mse_loss

from lightning_collapse import CollapseMonitor
from lightning_collapse.functional import assignment_null, assignment_perplexity
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, batches

ROWS = 32, 20
CODES = 12


class Quantizer(Toy):
    """Rows choose the nearest of some codes; the second process has fewer, and no use for the second codebook."""

    def __init__(self):
        super().__init__()
        self.book = nn.Embedding(CODES, 8)
        self.other = nn.Embedding(CODES, 8).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        features = self.encoder(batch[: ROWS[self.global_rank]])
        self.scores = -torch.cdist(features.detach(), self.book.weight.detach())
        codes = self.book(self.scores.argmax(dim=1))
        if self.global_rank == 0:
            codes = codes + self.other(self.scores.argmax(dim=1))
        return mse_loss(codes, features) + self.head(features).square().mean()


def _check(rank):
    torch.manual_seed(0)
    model, keeper = Quantizer(), PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), "logger": MemoryLogger()}
    callbacks = [CollapseMonitor(every_n_steps=1, rows=1000), keeper]
    trainer = Trainer(**options, use_distributed_sampler=False, callbacks=callbacks, max_steps=1)
    trainer.fit(model, batches(2, seed=rank))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, (repr(keeper.points), model.scores))
    assert everyone[0][0] == everyone[1][0]  # the same numbers on both, bit by bit
    for name, scores in (("book", torch.cat([of for _, of in everyone])), ("other", everyone[0][1])):
        [used] = keeper.curve(f"collapse/{name}/assignment_perplexity")
        assert used.value == pytest.approx(assignment_perplexity(scores).item())
        assert (used.n, used.null) == (len(scores), assignment_null(len(scores), CODES))


def test_two_processes():
    on_two_processes(_check)
