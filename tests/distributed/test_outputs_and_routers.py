"""Two processes with batches of unlike size draw one set of curves of the rows of both."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import LatentMonitor, OutputMonitor, RouterMonitor, StateMonitor
from lightning_collapse.functional import advantage_covariance, latent_readings, latent_sums, output_rows
from lightning_collapse.functional.routing import routing_readings, routing_sums
from lightning_collapse.functional.states import state_statistics
from lightning_collapse.metrics import OutputEntropy, RouterLoad
from lightning_collapse.utilities.features import evenly
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper, weights

SIZES = (5, 9)


class Model(LightningModule):
    """A mixture and a head; the second process has more rows."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7)
        self.gru = nn.GRU(6, 6, batch_first=True)  # over rows, as many as the process has
        self.seen = []

    def training_step(self, batch, batch_idx):
        x = batch[: SIZES[self.global_rank]]
        scores = self.gate(x)
        weight, chosen = scores.softmax(-1).topk(2, dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        x = x + (weight.unsqueeze(2) * outputs.gather(1, chosen.unsqueeze(2).expand(-1, -1, 6))).sum(dim=1)
        x = x + self.gru(x.unsqueeze(0))[0][0]
        self.actions = batch[: len(x), :1].mul(3).long().remainder(7).squeeze(1)
        logits = self.head(self.norm(x))
        self.gains = x.detach().sum(dim=1)
        self.seen.append((scores.detach(), chosen, logits.detach(), self.actions, self.gains))
        return nn.functional.cross_entropy(logits, self.actions)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _everyone(mine):
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _fit(rank, callbacks):
    torch.manual_seed(0)
    model, keeper = Model(), PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": DDPStrategy(process_group_backend="gloo"), "logger": MemoryLogger()}
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(rank))
    trainer = Trainer(**options, use_distributed_sampler=False, callbacks=[*callbacks, keeper])
    trainer.fit(model, DataLoader(rows, batch_size=10))
    return model, keeper


def _halves(module, args, output):
    return output.view(-1, 2, 2)


def _failing(rank, read):
    """On the second process it raises from the third call on: as one that reads what a batch may lack."""
    calls = []

    def fails(*args):
        calls.append(args)
        if rank and len(calls) > 2:
            raise ValueError("on one process")
        return read(*args)

    return fails


def _check_failing_readers(rank):
    def route(module, args, scores):
        return scores, scores.topk(2, dim=-1).indices

    monitors = [
        RouterMonitor(["gate"], read=_failing(rank, route), every_n_steps=2, batches=1),
        LatentMonitor(["gate"], read=_failing(rank, lambda scores: scores.chunk(2, dim=1)), every_n_steps=2),
        StateMonitor(["gate"], read=_failing(rank, _halves), every_n_steps=2),
        OutputMonitor(every_n_steps=2, advantages=_failing(rank, lambda batch: batch[: SIZES[rank], 0])),
    ]
    _, keeper = _fit(rank, monitors)
    value = torch.full((), float(rank))
    torch.distributed.all_reduce(value)  # whoever had waited for the other would take this for the answer
    assert value == 1
    points = _everyone(repr(keeper.points))
    assert points[0] == points[1]
    found = {point.key: point.value for point in keeper.points if point.step == 3}
    assert [found[f"{family}/gate/n"] for family in ("router", "latent", "state")] == [SIZES[0]] * 3
    assert found["output/head/n"] == sum(SIZES)  # of its advantages alone it knows nothing


def _check(rank):
    outputs = OutputMonitor(every_n_steps=2, labels="actions", advantages="gains", lens=["experts.0"])
    latents = LatentMonitor(["gate"], read=lambda scores: scores.chunk(2, dim=1), every_n_steps=2)
    states = [StateMonitor(every_n_steps=2), StateMonitor(["gate"], read=_halves, every_n_steps=1)]
    watched, keeper = _fit(rank, [outputs, RouterMonitor(every_n_steps=2, batches=1), latents, *states])
    everyone = _everyone((repr(keeper.points), watched.seen))
    assert everyone[0][0] == everyone[1][0]
    for step in (0, 1, 3):
        scores, chosen, logits, actions, gains = (torch.cat([seen[step][i] for _, seen in everyone]) for i in range(5))
        found = {point.key: point.value for point in keeper.points if point.step == step}
        assert found["state/gru/n"] == 2
        assert ("state/gru/memory_longest" in found) == (step == 0)
        counted = torch.cat([scores[:5], evenly(scores[5:], 8)]).view(-1, 2, 1, 1, 2)
        assert found["state/gate/n"] == 5 + 8
        assert found["state/gate/rms"] == pytest.approx(state_statistics(counted).rms[0].item(), rel=1e-6)
        rows = output_rows(logits.double(), actions)
        assert found["output/head/n"] == sum(SIZES)
        assert found["output/head/entropy"] == pytest.approx(rows.entropy.mean().item(), rel=1e-6)
        assert found["output/head/max_logit"] == pytest.approx(logits.max().item(), rel=1e-6)
        mean = logits.double().softmax(dim=1).mean(dim=0)
        assert found["output/head/usage"] == pytest.approx(torch.special.entr(mean).sum().exp().item(), rel=1e-6)
        assert found["lens/norm.input/entropy"] == pytest.approx(found["output/head/entropy"], rel=1e-5)
        covariance = advantage_covariance(rows.log_prob, gains)
        assert found["policy/head/covariance"] == pytest.approx(covariance.mean().item(), rel=1e-4, abs=1e-7)
        assert found["policy/head/covariance_top"] == pytest.approx(covariance.quantile(0.9998).item(), rel=1e-4)
        share = (covariance > 0).double().mean().item()
        assert found["policy/head/covariance_positive"] == pytest.approx(share)
        latent = latent_readings(latent_sums(*scores.chunk(2, dim=1)))
        for name in ("kl", "information_ceiling", "active_units", "mixed", "n"):
            assert found[f"latent/gate/{name}"] == pytest.approx(latent[name].item(), rel=1e-9)
        assert found["latent/gate/information_limit"] == pytest.approx(math.log(sum(SIZES)))
        expected = routing_readings(routing_sums(scores, chosen))
        for name in ("load_cv2", "effective_experts", "balance_loss", "z", "n"):
            assert found[f"router/gate/{name}"] == pytest.approx(expected[name].item(), rel=1e-6)
    plain, _ = _fit(rank, [])
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    _check_failing_readers(rank)
    _check_metrics(rank)


def _check_metrics(rank):
    logits = torch.randn(14, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    own = logits.split(SIZES)[rank]
    for kind in (OutputEntropy, RouterLoad):
        metric, whole = kind(4), kind(4, sync_on_compute=False)
        chosen = isinstance(metric, RouterLoad)
        metric.update(own, own.topk(2, dim=1).indices if chosen else None)
        whole.update(logits, logits.topk(2, dim=1).indices if chosen else None)
        found, expected = metric.compute(), whole.compute()
        assert all(torch.allclose(found[name], expected[name], rtol=1e-12, equal_nan=True) for name in expected)


def test_two_processes_share_their_rows():
    on_two_processes(_check)
