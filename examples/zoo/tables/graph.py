"""Over-smoothing: a deep graph network makes all nodes alike."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, accuracy, loader
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, NeuralCollapseMonitor, SpectralAlignmentMonitor

from .community import CLASSES, INPUTS, NODES, Convolution, community

WIDTH, DEPTH, STEPS = 32, 16, 400


class GraphNetwork(Learner):
    """Sixteen convolutions over the whole graph."""

    def __init__(self, inputs: Tensor, adjacency: Tensor, residual: bool) -> None:
        super().__init__(rate=3e-3)
        self.inputs = nn.Parameter(inputs, requires_grad=False)
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.convolutions = nn.Sequential(*(Convolution(adjacency, WIDTH, residual) for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, nodes: Tensor) -> Tensor:
        """Logits of some nodes."""
        logits: Tensor = self.head(self.convolutions(self.embed(self.inputs))[nodes])
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def make(seed: int, residual: bool) -> Habitat:
    """A third of the nodes has labels."""
    inputs, adjacency, labels = community(seed)
    nodes = torch.randperm(NODES, generator=torch.Generator().manual_seed(seed))
    known, held_out = nodes[: NODES // 3], nodes[NODES // 3 :]
    model = GraphNetwork(inputs, adjacency, residual)
    return Habitat(
        model,
        [loader(known, labels[known], size=40, seed=seed)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), NeuralCollapseMonitor()],
        steps=STEPS,
        every=10,
        embedding=model.convolutions,
        held_out=lambda: accuracy(model, held_out, labels[held_out]),
    )


SPECIMENS = (
    Specimen(
        "deep graph network",
        make,
        "convolutions without residuals make all nodes alike",
        kind="complete_collapse",
        setting="residual",
        healthy=True,
        sick=False,
        claims=("dimensional_collapse",),
        layers=("convolutions*", "head*"),
        develops=False,
        family="graph",
    ),
)
