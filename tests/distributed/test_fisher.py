"""Two processes with uneven data find what one with all of it finds."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import cross_entropy

from lightning_collapse.penalties import diagonal_fisher, kronecker_factors, mas_importance, rank_one_fisher
from tests.distributed.launch import on_two_processes
from tests.penalties.models import batched, case


def _shards(data):
    """Seven samples in batches of three and two in one."""
    return batched(tuple(part[:7] for part in data), 3), batched(tuple(part[7:] for part in data), 2)


NAMES = ("convolutions", "shared", "attention")


def _check_all(rank):
    alone = {name: _expected(*case(name)) for name in NAMES}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    _check(rank, alone)
    _check_sharded(rank, alone)
    dist.destroy_process_group()


def _check(rank, alone):
    for name in NAMES[:2]:
        model, data = case(name)
        shards = _shards(data)
        for estimator in ("exact", "empirical", "batched"):
            shared = diagonal_fisher(model, shards[rank], estimator)
            everyone = [None, None]
            dist.all_gather_object(everyone, repr(shared))
            assert everyone[0] == everyone[1]
            _same(shared, alone[name][estimator])
        _same(mas_importance(model, shards[rank]), alone[name]["mas"])
        _same(diagonal_fisher(model, shards[rank], n_samples=7), alone[name]["few"])
        _same(diagonal_fisher(model, shards[0] if rank == 0 else []), alone[name]["first"])
        rank_one = rank_one_fisher(model, shards[rank])
        torch.testing.assert_close(rank_one.mean, alone[name]["rank one"].mean)
        torch.testing.assert_close(rank_one.coefficient, alone[name]["rank one"].coefficient)
        shares = alone[name]["rank one"].rank_one_shares
        torch.testing.assert_close(rank_one.rank_one_shares, shares, equal_nan=True)
        factors, expected = kronecker_factors(model, shards[rank]), alone[name]["factors"]
        assert factors.left_out == expected.left_out
        for layer, factor in factors.factors.items():
            torch.testing.assert_close(factor.inputs, expected.factors[layer].inputs)
            torch.testing.assert_close(factor.gradients, expected.factors[layer].gradients)
        with pytest.raises(ValueError, match="`loader` brought no samples"):
            diagonal_fisher(model, [])
    drawn = [diagonal_fisher(model, [data] if rank == r else [], "sample").values for r in (0, 1)]
    assert any(not torch.equal(value, drawn[1][name]) for name, value in drawn[0].items())


def _check_sharded(rank, alone):
    """Weights are whole during the pass only, and the next training step is as if there had been none."""
    mesh = init_device_mesh("cpu", (2,))
    for name in ("convolutions", "attention"):
        model, data = case(name)
        expected = _step(_sharded(case(name)[0], mesh), data, rank)
        model, shards = _sharded(model, mesh), _shards(data)
        kept = [parameter.to_local().clone() for parameter in model.parameters()]
        _same(diagonal_fisher(model, shards[rank]), alone[name]["exact"])
        _same(mas_importance(model, shards[rank]), alone[name]["mas"])
        _same(diagonal_fisher(model, shards[0] if rank == 0 else []), alone[name]["first"])
        found = rank_one_fisher(model, shards[rank])
        torch.testing.assert_close(found.coefficient, alone[name]["rank one"].coefficient)
        assert all(torch.equal(p.to_local(), before) for p, before in zip(model.parameters(), kept, strict=True))
        assert all(parameter.grad is None for parameter in model.parameters())
        for gradient, before in zip(_step(model, data, rank), expected, strict=True):
            assert torch.equal(gradient, before)
    cut = nn.Linear(4, 2)
    cut.weight = nn.Parameter(distribute_tensor(cut.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match="'weight' is a DTensor that `fully_shard` has not made"):
        diagonal_fisher(cut, [torch.randn(2, 4)])


def _sharded(model, mesh):
    fully_shard(model.head, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def _step(model, data, rank):
    """Gradients of one training step; between its passes the weights of the head are sharded again."""
    torch.manual_seed(rank)
    loss = cross_entropy(model(data[0]), data[1])
    assert isinstance(model.head.weight, DTensor)
    loss.backward()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return [parameter.grad.to_local() for parameter in model.parameters()]


def _expected(model, data):
    """What one process finds."""
    first, second = _shards(data)
    found = {name: diagonal_fisher(model, first + second, name) for name in ("exact", "empirical", "batched")}
    # each takes its share of seven, four and three, of which the second has two
    few = tuple(torch.cat([part[:4], part[7:]]) for part in data)
    return found | {
        "rank one": rank_one_fisher(model, [data]),
        "factors": kronecker_factors(model, [data]),
        "mas": mas_importance(model, [data]),
        "few": diagonal_fisher(model, [few]),
        "first": diagonal_fisher(model, first),
    }


def _same(found, expected):
    assert (found.count, found.methods) == (expected.count, expected.methods)
    for name, value in found.values.items():
        torch.testing.assert_close(value, expected.values[name])


def test_two_processes():
    on_two_processes(_check_all)
