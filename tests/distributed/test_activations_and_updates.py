"""Two processes read the same outliers, tokens, codes and updates, which are those of one on all the data."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_collapse import (
    ActivationMonitor,
    CodebookMonitor,
    DriftMonitor,
    FeatureLearningMonitor,
    TokenMonitor,
    UpdateMonitor,
    VariancePropagationMonitor,
)
from lightning_collapse.functional import (
    activation_outliers,
    code_counts,
    code_perplexity,
    drift,
    mean_mode_gradient,
    token_cosine,
)
from lightning_collapse.monitoring.feature_drift import DriftReference
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, PointKeeper, Toy, batches

ROWS = 32, 20


class Uneven(Toy):
    """Every process sees its own batches, of its own size, and one layer runs in the second process only."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Identity()

    def training_step(self, batch, batch_idx):
        batch = batch[: ROWS[self.global_rank]] + 10 * self.global_rank
        if self.global_rank:
            self.extra(batch)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Sharded(Uneven):
    def configure_model(self):
        for part in (self.encoder, self.head):  # what is not sharded is not synchronized either
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


def _fit(rank, model, strategy, *callbacks):
    keeper = PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    trainer = Trainer(**options, max_steps=4, callbacks=[*callbacks, keeper])
    trainer.fit(model, batches(4, seed=rank))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, repr(keeper.points))
    assert everyone[0] == everyone[1]  # the same numbers on both, bit by bit
    return {(p.layer, p.measure): p.value for p in keeper.points if p.step == 3}


def _check_outliers(rank):
    torch.manual_seed(0)
    layers = ["encoder.0:input", "extra"]
    monitors = ActivationMonitor(layers, 2), VariancePropagationMonitor([*layers, "encoder.*"], 2, first_steps=0)
    found = _fit(rank, Uneven(), DDPStrategy(process_group_backend="gloo"), *monitors)
    _check_tokens(rank)
    _check_codes(rank)
    _check_drift(rank)
    shards = [list(batches(4, seed=r))[3][: ROWS[r]] + 10 * r for r in range(2)]
    for layer, rows in (("encoder.0.input", torch.cat(shards)), ("extra", shards[1])):
        expected = activation_outliers(rows)
        for name in expected._fields:
            assert found[layer, name] == pytest.approx(getattr(expected, name).item(), rel=1e-5), (layer, name)
        assert found[layer, "n"] == len(rows)
    everyone, second = (rows.double().var(dim=0, correction=0).mean().item() for rows in (torch.cat(shards), shards[1]))
    assert found["encoder.0.input", "forward_ratio"] == pytest.approx(
        everyone / second, rel=1e-6
    )  # `extra` runs before
    assert math.isfinite(found["encoder.0", "backward_ratio"])


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.out(x)


