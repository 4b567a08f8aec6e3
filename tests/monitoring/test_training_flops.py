"""Counted operations against arithmetic by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_collapse.monitoring.training_flops import TrainingFlops
from lightning_collapse.utilities.containment import Containment


def count(model: nn.Module, *inputs: Tensor) -> int:
    flops = TrainingFlops(model)
    model(*inputs)
    flops.remove()
    return flops.total


@pytest.mark.parametrize("shape", [(32,), (4, 7), (2, 3, 5)])
def test_linear(shape: tuple[int, ...]) -> None:
    # a multiplication and an addition per weight and row, forward and twice backward
    rows = torch.Size(shape).numel()
    assert count(nn.Linear(12, 20), torch.zeros(*shape, 12)) == 3 * 2 * rows * 12 * 20


@pytest.mark.parametrize(("stride", "groups", "size"), [(1, 1, 8), (2, 1, 4), (1, 3, 8)])
def test_conv2d(stride: int, groups: int, size: int) -> None:
    conv = nn.Conv2d(6, 9, 3, stride=stride, padding=1, groups=groups)
    per_position = 9 * (6 // groups) * 3 * 3
    assert count(conv, torch.zeros(5, 6, 8, 8)) == 3 * 2 * 5 * size * size * per_position


def test_conv1d_and_conv3d() -> None:
    assert count(nn.Conv1d(4, 6, 3), torch.zeros(2, 4, 10)) == 6 * 2 * 8 * 6 * 4 * 3
    assert count(nn.Conv3d(4, 6, 1), torch.zeros(2, 4, 3, 3, 3)) == 6 * 2 * 27 * 6 * 4


@pytest.mark.parametrize("dims", [1, 2])
def test_transposed_convolution_counts_what_it_reads(dims: int) -> None:
    conv = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}[dims](4, 6, 2, stride=2)
    # every input position is multiplied by every weight once
    assert count(conv, torch.zeros(3, 4, *[5] * dims)) == 6 * 3 * 5**dims * 4 * 6 * 2**dims


def test_models_are_the_sum_of_their_layers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    assert count(model, torch.randn(10, 8)) == 6 * 10 * (8 * 16 + 16 * 4)


def test_embeddings_and_norms_are_free() -> None:
    model = nn.Sequential(nn.Embedding(100, 8), nn.LayerNorm(8))
    assert count(model, torch.zeros(3, 5, dtype=torch.int64)) == 0


def test_recurrent_layers_count_every_step() -> None:
    per_step = 4 * 6 * (5 + 6)
    assert count(nn.LSTM(5, 6), torch.zeros(7, 3, 5)) == 6 * 7 * 3 * per_step
    assert count(nn.LSTM(5, 6, bidirectional=True), torch.zeros(7, 3, 5)) == 2 * 6 * 7 * 3 * per_step


def test_attention_counts_its_projections() -> None:
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.zeros(3, 5, 8)
    assert count(attention, x, x, x) == 6 * 3 * 5 * (3 * 8 * 8 + 8 * 8)


def test_parametrized_weights_count_once() -> None:
    plain = count(nn.Linear(12, 20), torch.zeros(4, 12))
    assert count(nn.utils.parametrizations.spectral_norm(nn.Linear(12, 20)), torch.zeros(4, 12)) == plain
    normed = count(nn.utils.parametrizations.weight_norm(nn.Linear(12, 20)), torch.zeros(4, 12))
    assert normed == pytest.approx(plain, rel=0.1)  # the norms are a parameter too


def test_every_call_counts() -> None:
    layer = nn.Linear(4, 4)
    assert count(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(3, 4)) == 2 * 6 * 3 * 16


def test_lazy_layers() -> None:
    assert count(nn.LazyLinear(20), torch.zeros(4, 12)) == 6 * 4 * 12 * 20


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_not_another_call(use_reentrant: bool) -> None:
    layer, x = nn.Linear(12, 20), torch.zeros(4, 12, requires_grad=True)
    flops = TrainingFlops(layer)
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    assert flops.total == 6 * 4 * 12 * 20


def test_odd_outputs_are_left_out() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.output: object = None

        def forward(self) -> object:
            return self.output

    model = Odd()
    flops = TrainingFlops(model)
    for output in (None, (), "a", torch.tensor(1.0), torch.zeros(0, 2), {"a": 1}):
        model.output = output
        model()
    assert flops.total == 0


def test_remove() -> None:
    model = nn.Linear(2, 2)
    flops = TrainingFlops(model)
    model(torch.zeros(1, 2))
    flops.remove()
    flops.remove()
    model(torch.zeros(1, 2))
    assert flops.total == 6 * 4
    assert not model._forward_hooks


def test_compiled_models_get_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model, backend="eager")
    TrainingFlops(compiled)
    assert not model[0]._forward_hooks


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_count_their_tokens() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(3, 12), torch.zeros(5, 12)], layout=torch.strided)
    assert count(nn.Linear(12, 20), nested) == 6 * 8 * 12 * 20


def test_a_compiled_function_that_calls_a_layer_is_compiled_once() -> None:
    layer, graphs = nn.Linear(2, 2), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    flops = TrainingFlops(layer)
    function = torch.compile(lambda x: layer(x), backend=backend, fullgraph=True)
    for _ in range(3):
        function(torch.ones(1, 2))
    assert len(graphs) == 1
    assert flops.total == 0
    torch.compiler.reset()


def test_what_fails_is_told_once_and_the_layer_runs() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2, 2))  # a weight of channels, and an output without

        def forward(self, x: Tensor) -> Tensor:
            return torch.nested.nested_tensor([x, x[:1]])

    model = nn.Sequential(Broken())
    flops = TrainingFlops(model, Containment("SomeMonitor"))
    with pytest.warns(UserWarning, match="`SomeMonitor`: counting operations of `0` failed") as told:
        _ = [model(torch.ones(3, 2)) for _ in range(2)]
    assert len([w for w in told if "SomeMonitor" in str(w.message)]) == 1
    flops.remove()


def test_copies_do_not_count() -> None:
    model = nn.Linear(2, 2)
    flops = TrainingFlops(model)
    copy.deepcopy(model)(torch.zeros(1, 2))
    assert flops.total == 0
