"""A random graph of four communities and its graph convolution."""

import torch
from torch import Tensor, nn

NODES, CLASSES, INPUTS = 240, 4, 8


def community(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of nodes, the normalized adjacency with loops, and to which of four communities nodes belong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(NODES) % CLASSES
    inputs = nn.functional.one_hot(labels, INPUTS) + 1.5 * torch.randn(NODES, INPUTS, generator=generator)
    chance = torch.where(labels[:, None] == labels, 0.08, 0.01)
    edges = (torch.rand(NODES, NODES, generator=generator) < chance).float().triu(1)
    edges = edges + edges.T + torch.eye(NODES)
    root = edges.sum(dim=1).rsqrt()
    return inputs, root[:, None] * edges * root, labels


class Convolution(nn.Module):
    """A graph convolution (Kipf & Welling 2017, arXiv 1609.02907), with a residual or without."""

    def __init__(self, adjacency: Tensor, width: int, residual: bool) -> None:
        super().__init__()
        self.adjacency = nn.Parameter(adjacency, requires_grad=False)
        self.linear, self.residual = nn.Linear(width, width), residual

    def forward(self, x: Tensor) -> Tensor:
        """Nodes ``(V, D)``."""
        new: Tensor = self.linear(self.adjacency @ x).relu()
        return x + new if self.residual else new