class Tokens(Uneven):
    """Sequences of four, of which the processes have unlike numbers."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head, self.block = None, None, Writes()

    def training_step(self, batch, batch_idx):
        return self.block(batch[: ROWS[self.global_rank]].view(-1, 4, 4) + self.global_rank).pow(2).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _check_tokens(rank):
    torch.manual_seed(0)
    model = Tokens()
    found = _fit(rank, model, DDPStrategy(process_group_backend="gloo"), TokenMonitor(["block"], every_n_steps=2))
    x = torch.cat([list(batches(4, seed=r))[3][: ROWS[r]].view(-1, 4, 4) + r for r in range(2)])
    out = model.block(x).detach()
    assert found["block", "n"] == len(x)
    assert found["block", "token_cosine"] == pytest.approx(float(token_cosine(out).mean()), rel=1e-5)
    for name, value in zip(
        ("mean_gradient", "centered_gradient", "amplification"), mean_mode_gradient(x, 2 * out), strict=True
    ):
        assert found["block.out", name] == pytest.approx(float(value), rel=1e-4), name


class Answers(Uneven):
    """Can be called."""

    def forward(self, batch):
        return self.head(self.encoder(batch + 10 * self.global_rank))

    def training_step(self, batch, batch_idx):
        return self(batch[: ROWS[self.global_rank]]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def _check_drift(rank):
    torch.manual_seed(0)
    model, start = Answers(), Answers()
    start.load_state_dict(model.state_dict())
    every = [next(iter(batches(1, seed=5 + r)))[: ROWS[r]] for r in range(2)]
    monitor = DriftMonitor(["encoder.0"], [every[rank]], every_n_steps=4)
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    found = _fit(rank, model, strategy, monitor)
    x = torch.cat([every[0], every[1] + 10])
    with torch.no_grad():
        before, now = (net.encoder[0](x) for net in (start, model))
        answers = [net.head(net.encoder(x)) for net in (start, model)]
    assert found["encoder.0", "n"] == sum(ROWS)
    expected = DriftReference(before, paired=True).compare(now).readings
    for name in ("w1", "ks", "mmd2", "psi", "cka"):
        assert found["encoder.0", name] == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-6), name
    assert found["output", "output_kl"] == pytest.approx(drift.output_kl(*answers).item(), rel=1e-3)


class Codes(Uneven):
    """Two codebooks, of which the second is used in the second process only."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = None, None
        self.tables = nn.ParameterList(torch.randn(6, 4) for _ in range(2))

    def training_step(self, batch, batch_idx):
        rows, loss = batch[: ROWS[self.global_rank]].view(-1, 4) + self.global_rank, 0.0
        for table in self.tables[: 1 + self.global_rank]:
            loss = loss + table[torch.cdist(rows, table).argmin(dim=1)].pow(2).sum()
        return loss + 0 * sum(table.sum() for table in self.tables)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _check_codes(rank):
    torch.manual_seed(0)
    model = Codes()
    found = _fit(rank, model, DDPStrategy(process_group_backend="gloo"), CodebookMonitor(every_n_steps=2))
    shards = [torch.cat([list(batches(4, seed=r))[s][: ROWS[r]] for s in (2, 3)]).view(-1, 4) + r for r in range(2)]
    for name, steps in (("tables.0", torch.cat(shards)), ("tables.1", shards[1])):
        table = model.tables[int(name[-1])].detach()
        counts = code_counts(torch.cdist(steps, table).argmin(dim=1), 6)[:-1]
        assert found[name, "n"] == len(steps)
        assert found[name, "perplexity"] == pytest.approx(float(code_perplexity(counts)))
        own = [(list(batches(4, seed=r))[3][: ROWS[r]]).view(-1, 4) + r for r in range(2)]
        rows = torch.cat(own) if name == "tables.0" else own[1]
        rows, codes = rows.double(), table.double()[torch.cdist(rows, table).argmin(dim=1)]
        error = (rows - codes).pow(2).sum() / (rows - rows.mean(dim=0)).pow(2).sum()
        assert found[name, "quantization_error"] == pytest.approx(float(error), rel=1e-6)
        assert (found[name, "motion"], found[name, "churn"]) == (0, 0)


def _check_updates(rank):
    torch.manual_seed(0)
    state = {name: value.clone() for name, value in Uneven().state_dict().items()}

    def fit(cls, strategy, sharpness):
        model = cls()
        model.load_state_dict(state)
        watchers = UpdateMonitor(["encoder", "head"], 2, sharpness), FeatureLearningMonitor(every_n_steps=2)
        return _fit(rank, model, strategy, *watchers)

    replicated = fit(Uneven, DDPStrategy(process_group_backend="gloo"), True)
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    sharded = fit(Sharded, ModelParallelStrategy(**sizes, process_group_backend="gloo"), False)
    assert {"ratio", "cosine", "rms_ratio"} == {name for layer, name in sharded if layer == "encoder"}
    for key, value in sharded.items():
        assert value == pytest.approx(replicated[key], rel=1e-4), key
    learned = {name for layer, name in replicated if layer == "encoder.0"}
    assert learned - {name for layer, name in sharded if layer == "encoder.0"} == {"kernel_alignment"}
    assert {"weight_change", "representation_alignment", "sign_similarity", "null_space_share"} < learned
    assert math.isfinite(replicated["all", "raw"])
    assert replicated["all", "raw"] > 0


def test_outliers_and_tokens():
    on_two_processes(_check_outliers)


def test_updates_and_sharpness():
    on_two_processes(_check_updates)
