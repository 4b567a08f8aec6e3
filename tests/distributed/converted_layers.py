"""What converted layers do on two processes; run by a test that has started two already."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_collapse import SigmaReparamUpdate
from lightning_collapse.layers import ConversionError, SigmaReparam
from lightning_collapse.utilities.registry import LAYERS
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
