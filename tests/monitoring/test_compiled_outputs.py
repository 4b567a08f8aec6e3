"""Compiled heads and routers keep one graph, and read the same."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import LatentMonitor, OutputMonitor, RouterMonitor
from tests.toys import PointKeeper, fit


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.top_k = 2

    def forward(self, rows):
        weight, chosen = self.gate(rows).softmax(-1).topk(self.top_k, dim=-1)
        outputs = torch.stack([expert(rows) for expert in self.experts], dim=1)
        return rows + (weight.unsqueeze(2) * outputs.gather(1, chosen.unsqueeze(2).expand(-1, -1, 8))).sum(dim=1)


class Model(LightningModule):
    def __init__(self, compiled):
        super().__init__()
        torch.manual_seed(0)
        net, self.graphs = nn.Sequential(Mixture(), nn.Linear(8, 5)), 0
        self.net = torch.compile(net, backend=self.backend, fullgraph=True) if compiled else net

    def backend(self, graph, inputs):
        self.graphs += 1
        return graph.forward

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def watch(compiled):
    torch._dynamo.reset()
    model, keeper = Model(compiled), PointKeeper()
    monitors = [OutputMonitor(head="net.1", every_n_steps=2), RouterMonitor(every_n_steps=2)]
    monitors += [LatentMonitor(["net.1"], read=lambda output: (output[:, :2], output[:, 2:4]), every_n_steps=2)]
    loader = DataLoader(torch.randn(96, 8, generator=torch.Generator().manual_seed(0)), batch_size=16)
    fit(model, [*monitors, keeper], loader)
    return model, {(point.key, point.step): point.value for point in keeper.points}


def test_compiled_code_is_read_in_one_graph():
    plain, compiled = watch(False)[1], watch(True)
    assert compiled[0].graphs <= 3
    assert compiled[1].keys() == plain.keys()
    assert compiled[1] == pytest.approx(plain, rel=1e-5, abs=1e-7)
