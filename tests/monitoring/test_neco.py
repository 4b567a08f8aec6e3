"""NECO on demand against its formula on collected features, and a model that notices nothing."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse.monitoring import neco


def loader(rows: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(rows, torch.zeros(len(rows))), batch_size=16, shuffle=True)


def test_scores_are_those_of_standardized_features() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))
    train, inside = torch.randn(90, 3) @ torch.randn(3, 8), torch.randn(40, 8)
    outside = 3 * torch.randn(30, 8)
    state, modes = torch.get_rng_state(), [module.training for module in net.modules()]
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    found = neco(net, "3:input", loader(inside), loader(outside), loader(train), dims=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    with torch.no_grad():
        h, a, b = (net.eval()[:3](x).double().numpy() for x in (train, inside, outside))
    mean, std = h.mean(axis=0), h.std(axis=0)
    values, vectors = np.linalg.eigh(np.corrcoef(h.T))
    scores = []
    for x in (a, b):
        z = (x - mean) / std
        scores.append(np.linalg.norm(z @ vectors[:, -4:], axis=1) / np.linalg.norm(z, axis=1))
    for ours, exact in zip(found[:2], scores, strict=True):
        assert sorted(ours.tolist()) == pytest.approx(sorted(exact), rel=1e-5)
    expected = roc_auc_score(np.repeat([1, 0], [40, 30]), np.concatenate(scores))
    assert found.auroc.item() == pytest.approx(expected, abs=1e-6)
    assert (found.dims, found.explained.item()) == (4, pytest.approx(values[-4:].sum() / values.sum(), rel=1e-5))


def test_inputs_along_the_subspace_score_one_and_others_zero() -> None:
    factor = torch.linspace(-1, 1, 40).unsqueeze(1)
    inside, outside = factor.expand(40, 3), torch.tensor([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    found = neco(net, "1", loader(inside), loader(outside), dims=1)
    assert found.explained.item() == pytest.approx(1.0, rel=1e-6)
    assert found.id_scores.tolist() == pytest.approx([1.0] * 40, rel=1e-6)
    assert found.ood_scores.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert found.auroc == 1
    everything = neco(net, "1", loader(inside + torch.randn(40, 3)), loader(outside))
    assert everything.dims == 3
    assert everything.ood_scores.tolist() == pytest.approx([1.0, 1.0], rel=1e-5)  # they tell nothing then


def test_bad_arguments_leave_no_hook() -> None:
    net, rows = nn.Sequential(nn.Linear(3, 3), nn.Flatten()), torch.ones(4, 3)
    with pytest.raises(ValueError, match="matches no submodule"):
        neco(net, "2", [rows], [rows])
    with pytest.raises(ValueError, match="`dims` must be an integer of at least 1"):
        neco(net, "1", [rows], [rows], dims=0)
    with pytest.raises(ValueError, match="must hold a batch"):
        neco(net, "1", [], [rows])
    with pytest.raises(ValueError, match="`ood_loader` must hold a batch"):
        neco(net, "1", [rows], [])
    with pytest.raises(ValueError, match="`layer` '1' returned no features"):
        neco(net, "1", [rows], [rows], inputs=lambda module, batch: module[0](batch))
    assert not any(module._forward_hooks for module in net.modules())
