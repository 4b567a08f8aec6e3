"""What monitors have to say of many layers, and of batches of many sizes, is one warning."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import (
    ActivationMonitor,
    AttentionEntropyMonitor,
    AttentionLogitMonitor,
    CollapseMonitor,
    GradientMonitor,
    IntrinsicDimensionMonitor,
    LabelledGeometryMonitor,
    NeuralCollapseMonitor,
    OutputMonitor,
    PlasticityMonitor,
    VariancePropagationMonitor,
)
from tests.toys import Toy, batches, fit


class Experts(Toy):
    """Experts behind the encoder; those that a step names run, on all rows or on none."""

    def __init__(self, runs, rows=32, count=12):
        super().__init__()
        self.runs, self.rows = runs, rows
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(count))

    def training_step(self, batch, batch_idx):
        features = self.encoder(batch)
        told = [self.experts[i](features[: self.rows]).sum() for i in self.runs(batch_idx)]
        return self.head(features).square().mean() + sum(told)


def said(words, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(*args, **kwargs)
    return [str(w.message) for w in caught if words in str(w.message)]


LABELS = {"labels": lambda batch: torch.arange(3) % 2, "every_n_steps": 1}


@pytest.mark.parametrize(
    ("monitor", "words"),
    [
        (LabelledGeometryMonitor(layers=["encoder"], **LABELS), "the labels do not fit"),
        (NeuralCollapseMonitor(**LABELS), "rows and the batch has 3 labels"),
        (OutputMonitor(**LABELS), "rows and there are 3 labels"),
    ],
)
def test_another_size_of_the_batch_is_no_news(monitor, words):
    sizes = DataLoader([torch.randn(n, 16) for n in (20, 21, 22, 23)], batch_size=None)
    assert len(said(words, Toy(), [monitor], sizes)) == 1


def test_experts_that_no_row_reached_are_told_once_for_all_monitors():
    layers = {"layers": ["experts.*.0"], "every_n_steps": 2}
    watching = [CollapseMonitor, PlasticityMonitor, ActivationMonitor, IntrinsicDimensionMonitor]
    monitors = [kind(**layers) for kind in (*watching, VariancePropagationMonitor)]
    told = said("did not run", Experts(lambda step: range(2)), [*monitors, GradientMonitor(**layers)])
    assert len(told) == 1
    names = ", ".join(f"`{type(monitor).__name__}`" for monitor in monitors)
    layers_told = ", ".join(f"`experts.{i}.0`" for i in range(2, 10))
    assert told[0].startswith(f"{names}: {layers_told} and 2 more did not run before every point")


def test_layers_that_are_dropped_later_are_told_once_more():
    monitor = ActivationMonitor(layers=["experts.*.0"], every_n_steps=1)
    told = said("did not run", Experts(lambda step: set(range(6)) - {step % 6}, count=6), [monitor])
    assert [[f"experts.{i}.0" in message for i in range(3)] for message in told] == [
        [True, False, False],
        [False, True, False],
    ]


def test_an_expert_that_runs_on_no_rows_is_no_failure():
    monitors = [CollapseMonitor(layers=["experts.*.0"], every_n_steps=2)]
    monitors += [PlasticityMonitor(layers=["experts.*.1"], every_n_steps=2), ActivationMonitor(layers=["experts.*"])]
    model = Experts(lambda step: range(3), rows=0, count=3)
    assert said("failed", model, monitors, batches()) == []


def test_attention_of_no_sequences_is_no_failure():
    class Routed(Toy):
        def __init__(self):
            super().__init__()
            self.near, self.far = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

        def training_step(self, batch, batch_idx):
            tokens = self.encoder(batch).unflatten(0, (8, 4))
            found = [mix(x, x, x, need_weights=False)[0] for mix, x in ((self.near, tokens), (self.far, tokens[:0]))]
            return self.head(found[0]).square().mean() + found[1].sum()

    monitors = [kind(every_n_steps=2) for kind in (AttentionEntropyMonitor, AttentionLogitMonitor)]
    assert said("could not be read", Routed(), monitors) == []
