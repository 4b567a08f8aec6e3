"""Every matrix of a model is found once, as the matrix that is in effect."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_collapse.utilities import weight_matrices
from lightning_collapse.utilities.weight_matrices import left_out_weights


def by_name(root, **kwargs):
    return {matrix.name: matrix for matrix in weight_matrices(root, **kwargs)}


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


class Replaced(nn.Module):
    """What a precision plugin puts in the place of ``nn.Linear``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.zeros(4))


def test_linear_layers_by_shape():
    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm((4, 5)), nn.BatchNorm1d(5), Replaced())
    found = by_name(net)
    assert list(found) == ["0", "3"]
    assert torch.equal(found["0"].read(), net[0].weight)
    assert not found["0"].read().requires_grad
    assert found["3"].module is found["3"].input.module is net[3]


def test_attention_is_query_key_value_and_output():
    packed = nn.MultiheadAttention(8, 2)
    found = by_name(nn.ModuleDict({"attn": packed}))
    assert list(found) == ["attn.q", "attn.k", "attn.v", "attn.out_proj"]
    assert torch.equal(torch.cat([found[f"attn.{part}"].read() for part in "qkv"]), packed.in_proj_weight)
    assert [found[f"attn.{part}"].input.keyword for part in "qkv"] == ["query", "key", "value"]
    assert found["attn.out_proj"].input is None
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    found = by_name(nn.ModuleDict({"attn": apart}))
    assert [tuple(matrix.read().shape) for matrix in found.values()] == [(8, 8), (8, 6), (8, 4), (8, 8)]
    assert torch.equal(found["attn.k"].read(), apart.k_proj_weight)


@pytest.mark.parametrize("name", ["qkv", "c_attn", "in_proj", "Wqkv"])
@pytest.mark.parametrize("layer", [nn.Linear(4, 12), Conv1D(12, 4)])
def test_packed_query_key_value(name, layer):
    found = by_name(nn.ModuleDict({name: layer, "mlp": nn.Linear(4, 12), "query_key_value": nn.Linear(4, 12)}))
    assert list(found) == [f"{name}.q", f"{name}.k", f"{name}.v", "mlp", "query_key_value"]
    whole = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    assert torch.equal(torch.cat([found[f"{name}.{part}"].read() for part in "qkv"]), whole)
    assert {found[f"{name}.{part}"].input.module for part in "qkv"} == {layer}


def test_transposed_layer_of_hugging_face():
    layer = Conv1D(6, 4)
    matrix = by_name(nn.Sequential(layer))["0"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(x @ matrix.read().T, layer(x))


def test_convolutions_have_no_input_rows():
    net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.ConvTranspose2d(8, 4, 2), nn.Conv1d(4, 4, 3, groups=2))
    found = by_name(net)
    assert [tuple(matrix.read().shape) for matrix in found.values()] == [(8, 75), (4, 32), (4, 6)]
    assert all(matrix.input is None for matrix in found.values())
    patches = nn.functional.unfold(x := torch.randn(1, 3, 5, 5), 5)
    torch.testing.assert_close(found["0"].read() @ patches[0, :, 0] + net[0].bias, net[0](x).flatten())


def test_recurrent_layers():
    found = by_name(nn.Sequential(nn.LSTM(3, 4)))
    assert {name: tuple(matrix.read().shape) for name, matrix in found.items()} == {
        "0.weight_ih_l0": (16, 3),
        "0.weight_hh_l0": (16, 4),
    }
    assert all(matrix.input is None for matrix in found.values())


def test_embeddings_on_request_and_tied_weights_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 10)
            self.head.weight = self.embed.weight
            self.again = self.first

    assert list(by_name(Tied())) == ["first", "head"]
    assert list(by_name(Tied(), embeddings=True)) == ["embed", "first"]


def test_parametrized_weight_is_the_one_in_effect():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = nn.Linear(3, 3)
    plain = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", Double())
    found = by_name(nn.Sequential(layer, parametrizations.weight_norm(nn.Linear(3, 2))))
    assert list(found) == ["0", "1"]
    torch.testing.assert_close(found["0"].read(), 2 * plain)
    assert found["1"].read().shape == (2, 3)


def test_a_look_at_a_spectrally_normalized_weight_changes_nothing():
    layer = parametrizations.spectral_norm(nn.Linear(6, 6))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    matrix = by_name(nn.Sequential(layer))["0"]
    for _ in range(3):
        matrix.read()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(module.training for module in layer.modules())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weight_norm_of_old():
    layer = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    matrix = by_name(nn.Sequential(layer))["0"]
    torch.testing.assert_close(matrix.read(), layer.weight.detach())
    assert matrix.input.module is layer


class Lora(nn.Module):
    """A wrapped layer with named adapters, as ``peft`` builds them."""

    def __init__(self, base):
        super().__init__()
        inputs, outputs = (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)
        self.base_layer = base
        self.lora_A = nn.ModuleDict({name: nn.Linear(inputs, 2, bias=False) for name in ("on", "off")})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, outputs, bias=False) for name in ("on", "off")})
        self.scaling = {"on": 0.5, "off": 2.0}
        self.active_adapters = ["on"]
        self.merged = False

    def forward(self, x):
        return self.base_layer(x) + 0.5 * self.lora_B["on"](self.lora_A["on"](x))


@pytest.mark.parametrize("base", [nn.Linear(4, 6, bias=False), Conv1D(6, 4)])
def test_adapters_count_with_their_layer(base):
    lora = Lora(base)
    found = by_name(nn.ModuleDict({"proj": lora}))
    assert list(found) == ["proj"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(x @ found["proj"].read().T, lora(x).detach())
    assert found["proj"].input.module is lora
    lora.merged = True
    torch.testing.assert_close(x @ found["proj"].read().T, base(x).detach())


def test_adapters_in_the_layer_itself():
    layer = nn.Linear(4, 6, bias=False)
    layer.lora_A, layer.lora_B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6, 2))
    layer.scaling, layer.merged = 3.0, False
    found = by_name(nn.Sequential(layer))
    torch.testing.assert_close(found["0"].read(), (layer.weight + 3 * layer.lora_B @ layer.lora_A).detach())


def test_what_is_no_matrix_is_left_out():
    quantized = Replaced()
    quantized.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.uint8), requires_grad=False)
    experts = nn.Module()
    experts.weight = nn.Parameter(torch.ones(2, 3, 4))
    flat = nn.Module()
    flat.weight = nn.Parameter(torch.ones(0, 3))
    assert not weight_matrices(nn.Sequential(quantized, experts, flat, nn.LazyLinear(3)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.cfloat], ids=str)
def test_what_holds_no_real_numbers_is_named(dtype):
    coded = Replaced()
    coded.weight = nn.Parameter(torch.ones(4, 3).to(dtype), requires_grad=False)
    net = nn.ModuleDict({"coded": coded, "plain": nn.Linear(3, 3)})
    assert list(by_name(net)) == ["plain"]
    assert left_out_weights(net) == {"coded.weight": str(dtype)}


def test_marks_of_compilation_leave_the_names():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    net[0] = torch.compile(net[0], backend="eager")
    assert list(by_name(net)) == ["0"]
