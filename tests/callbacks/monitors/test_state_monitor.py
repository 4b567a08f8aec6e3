"""The state monitor reads what recurrent layers hold, at the training length and at twice that."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, StateMonitor
from lightning_collapse.functional.states import state_statistics, time_constants, transition_matrix
from lightning_collapse.monitoring.state_hooks import StateHooks, find_readers
from lightning_collapse.utilities.containment import Containment
from tests.toys import PointKeeper, fit

LENGTH = 12


def read(module, *args):
    """What is read of one call."""
    readers = find_readers(module)
    hooks = StateHooks(readers, Containment("test"))
    hooks.armed = True
    module(*args)
    hooks.armed = False
    found = hooks.pop()
    hooks.remove()
    return found, {name: reader for reader in readers for name in reader.names}


KINDS = {
    "plain": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
    "gru": (nn.GRU, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    "lstm": (nn.LSTM, {"num_layers": 2}),
    "projected": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
}
quiet = pytest.mark.filterwarnings("ignore:LSTM with projections")


@quiet
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_that_the_layer_ends_with(kind, batch_first):
    torch.manual_seed(0)
    cls, options = KINDS[kind]
    layer = cls(4, 6, batch_first=batch_first, **options).eval()  # without dropout
    rows = torch.randn(5, LENGTH, 4)
    given = rows if batch_first else rows.transpose(0, 1)
    found, readers = read(layer, given)
    _, last = layer(given)
    ends = last[1] if isinstance(last, tuple) else last
    assert len(found) == len(ends)
    for (name, seen), end in zip(found.items(), ends, strict=True):
        assert seen.length == LENGTH
        torch.testing.assert_close(seen.states[:, 2, 0, 0], end)
        matrix = readers[name].modes(name, seen.means.mean(dim=0)).matrix
        assert len(matrix) == (end.shape[1] + (last[0].shape[2]) if isinstance(last, tuple) else end.shape[1])
    first = next(iter(found.values()))
    for place, length in enumerate((LENGTH // 4, LENGTH // 2)):
        _, part = layer(given[:, :length] if batch_first else given[:length])
        torch.testing.assert_close(first.states[:, place, 0, 0], (part[1] if isinstance(part, tuple) else part)[0])
    _, twice = layer(torch.cat([given, given], dim=int(batch_first)))
    torch.testing.assert_close(first.states[:, 3, 0, 0], (twice[1] if isinstance(twice, tuple) else twice)[0])


def test_given_states_and_single_sequences_are_read_too():
    torch.manual_seed(0)
    layer, rows, start = nn.LSTM(4, 6), torch.randn(LENGTH, 20, 4), (torch.randn(1, 20, 6), torch.randn(1, 20, 6))
    [seen] = read(layer, rows, start)[0].values()
    ends = layer(rows, start)[1][1][0]
    assert len(seen.states) == 8  # of twenty
    assert all(any(torch.allclose(state, end, atol=1e-6) for end in ends) for state in seen.states[:, 2, 0, 0])
    [seen] = read(layer, rows[:, 0], tuple(part[:, 0] for part in start))[0].values()
    torch.testing.assert_close(seen.states[:, 2, 0, 0], ends[:1])


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_sequences_are_read_without_their_padding(batch_first):
    torch.manual_seed(0)
    layer, rows = nn.GRU(4, 6, bidirectional=True, batch_first=batch_first), [torch.randn(n, 4) for n in (7, 12, 9)]
    packed, start = pack_sequence(rows, enforce_sorted=False), torch.randn(2, 3, 6)
    found = read(layer, packed, start)[0]
    cut = torch.stack([rows[i][:7] for i in (1, 2, 0)])  # the longest first, all as long as the shortest
    _, ends = layer(cut if batch_first else cut.transpose(0, 1), start[:, [1, 2, 0]])
    for seen, end in zip(found.values(), ends, strict=True):
        assert seen.length == 7
        torch.testing.assert_close(seen.states[:, 2, 0, 0], end)


class Steps(nn.Module):
    """Calls a cell token by token."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, rows, again=1):
        for _ in range(again):  # the first time is forgotten
            state = None
            for row in rows.unbind(1):
                state = self.cell(row, state) if state is not None else self.cell(row)
        return state


