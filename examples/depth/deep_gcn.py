"""A deep graph convolutional network that smooths its nodes until they are alike: a specimen for other scripts."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class Graph:
    """A stochastic block model: nodes of a class are linked more often, and their features have a common part.

    Attributes:
        adjacency: Normalized with self-loops, ``(N, N)``.
        degrees: Shape ``(N,)``; smoothed nodes are alike over the root of these.
        features: Shape ``(N, width)``.
        labels: Shape ``(N,)``.
    """

    def __init__(self, nodes: int = 200, classes: int = 4, width: int = 16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(nodes) % classes
        same = self.labels.unsqueeze(1) == self.labels
        links = (torch.rand(nodes, nodes, generator=generator) < torch.where(same, 0.1, 0.02)).float().triu(1)
        links = links + links.T + torch.eye(nodes)
        self.degrees = links.sum(dim=1)
        scale = self.degrees.rsqrt()
        self.adjacency = scale.unsqueeze(1) * links * scale
        centers = torch.randn(classes, width, generator=generator)
        self.features = centers[self.labels] + torch.randn(nodes, width, generator=generator)


class DeepGCN(LightningModule):
    """Layers ``relu(A X W)``; every layer is a module, so that monitors see what comes before the rectifier.

    Args:
        graph: Its adjacency is part of the model; a batch is ``(features, labels)``.
        depth: Layers; from a dozen on nodes are alike before any training.
        hidden: Width.
    """

    adjacency: Tensor

    def __init__(self, graph: Graph, depth: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.register_buffer("adjacency", graph.adjacency)
        sizes = [graph.features.shape[1], *[hidden] * depth]
        layers = [nn.Linear(sizes[i], sizes[i + 1], bias=False) for i in range(depth)]
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(hidden, int(graph.labels.max()) + 1)

    def states(self, features: Tensor) -> list[Tensor]:
        """Nodes ``(N, hidden)`` after every layer."""
        found: list[Tensor] = []
        for layer in self.layers:
            features = torch.relu(layer(self.adjacency @ features))
            found.append(features)
        return found

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy over all nodes."""
        features, labels = batch
        return nn.functional.cross_entropy(self.head(self.states(features)[-1]), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)
