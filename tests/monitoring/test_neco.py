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


def test_inputs_in_the_subspace_score_one_and_others_zero() -> None:
    line, across = torch.randn(40, 2), torch.randn(20, 2)
    nothing = torch.zeros(40, 2)
    nothing[0] = 1e-3  # the other features vary a little, or they would be dropped
    inside = torch.cat([line, nothing], dim=1)
    outside = torch.cat([torch.zeros(20, 2) + line.mean(dim=0), across], dim=1)
    net = nn.Sequential(nn.Identity(), nn.Flatten())
    found = neco(net, "1", loader(inside[1:]), loader(outside), loader(inside), dims=4)
    assert found.explained == pytest.approx(1.0)
    assert found.id_scores == pytest.approx(1.0, rel=1e-5)  # as many directions as features tell nothing
    with pytest.raises(ValueError, match="matches no submodule"):
        neco(net, "2", loader(inside), loader(outside))
    with pytest.raises(ValueError, match="`dims` must be an integer of at least 1"):
        neco(net, "1", loader(inside), loader(outside), dims=0)
    with pytest.raises(ValueError, match="must hold a batch"):
        neco(net, "1", [], loader(outside))
