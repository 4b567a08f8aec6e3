"""Two processes with uneven batches draw the codes of all their rows; one of them alone may choose any. Running means are of both."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from lightning_collapse import CollapseMonitor
from lightning_collapse.functional import assignment_null, assignment_perplexity
from lightning_collapse.layers import EMAVectorQuantizer
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


def _running_means(choose, wrap=lambda net: net):
    """State of a quantizer after some steps with a part of their rows; one step of the second process has none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), EMAVectorQuantizer(64, 8, decay=0.5, restart=True))
    wrapped = wrap(net)
    for seed, second in enumerate([20, 7, 0, 20] * 10):
        rows = 100 + 9 * torch.randn(32 + second, 8, generator=torch.Generator().manual_seed(seed))
        rows[3, 3] = torch.nan
        quantized, _, loss = wrapped(choose(rows))
        (quantized.mean() + loss).backward()
    return dict(net[1].state_dict())


def _check_running_means(rank, alone):
    part = slice(32) if rank == 0 else slice(32, None)
    own = _running_means(lambda rows: rows[part], DistributedDataParallel)
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, own)
    assert all(torch.equal(everyone[0][name], everyone[1][name]) for name in own)
    assert own["restarts"].sum() > 64
    for name, state in own.items():
        torch.testing.assert_close(state, alone[name], rtol=1e-4, atol=1e-5)


def _check(rank, alone):
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
    _check_running_means(rank, alone)


def test_two_processes():
    on_two_processes(_check, _running_means(lambda rows: rows))
