"""Weights of a graph network that keep variances, which those of Kaiming do not."""

import numpy as np
import pytest
import torch

from lightning_collapse.functional import virgo_, virgo_variances


def graph(nodes=60, seed=0):
    """A normalized adjacency with self-loops of a random graph, and features that differ from node to node."""
    generator = torch.Generator().manual_seed(seed)
    links = (torch.rand(nodes, nodes, generator=generator) < 0.05).double().triu(1)
    links = links + links.T + torch.eye(nodes, dtype=torch.float64)
    scale = links.sum(1).rsqrt()
    return scale.unsqueeze(1) * links * scale, torch.randn(nodes, 8, generator=generator, dtype=torch.float64)


def reference(adjacency, features, hidden, depth, classes):
    """Written out layer by layer, as the released code counts: its list begins after one product."""
    adjacency, features = adjacency.numpy(), features.numpy()

    def energies(h):
        found = []
        for _ in range(depth):
            h = adjacency @ h
            found.append(float(np.square(h).sum()))
        return found

    c = energies(features.mean(axis=1))
    forward = [2 / features.shape[1]] + [2 / hidden * c[i - 1] / c[i] for i in range(1, depth)]
    c = energies(np.ones(len(features)))
    backward = [len(features) / ((classes - 1) * c[0])] + [2 / hidden * c[i - 1] / c[i] for i in range(1, depth)]
    return forward, backward[::-1]


def test_variances_are_those_of_the_rules_and_both_their_harmonic_mean():
    adjacency, features = graph()
    forward, backward = reference(adjacency, features, 16, 5, 4)
    both = [2 / (1 / f + 1 / b) for f, b in zip(forward, backward, strict=True)]
    for direction, expected in (("forward", forward), ("backward", backward), ("both", both)):
        for form in (adjacency, adjacency.to_sparse(), adjacency.float()):
            found = virgo_variances(form, features, 16, 5, 4, direction)
            assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_without_a_graph_it_is_kaimings():
    found = virgo_variances(torch.eye(9), torch.ones(9, 4), 16, 4, 2, "forward")
    assert found.tolist() == pytest.approx([0.5, 0.125, 0.125, 0.125])


def test_the_first_products_with_the_graph_do_not_shrink_activations_as_with_kaimings():
    adjacency, features = graph()
    variances = virgo_variances(adjacency, features, 256, 3, 4, "forward")
    steps = {}
    for name, chosen in (("virgo", variances), ("kaiming", torch.tensor([2 / 8, 2 / 256, 2 / 256]))):
        for seed in range(3):
            torch.manual_seed(seed)
            weights = [torch.empty(256, width, dtype=torch.float64) for width in (8, 256, 256)]
            virgo_(weights, chosen)
            h, sizes = features, []
            for weight in weights:
                h = torch.relu(adjacency @ h @ weight.T)
                sizes.append(h.square().mean().item())
            steps.setdefault(name, []).append(sizes[1] / sizes[0])
    assert np.mean(steps["virgo"]) == pytest.approx(1, abs=0.15)
    assert max(steps["kaiming"]) < 0.85


def test_wrong_sizes_are_refused():
    for wrong in ({"hidden": 0}, {"depth": 0}, {"classes": 1}, {"direction": "up"}):
        with pytest.raises(ValueError, match="must be at least 1"):
            virgo_variances(torch.eye(2), torch.ones(2, 2), **{"hidden": 4, "depth": 2, "classes": 2, **wrong})
