"""Two processes draw the same spectra and gradients, which are those of one on all the data."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_collapse import GradientMonitor, WeightSpectrumMonitor
from lightning_collapse.functional import gradient_coherence, gradient_noise_scale
from tests.distributed.launch import on_two_processes
from tests.toys import QUIET, MemoryLogger, PointKeeper, Toy, batches, weights

ROWS = 32, 20
ACCUMULATE = 3


class Uneven(Toy):
    """Every process sees its own batches, of its own size, and weights stay."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[: ROWS[self.global_rank]], batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Sharded(Uneven):
    def configure_model(self):
        fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def _fit(model_class, strategy, callbacks, rank, accumulate):
    torch.manual_seed(0)
    model, keeper = model_class(), PointKeeper()
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": MemoryLogger(), "use_distributed_sampler": False}
    options |= {"log_every_n_steps": 1, "accumulate_grad_batches": accumulate}
    trainer = Trainer(**{**options, "callbacks": [*callbacks, keeper]})
    trainer.fit(model, batches(ACCUMULATE * 2, seed=rank))
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, repr(keeper.points))
    assert everyone[0] == everyone[1]  # the same numbers on both, bit by bit
    return model, keeper


def _micro_gradients(state):
    """Of both processes in the first accumulation window, ``(2, ACCUMULATE, P)``."""
    plain = Toy()
    plain.load_state_dict(state)
    found = []
    for rank, rows in enumerate(ROWS):
        for batch in list(batches(ACCUMULATE * 2, seed=rank))[:ACCUMULATE]:
            plain.zero_grad()
            Toy.training_step(plain, batch[:rows], 0).backward()
            found.append(torch.cat([p.grad.flatten() for p in plain.parameters()]).double())
    return torch.stack(found).view(2, ACCUMULATE, -1)


def _watch(rank):
    spectra = [WeightSpectrumMonitor(every_n_steps=1), WeightSpectrumMonitor(["head"], max_overhead=1e9)]
    return [*spectra, GradientMonitor(["encoder"], every_n_steps=1, smoothing=0.0, micro_batch_size=ROWS[rank])]


def _check_ddp(rank):
    strategy = DDPStrategy(process_group_backend="gloo")
    model, keeper = _fit(Uneven, strategy, _watch(rank), rank, ACCUMULATE)
    each = _micro_gradients(model.state_dict())
    whole = each.mean(dim=(0, 1))
    first = {point.key: point.value for point in keeper.points if point.step == 0}
    assert first["gradients/all/norm"] == pytest.approx(whole.norm().item(), rel=1e-5)
    local = each[:, :-1]  # of the last one only the average over processes is known
    inverse = torch.tensor([1 / rows for rows in ROWS], dtype=torch.float64)
    small, big = local.square().sum(dim=-1).mean(), whole.square().sum()
    expected = gradient_noise_scale(small, big, 1 / inverse.mean(), 2 * ACCUMULATE / inverse.mean())
    assert first["gradients/all/noise_trace"] == pytest.approx(expected.trace.item(), rel=1e-5)
    assert first["gradients/all/noise_signal"] == pytest.approx(expected.signal.item(), rel=1e-5)
    together = local.sum(dim=1).square().sum(dim=-1).mean(), local.square().sum(dim=-1).sum(dim=1).mean()
    assert first["gradients/all/coherence"] == pytest.approx(gradient_coherence(*together, 2).item(), rel=1e-5)
    plain, _ = _fit(Uneven, DDPStrategy(process_group_backend="gloo"), [], rank, ACCUMULATE)
    assert all(torch.equal(value, weights(model)[name]) for name, value in weights(plain).items())


def _check_sharded(rank):
    def run(callbacks, accumulate=ACCUMULATE):
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        return _fit(Sharded, strategy, callbacks, rank, accumulate)

    watched, keeper = run(_watch(rank))
    plain, _ = run([])
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(*(p.to_local() if hasattr(p, "to_local") else p for p in (one, other)))
    torch.manual_seed(0)
    model = Toy()
    before = torch.linalg.svdvals(model.encoder[0].weight.detach())
    each = _micro_gradients(model.state_dict())
    whole = each.mean(dim=(0, 1))
    first = {point.key: point.value for point in keeper.points if point.step == 0}
    sharded = sum(p.numel() for p in model.encoder.parameters())
    # what is not sharded Lightning's strategy does not average either: the root mean square of both is drawn
    rest = each.mean(dim=1)[:, sharded:].square().sum(dim=-1).mean()
    norm = (whole[:sharded].square().sum() + rest).sqrt()
    assert first["gradients/encoder/norm"] == pytest.approx(whole[:sharded].norm().item(), rel=1e-5)
    assert first["gradients/all/norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert first["gradients/all/noise_trace"] > 0
    step = torch.linalg.matrix_norm(whole[: 16 * 32].view(32, 16), 2).item() * 0.01
    assert first["updates/encoder.0/spectral_norm"] == pytest.approx(step, rel=1e-3)
    assert first["weights/encoder.0/spectral_norm"] == pytest.approx(before[0].item(), rel=1e-2)


def _check_all(rank):
    _check_ddp(rank)
    _check_sharded(rank)


def test_two_processes():
    on_two_processes(_check_all)
