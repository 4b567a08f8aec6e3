"""What layers do on two processes; run by a test that has started two already."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lightning_collapse import MaxNorm, ParsevalStep, SigmaReparamUpdate
from lightning_collapse.functional.regularization import parseval_step
from lightning_collapse.layers import ConversionError, EMAVectorQuantizer, SigmaReparam
from lightning_collapse.utilities.registry import LAYERS
from lightning_collapse.utilities.weight_matrices import whole
from tests.layers.cases import CASES
from tests.toys import QUIET, Toy, batches


def check_sharded_and_wrapped():
    """Of every layer: sharded ones compute what whole ones do; what comes too late is refused."""
    for name, case in CASES.items():
        layer = LAYERS[name]
        torch.manual_seed(0)
        model, inputs = case.model(), case.inputs()
        with pytest.raises(ConversionError, match="wrapped for training on several processes"):
            layer.convert_(DistributedDataParallel(model), **case.options, exclude=["module.head"])
        plain = copy.deepcopy(model)
        layer.convert_(model, **case.options, exclude=["head"])
        for each in (model, plain):
            for block in each.encoder.layers:
                fully_shard(block)
            fully_shard(each)
        expected, found = plain(inputs), model(inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))
        found.square().sum().backward()
        assert all(p.grad is not None for p in layer.added_parameters(model).values())
        with pytest.raises(ConversionError, match="sharded"):
            layer.convert_(plain, **case.options, exclude=["head"])
        with pytest.raises(ConversionError, match="sharded"):
            layer.revert_(model)


class Converted(Toy):
    """Converted in ``configure_model``, and sharded after that if there is a mesh."""

    def configure_model(self):
        if not isinstance(self.head, SigmaReparam):
            SigmaReparam.convert_(self)
            if self._device_mesh is not None:
                fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.head, mesh=self.device_mesh["data_parallel"])


def check_sharded_fit(rank):
    """The vectors are bit-equal on both, and those of one process."""
    torch.manual_seed(0)
    alone = Converted()
    sharded = copy.deepcopy(alone)
    alone.configure_model()
    before = {key: buffer.clone() for key, buffer in alone.named_buffers()}
    optimizer = alone.configure_optimizers()
    for batch in batches():
        optimizer.zero_grad()
        alone.training_step(batch, 0).backward()
        optimizer.step()
        SigmaReparam.update_(alone)
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    options = {**QUIET, "devices": 2, "strategy": strategy, "logger": False, "use_distributed_sampler": False}
    Trainer(**options, callbacks=[SigmaReparamUpdate()]).fit(sharded, batches())
    assert isinstance(sharded.head.raw, DTensor)
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, dict(sharded.named_buffers()))
    for key, vector in alone.named_buffers():
        assert torch.equal(everyone[0][key], everyone[1][key])
        torch.testing.assert_close(everyone[rank][key], vector, rtol=0, atol=1e-5)
        assert (vector - before[key]).abs().max() > 1e-4


class Longer(Toy):
    """Rows grow at every step; sharded if there is a mesh."""

    def configure_model(self):
        if self._device_mesh is not None:
            fully_shard(self.encoder, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.head, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return -super().training_step(batch, batch_idx)


def check_constrained_fit():
    """Shards of rows, and of what rows are made of, are projected as whole weights are."""
    torch.manual_seed(0)
    alone = Longer()
    sharded = copy.deepcopy(alone)
    options = {**QUIET, "logger": False, "use_distributed_sampler": False}
    strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    constraint = MaxNorm()
    Trainer(**options, devices=2, strategy=strategy, callbacks=[constraint]).fit(sharded, batches())
    radii = {n: lengths.min() + 0.1 * (lengths.max() - lengths.min()) for n, lengths in row_lengths(alone).items()}
    found = constraint.state_dict()["radii"]
    assert found.keys() == radii.keys()
    for name, lengths in row_lengths(sharded).items():
        torch.testing.assert_close(found[name], radii[name])
        assert lengths.max() <= radii[name] * (1 + 1e-6)
        assert lengths.min() > 0.9 * radii[name]
    mesh, weight = init_device_mesh("cpu", (2,)), alone.head.weight.detach()
    for dim in (0, 1):
        part = distribute_tensor(weight.clone(), mesh, [Shard(dim)])
        constraint._dims["head"] = (1,)
        constraint._radii["head"] = torch.tensor(0.2)
        constraint.apply("head", part)
        assert part.placements == (Shard(dim),)
        torch.testing.assert_close(part.full_tensor(), 0.2 * nn.functional.normalize(weight))
        for rows in (1.0, 0.5):
            part, same = distribute_tensor(weight.clone(), mesh, [Shard(dim)]), weight.clone()
            for each in (part, same):
                step = ParsevalStep(0.1, rows=rows)
                step._turned["head"] = False
                step.apply("head", each)
            assert part.placements == (Shard(dim),)
            torch.testing.assert_close(part.full_tensor(), same)
            assert not torch.equal(same, weight)
            assert rows < 1 or torch.equal(same, parseval_step(weight, 0.1))


def row_lengths(model):
    layers = {"encoder.0": model.encoder[0], "encoder.2": model.encoder[2], "head": model.head}
    return {name: whole(layer.weight).norm(dim=1) for name, layer in layers.items()}


def running_means(choose, wrap=lambda net: net):
    """State of a quantizer after some steps with a part of their rows: of one step the second process has none."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), EMAVectorQuantizer(16, 8, decay=0.5, restart=True))
    wrapped = wrap(net)
    for seed, second in enumerate([20, 7, 0, 20] * 4):
        rows = 100 + 9 * torch.randn(32 + second, 8, generator=torch.Generator().manual_seed(seed))
        rows[3, 3] = torch.nan
        quantized, _, loss = wrapped(choose(rows))
        (quantized.mean() + loss).backward()
    return dict(net[1].state_dict())


def check_running_means(rank, alone):
    """Bit-equal on both, and those of one process, restarts included."""
    part = slice(32) if rank == 0 else slice(32, None)
    own = running_means(lambda rows: rows[part], DistributedDataParallel)
    everyone = [None, None]
    torch.distributed.all_gather_object(everyone, own)
    assert all(torch.equal(everyone[0][name], everyone[1][name]) for name in own)
    assert own["restarts"].sum() > 8
    for name, state in own.items():
        torch.testing.assert_close(state, alone[name], rtol=1e-4, atol=1e-5)