@pytest.mark.parametrize("cls", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cells_are_read_as_the_layer_that_they_make_up(cls):
    torch.manual_seed(0)
    net, rows = Steps(cls(4, 6)), torch.randn(3, LENGTH, 4)
    found, readers = read(net, rows, 2)
    end = net(rows)
    [(name, seen)] = found.items()
    assert (name, seen.length) == ("cell", LENGTH)
    torch.testing.assert_close(seen.states[:, 2, 0, 0], end[1] if isinstance(end, tuple) else end)
    assert (
        readers["cell"].modes("cell", seen.means.mean(dim=0)).matrix.shape == (12, 12) if cls is nn.LSTMCell else (6, 6)
    )


class Mixer(nn.Module):
    """A selective state space as Hugging Face's Mamba and Jamba build theirs, token by token."""

    def __init__(self, norms=False, width=6, states=3, rank=2):
        super().__init__()
        self.x_proj, self.dt_proj = nn.Linear(width, rank + 2 * states, bias=False), nn.Linear(rank, width)
        self.A_log, self.D = nn.Parameter(torch.randn(width, states)), nn.Parameter(torch.ones(width))
        self.sizes = [rank, states, states]
        if norms:
            self.dt_layernorm, self.b_layernorm = nn.RMSNorm(rank), nn.RMSNorm(states)
            self.c_layernorm = nn.RMSNorm(states)

    def forward(self, u):
        dt, b, c = self.x_proj(u).split(self.sizes, dim=-1)
        if hasattr(self, "dt_layernorm"):
            dt, b, c = self.dt_layernorm(dt), self.b_layernorm(b), self.c_layernorm(c)
        steps, state, self.states, outputs = nn.functional.softplus(self.dt_proj(dt)), 0.0, [], []
        for t in range(u.shape[1]):
            step = steps[:, t, :, None]
            state = (-step * self.A_log.exp()).exp() * state + step * u[:, t, :, None] * b[:, t, None]
            self.states.append(state)
            outputs.append((state * c[:, t, None]).sum(dim=-1))
        self.steps = steps
        return torch.stack(outputs, dim=1) + self.D * u


class Mixer2(nn.Module):
    """A mixer of Mamba-2: four heads of 2 x 3 in two groups."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.conv1d = nn.Linear(5, 8 + 20 + 4), nn.Conv1d(20, 20, 4, groups=20, padding=3)
        self.A_log, self.dt_bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.n_groups, self.ssm_state_size = 2, 3

    def forward(self, x):
        _, mixed, dt = self.in_proj(x).split([8, 20, 4], dim=-1)
        mixed = nn.functional.silu(self.conv1d(mixed.mT)[..., : x.shape[1]]).mT
        u, b, _ = mixed.split([8, 6, 6], dim=-1)
        steps, state, self.states = nn.functional.softplus(dt + self.dt_bias), 0.0, []
        for t in range(x.shape[1]):
            step, key = steps[:, t, :, None, None], b[:, t].view(-1, 2, 1, 1, 3).expand(-1, 2, 2, 1, 3).flatten(1, 2)
            state = (-step * self.A_log.exp()[:, None, None]).exp() * state + step * u[:, t].view(-1, 4, 2, 1) * key
            self.states.append(state)
        return x


class Fifty(nn.Linear):
    """Large enough for its exponentials to overflow single precision."""

    def forward(self, x):
        return 50 * super().forward(x)


class TimeMixing(nn.Module):
    """Attention of RWKV-4."""

    def __init__(self):
        super().__init__()
        self.key, self.value = Fifty(5, 6), nn.Linear(5, 6)
        self.time_decay = nn.Parameter(torch.randn(6))

    def forward(self, x):
        key, value = self.key(x), self.value(x)
        self.states, top, bottom = [], 0.0, 0.0
        fade, weight = (-self.time_decay.double().exp()).exp(), key.double().exp()
        for t in range(x.shape[1]):
            top, bottom = fade * top + weight[:, t] * value[:, t].double(), fade * bottom + weight[:, t]
            self.states.append((top / bottom).float()[:, :, None])
        return x


@pytest.mark.parametrize("make", [Mixer, lambda: Mixer(norms=True), Mixer2, TimeMixing])
def test_mixers_are_read_as_they_compute(make):
    torch.manual_seed(0)
    net = make()
    rows = torch.randn(3, LENGTH, 6 if isinstance(net, Mixer) else 5)
    found, readers = read(net, rows)
    [(name, seen)] = found.items()
    wanted = torch.stack([net.states[place - 1] for place in (3, 6, 12)], dim=1)
    shape = wanted.shape if wanted.ndim == 5 else (*wanted.shape[:3], 1, wanted.shape[3])
    torch.testing.assert_close(seen.states[:, :3], wanted.detach().reshape(shape), rtol=1e-4, atol=1e-6)
    net(torch.cat([rows, rows], dim=1))
    if not isinstance(net, Mixer2):  # whose convolution sees the end of the first time
        torch.testing.assert_close(seen.states[:, 3].flatten(), net.states[-1].detach().flatten(), rtol=1e-4, atol=1e-6)
    modes = readers[name].modes(name, seen.means.mean(dim=0))
    if isinstance(net, Mixer):
        net(rows)
        wanted = 1 / (net.steps.mean(dim=(0, 1))[:, None] * net.A_log.exp())
        torch.testing.assert_close(time_constants(modes.rates, "continuous"), wanted.detach().flatten())
        c, b = readers[name].projections()
        torch.testing.assert_close(torch.cat([b, c]), net.x_proj.weight.detach()[2:])


class Language(LightningModule):
    """A recurrent layer between an embedding and a head."""

    def __init__(self, scale=None, length=LENGTH):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(6, 7)
        self.rnn = nn.GRU(5, 6, batch_first=True) if scale is None else nn.RNN(5, 6, 1, "relu", batch_first=True)
        if scale is not None:
            nn.init.eye_(self.rnn.weight_hh_l0).data.mul_(scale)

    def training_step(self, tokens, batch_idx):
        self.inputs = self.embed(tokens).detach()
        logits = self.head(self.rnn(self.embed(tokens))[0])
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def text(steps=4, size=6):
    return DataLoader(
        torch.randint(7, (steps, size, LENGTH), generator=torch.Generator().manual_seed(0)), batch_size=None
    )


def train(*callbacks, model=None, **kwargs):
    torch.manual_seed(0)
    model, keeper = Language() if model is None else model, PointKeeper()
    trainer = fit(model, [*callbacks, keeper], kwargs.pop("data", text()), **kwargs)
    return model, keeper, trainer


def values(keeper, step):
    return {point.measure: point.value for point in keeper.points if point.family == "state" and point.step == step}


def test_curves_are_the_statistics_of_the_states_and_the_modes_of_the_mean_transition():
    monitor = StateMonitor(every_n_steps=1, modes_every=3)
    model, keeper, _ = train(monitor, model=(model := Language()), data=text(1))
    found, gru = values(keeper, 0), model.rnn
    curves = {curve.name for curve in StateMonitor.declares}
    assert set(found) == curves - {"token_divergence"}
    assert (found["n"], found["flag"]) == (6, 0)
    with torch.no_grad():
        inputs = model.inputs  # of weights before the step, which moves them by next to nothing
        states, _ = gru(torch.cat([inputs, inputs], dim=1))
    places = torch.stack([states[:, place - 1] for place in (3, 6, 12, 24)], dim=1)[:, :, None, None]
    wanted = state_statistics(places)
    assert found["rms"] == pytest.approx(wanted.rms[2].item(), rel=0.05)
    assert found["early_rank"] == pytest.approx(wanted.effective_rank[0].item(), rel=0.05)
    weights = [getattr(gru, f"{name}_l0") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    matrix = transition_matrix("GRU", weights, inputs.mean(dim=(0, 1)), states[:, LENGTH - 1].mean(dim=0))
    moduli = torch.linalg.eigvals(matrix).abs()
    assert found["spectral_radius"] == pytest.approx(moduli.max().item(), rel=1e-2)
    assert found["transient_4"] == pytest.approx(torch.linalg.matrix_power(matrix, 4).norm(2).item(), rel=0.6)
    assert found["memory_longest"] == pytest.approx(-1 / moduli.max().log().item() / LENGTH, rel=0.02)


def test_modes_are_read_at_some_points_and_states_at_all():
    _, keeper, _ = train(StateMonitor(every_n_steps=1, modes_every=2))
    assert ["conditioning" in values(keeper, step) for step in range(4)] == [True, False, True, False]
    assert all("growth" in values(keeper, step) for step in range(4))
    _, keeper, _ = train(StateMonitor(every_n_steps=1, max_dim=5))
    assert "conditioning" not in values(keeper, 0)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_states_are_read_in_full_whatever_the_precision(precision):
    usual = values(train(StateMonitor(every_n_steps=2))[1], 0)
    found = values(train(StateMonitor(every_n_steps=2), precision=precision)[1], 0)
    assert found.keys() == usual.keys()
    for key in ("rms", "growth", "spectral_radius", "transient_1"):
        assert found[key] == pytest.approx(usual[key], rel=0.05, abs=0.01)


def test_a_model_without_memory_is_told_what_to_do_at_the_start():
    interrupted = pytest.raises(SystemExit)

    class Plain(Language):
        def __init__(self):
            super().__init__()
            self.rnn = None

        def training_step(self, tokens, batch_idx):
            return self.head(nn.functional.pad(self.embed(tokens), (0, 1))).square().mean()

        def on_train_start(self):
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match=r"the model has no recurrent layer that is known.*read=") as said, interrupted:
        train(StateMonitor(), model=Plain())
    assert sum("recurrent" in str(w.message) for w in said) == 1
    with pytest.warns(UserWarning, match=r"what `layers=\['head'\]` names has no recurrent layer"):
        train(StateMonitor(layers=["head"], every_n_steps=1))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layers": "rnn"}, r"takes a list"),
        ({"read": print}, r"`read` takes a function .* layers=None"),
        ({"layers": ["rnn"], "read": 3}, r"`read` takes a function .* got 3"),
        ({"modes_every": 0}, r"`modes_every` .* got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        StateMonitor(**arguments)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(MisconfigurationException, match=r"StateMonitor\(layers=\['gru'\]\)"):
        train(StateMonitor(layers=["gru"]))


def test_other_states_are_told_by_a_function_and_what_it_returns_wrongly_is_said():
    def of_output(module, args, output):
        return output[0].unflatten(2, (2, 3))  # heads

    _, keeper, _ = train(StateMonitor(["rnn"], read=of_output, every_n_steps=2))
    assert {"growth", "smallest_rms"} <= set(values(keeper, 0))
    assert "conditioning" not in values(keeper, 0)
    with pytest.warns(UserWarning, match=r"`read` must return states \(N, L, F\).*got tuple"):
        train(StateMonitor(["rnn"], read=lambda module, args, output: output, every_n_steps=1))


def test_a_state_that_explodes_beyond_its_length_is_told_though_the_loss_is_fine():
    for scale, failed in ((0.5, []), (1.5, ["rnn"])):
        guard = CollapseGuard()
        _, keeper, _ = train(
            StateMonitor(every_n_steps=1), guard, model=Language(scale), data=text(12), log_every_n_steps=1
        )
        assert [v.layer for v in guard.judge.verdicts if v.kind == "state_collapse"] == failed
        assert math.isfinite(values(keeper, 11)["growth"])
