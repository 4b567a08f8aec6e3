"""Norms of gradients, whatever they are made of."""

import pytest
import torch
from torch import nn

from lightning_collapse.utilities.gradients import follow_gradient, gradients_of, squared_norms


def test_complex_sparse_and_missing_gradients():
    weights = [nn.Parameter(torch.zeros(2, dtype=torch.cfloat)), nn.Parameter(torch.zeros(4, 2))]
    weights += [nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False), nn.Parameter(torch.zeros(2))]
    weights[0].grad = torch.tensor([3 + 4j, 1j])
    rows, values = torch.tensor([[1, 1]]), torch.tensor([[1.0, 0], [2, 1]])
    weights[1].grad = torch.sparse_coo_tensor(rows, values, (4, 2), check_invariants=True)
    weights[3].grad = torch.tensor([1.0, 2.0])
    found = gradients_of(weights)
    assert found.indices == [0, 1, 3]
    assert squared_norms(found.tensors, torch.device("cpu")).tolist() == pytest.approx([26, 10, 5])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("act", [nn.Identity(), nn.ReLU(), nn.ReLU(inplace=True)])
def test_a_gradient_is_followed_into_a_view_that_is_overwritten(act, turned):
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 5), torch.randn(2, 4, 3)
    found = []

    def run():
        features = layer(x).mT if turned else layer(x)
        assert features._is_view()
        follow_gradient(features, found.append)
        slopes = torch.arange(float(features.numel())).view_as(features)
        return features, (act(features) * slopes).sum(), slopes

    features, loss, slopes = run()
    expected = slopes if isinstance(act, nn.Identity) else slopes * (features > 0)
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(found) == 2
    assert all(torch.equal(gradient, expected) for gradient in found)
