"""Two processes with uneven batches draw the recall between views and the choices of all their rows."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from lightning_collapse import CollapseGuard, CollapseMonitor
from lightning_collapse.functional import assignment_null, assignment_perplexity, recall_at_1
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, batches

ROWS = 32, 20


class Dino(Toy):
    """Two views choose prototypes; the second process has fewer samples."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 24)

    def training_step(self, batch, batch_idx):
        batch = batch[: ROWS[self.global_rank]]
        self.features = [self.encoder(view) for view in (batch, batch + 0.1 * batch.roll(1, 1))]
        self.scores = [self.head(features) for features in self.features]
        chosen = (self.scores[1].detach() / 0.04).softmax(1)
        return -(chosen * (self.scores[0] / 0.1).log_softmax(1)).sum(1).mean()


def _check(rank):
    torch.manual_seed(0)
    model, keeper, guard = Dino(), PointKeeper(), CollapseGuard(action="log")
    monitor = CollapseMonitor(["encoder", "head"], every_n_steps=1, rows=1000)
    options = {**QUIET, "devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), "logger": MemoryLogger()}
    trainer = Trainer(**options, use_distributed_sampler=False, callbacks=[monitor, guard, keeper], max_steps=1)
    trainer.fit(model, batches(2, seed=rank))
    everyone = [None, None]
    own = [[part.detach() for part in parts] for parts in (model.features, model.scores)]
    torch.distributed.all_gather_object(everyone, (repr(keeper.points), guard.state_dict(), own))
    assert everyone[0][:2] == everyone[1][:2]  # the same numbers and judgements on both, bit by bit
    of_scores = torch.cat([part for _, _, (_, scores) in everyone for part in scores])
    [chosen] = keeper.curve("collapse/head/assignment_perplexity")
    assert chosen.value == pytest.approx(assignment_perplexity(of_scores).item())
    assert (chosen.n, chosen.null) == (2 * sum(ROWS), assignment_null(2 * sum(ROWS), 24))
    [found] = keeper.curve("views/encoder/recall_at_1")
    hits = sum(n * recall_at_1(*features).item() for n, (_, _, (features, _)) in zip(ROWS, everyone, strict=True))
    assert found.value == pytest.approx(hits / sum(ROWS))
    assert (found.n, found.null) == (sum(ROWS), pytest.approx(2 / sum(ROWS)))


def test_two_processes():
    on_two_processes(_check)
