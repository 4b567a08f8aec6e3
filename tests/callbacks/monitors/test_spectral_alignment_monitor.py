"""``SpectralAlignmentMonitor`` reads what the batch and the weights of a step say, and leaves the fit as it was."""

import logging
import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.demos import Transformer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import SpectralAlignmentMonitor
from lightning_collapse.functional import mean_energy_share, sign_diversity, spectral_alignment
from lightning_collapse.monitoring.input_projections import InputProjections
from lightning_collapse.spectral import power_iteration
from lightning_collapse.utilities import Flag, weight_matrices
from tests.toys import QUIET, ManualToy, MemoryLogger, PointKeeper, Toy, batches, fit, weights

HEAD = "spectral_alignment/head/sign_diversity"


def monitor(**kwargs):
    return SpectralAlignmentMonitor(**{"every_n_steps": 2, **kwargs})


class Spy(Callback):
    """Keeps weights and inputs of every training batch."""

    def __init__(self, name):
        self.name = name
        self.batches = []

    def on_fit_start(self, trainer, pl_module):
        def keep(module, args):
            self.batches.append((args[0].detach().clone(), module.weight.detach().clone()))

        self.handle = pl_module.get_submodule(self.name).register_forward_pre_hook(keep)

    def on_fit_end(self, trainer, pl_module):
        self.handle.remove()


@pytest.mark.parametrize("layer", ["encoder.0", "encoder.2", "head"])
@pytest.mark.parametrize("every", [1, 3])
def test_values_are_those_of_the_batch_and_the_weights_it_met(layer, every):
    spy, keeper = Spy(layer), PointKeeper()
    fit(Toy(), [spy, monitor(every_n_steps=every), keeper])
    due = sorted({0, *range(every - 1, 6, every)})
    for name, reference in {
        "sign_diversity": lambda x, w: sign_diversity(spectral_alignment(x, w)),
        "sign_diversity_centered": lambda x, w: sign_diversity(spectral_alignment(x, w, center=True)),
        "spectral_norm": lambda x, w: torch.linalg.matrix_norm(w, 2),
        "mean_energy_share": lambda x, w: mean_energy_share(x),
    }.items():
        points = keeper.curve(f"spectral_alignment/{layer}/{name}")
        assert [point.step for point in points] == due
        assert all(point.flag == Flag.OK and point.n == 32 for point in points)
        expected = [reference(*spy.batches[step]).item() for step in due]
        assert [point.value for point in points] == pytest.approx(expected, rel=1e-4), name
    means = [point.value for point in keeper.curve(f"spectral_alignment/{layer}/alignment_mean")]
    expected = [spectral_alignment(*spy.batches[step]).mean().item() for step in due]
    assert list(map(abs, means)) == pytest.approx(list(map(abs, expected)), abs=1e-3)


class Given(LightningModule):
    """One layer with a weight and inputs of our choice."""

    def __init__(self, weight, inputs, layer=None):
        super().__init__()
        self.layer = layer or nn.Linear(*reversed(weight.shape), bias=False)
        if layer is None:
            self.layer.weight.data = weight.clone()
        self.inputs = inputs

    def training_step(self, batch, batch_idx):
        return self.layer(self.inputs.to(self.layer.weight.dtype)).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def read(model, **kwargs):
    keeper = PointKeeper()
    trainer = fit(model, [monitor(every_n_steps=1), keeper], batches(1), **kwargs)
    return {point.key.removeprefix("spectral_alignment/"): point for point in keeper.points}, trainer


A, B = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.0, -1.0, 0.0])
PERPENDICULAR = torch.tensor([0.0, 3.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("inputs", "diversity", "mean", "energy"),
    [
        (torch.arange(1.0, 5).unsqueeze(1) * B, 0.0, 1.0, 25 / 30),
        (torch.cat([B.expand(4, 4), -B.expand(4, 4)]), 1.0, 0.0, 0.0),
        (torch.stack([PERPENDICULAR, -PERPENDICULAR]), math.nan, 0.0, 0.0),
        (torch.stack([PERPENDICULAR, B, B, -B]), 2 / 3, 0.25, 15 / 100),
    ],
)
def test_closed_forms_of_a_rank_one_weight(inputs, diversity, mean, energy):
    points, _ = read(Given(torch.outer(A, B), inputs))
    assert points["layer/sign_diversity"].value == pytest.approx(diversity, nan_ok=True)
    assert points["layer/alignment_mean"].value == pytest.approx(mean, abs=1e-6)
    assert points["layer/mean_energy_share"].value == pytest.approx(energy, abs=1e-6)
    assert points["layer/spectral_norm"].value == pytest.approx((A.norm() * B.norm()).item(), rel=1e-6)
    assert points["layer/flag"].value == Flag.OK
    assert points["all/residual"].value < 1e-6


def test_aggregates():
    class Two(Toy):
        def __init__(self):
            super().__init__()
            # a positive matrix has a positive singular vector, and receives nothing that is negative
            self.encoder = nn.Sequential(nn.Linear(16, 8), nn.Softplus())
            self.head.weight.data.abs_()

    keeper = PointKeeper()
    trainer = fit(Two(), [monitor(), keeper])
    names = ("encoder.0", "head")
    assert len(trainer.logger.rows) == 4
    for _, row in trainer.logger.rows:
        values = {key.removeprefix("spectral_alignment/"): value for key, value in row.items()}
        diversities = [values[f"{name}/sign_diversity"] for name in names]
        assert diversities[1] == 0
        assert values["all/sign_diversity"] == pytest.approx(sum(diversities) / 2)
        assert values["all/collapsed_share"] == 0.5
        assert values["all/mean_energy_share"] == pytest.approx(
            sum(values[f"{name}/mean_energy_share"] for name in names) / 2
        )
        assert values["all/spectral_norm"] == max(values[f"{name}/spectral_norm"] for name in names)
        assert values["all/n"] == 32
        assert len(values) == 2 * 6 + 6


@pytest.mark.parametrize("toy", [Toy, ManualToy])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_and_random_state_are_the_same_without_us(toy, precision, accumulate):
    if toy is ManualToy and accumulate == 2:
        pytest.skip("Lightning refuses to accumulate for a module that optimizes by hand")

    def run(callbacks):
        torch.manual_seed(0)
        model = toy()
        trainer = fit(model, callbacks, precision=precision, accumulate_grad_batches=accumulate)
        return weights(model), torch.random.get_rng_state(), trainer

    watched, random_state, trainer = run([monitor()])
    plain, expected_state, _ = run([])
    assert torch.equal(random_state, expected_state)
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    curve = trainer.logger.curve(HEAD)
    assert [step for step, _ in curve] == ([0, 1, 3, 5] if accumulate == 1 else [0, 1])
    assert all(0 <= value <= 1 for _, value in curve)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_half_precision_reads_what_double_precision_of_the_same_numbers_reads(precision):
    torch.manual_seed(0)
    weight, inputs = torch.randn(20, 30), torch.randn(200, 30) + 0.1
    points, trainer = read(Given(weight, inputs), precision=precision)
    half = torch.float16 if precision == "16-true" else torch.bfloat16
    weight = trainer.model.layer.weight.detach().double()
    inputs = inputs.double() if precision == "bf16-mixed" else inputs.to(half).double()
    alignment = spectral_alignment(inputs, weight)
    assert points["layer/sign_diversity"].value == pytest.approx(sign_diversity(alignment).item(), rel=1e-6)
    assert abs(points["layer/alignment_mean"].value) == pytest.approx(abs(alignment.mean().item()), rel=1e-4)
    assert points["layer/spectral_norm"].value == pytest.approx(torch.linalg.matrix_norm(weight, 2).item(), rel=1e-5)


def test_transformer_without_an_argument():
    class Encoder(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)

        def training_step(self, batch, batch_idx):
            return self.net(batch.view(4, 8, 16)).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    spy, keeper = Spy("net.layers.1.linear2"), PointKeeper()
    torch.manual_seed(0)
    fit(Encoder(), [spy, SpectralAlignmentMonitor(every_n_steps=3), keeper])
    parts = ["self_attn.q", "self_attn.k", "self_attn.v", "linear1", "linear2"]
    assert {point.key.split("/")[1] for point in keeper.points} == {
        "all",
        *(f"net.layers.{i}.{part}" for i in (0, 1) for part in parts),
    }
    assert all(point.value == Flag.OK for point in keeper.points if point.key.endswith("/flag"))
    point = keeper.curve("spectral_alignment/net.layers.1.linear2/sign_diversity_centered")[-1]
    inputs, weight = spy.batches[5]
    expected = sign_diversity(spectral_alignment(inputs.flatten(0, 1), weight, center=True))
    assert point.value == pytest.approx(expected.item(), abs=1e-6)


def test_transformer_of_lightning_itself():
    class Language(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Transformer(vocab_size=20, ninp=16, nhead=2, nhid=16, nlayers=1)

        def training_step(self, batch, batch_idx):
            return nn.functional.nll_loss(self.model(batch[:, :-1], batch[:, 1:]), batch[:, 1:].flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    keeper = PointKeeper()
    loader = DataLoader(torch.randint(20, (12, 9)), batch_size=4)
    fit(Language(), [SpectralAlignmentMonitor(every_n_steps=3), keeper], loader)
    cross = keeper.curve("spectral_alignment/model.transformer.decoder.layers.0.multihead_attn.k/sign_diversity")
    assert [(point.step, point.n, point.flag) for point in cross] == [(0, 32, Flag.OK), (2, 32, Flag.OK)]
    assert keeper.curve("spectral_alignment/model.decoder/sign_diversity")[0].flag == Flag.OK


def test_query_key_and_value_of_cross_attention_are_apart():
    class Cross(Given):
        def training_step(self, batch, batch_idx):
            q, k, v = self.inputs
            return self.layer(q, key=k, value=v)[0].pow(2).mean()

    layer, inputs = attention()
    points, _ = read(Cross(None, inputs, layer))
    check_query_key_and_value(points, layer, inputs)


def test_query_key_and_value_of_self_attention_are_apart():
    class Own(Given):
        def training_step(self, batch, batch_idx):
            return self.layer(self.inputs, self.inputs, self.inputs)[0].pow(2).mean()

    layer, inputs = attention()
    points, _ = read(Own(None, inputs[0], layer))
    check_query_key_and_value(points, layer, [inputs[0]] * 3)


def attention():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    return layer, torch.randn(3, 5, 7, 8) + torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)


def check_query_key_and_value(points, layer, inputs):
    for part, x, weight in zip("qkv", inputs, layer.in_proj_weight.detach().chunk(3), strict=True):
        alignment = spectral_alignment(x.flatten(0, 1), weight)
        assert points[f"layer.{part}/sign_diversity"].value == pytest.approx(sign_diversity(alignment).item())
        mean = points[f"layer.{part}/alignment_mean"].value
        assert abs(mean) == pytest.approx(abs(alignment.mean().item()), rel=1e-3)


@pytest.mark.parametrize(("sequences", "length", "rows"), [(64, 16, 64), (64, 16, 200), (100, 15, 100), (8, 64, 32)])
def test_rows_are_spread_over_all_sequences_and_positions(sequences, length, rows):
    """One-hot tokens: along the singular vector their mean cosine is the share of what that vector points to."""
    position = torch.eye(length).expand(sequences, length, length)
    sequence = torch.eye(sequences).unsqueeze(1).expand(sequences, length, sequences)
    for tokens in (position, sequence):
        width = tokens.shape[-1]
        keeper = PointKeeper()
        model = Given(torch.diag(torch.tensor([3.0] + [1.0] * (width - 1))), tokens)
        fit(model, [monitor(every_n_steps=1, rows=rows), keeper], batches(1))
        point = keeper.curve("spectral_alignment/layer/alignment_mean")[0]
        assert rows / 2 < point.n <= rows
        assert 0.4 / width < point.value < 2.5 / width


def test_padding_does_not_count():
    class Padded(Given):
        def training_step(self, batch, batch_idx):
            return self.layer(batch["x"]).pow(2).mean()

    x = torch.cat([B.expand(2, 3, 4), -B.expand(2, 2, 4)], dim=1)
    batch = {"x": x, "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])}
    keeper = PointKeeper()
    fit(Padded(torch.outer(A, B), None), [monitor(every_n_steps=1), keeper], DataLoader([batch], batch_size=None))
    point = keeper.curve("spectral_alignment/layer/sign_diversity")[0]
    assert (point.n, point.flag) == (7, Flag.OK)
    assert point.value == pytest.approx(2 / 7)
    mean = (6 - 1) / 7
    assert keeper.curve("spectral_alignment/layer/mean_energy_share")[0].value == pytest.approx(mean**2)


def test_bad_rows_are_left_out():
    torch.manual_seed(0)
    weight, inputs = torch.randn(5, 4), torch.randn(20, 4)
    spoiled = inputs.clone()
    spoiled[3, 1], spoiled[7, 0] = math.nan, math.inf
    points, _ = read(Given(weight, spoiled))
    point = points["layer/sign_diversity"]
    assert (point.n, point.flag) == (18, Flag.NONFINITE)
    clean = torch.cat([inputs[:3], inputs[4:7], inputs[8:]])
    assert point.value == pytest.approx(sign_diversity(spectral_alignment(clean, weight)).item())
    assert points["layer/mean_energy_share"].value != points["layer/mean_energy_share"].value
    assert points["layer/spectral_norm"].flag == Flag.NONFINITE


@pytest.mark.parametrize("factor", [math.nan, 0.0])
def test_weights_without_a_singular_vector_are_flagged(factor):
    points, _ = read(Given(torch.ones(3, 4) * factor, torch.randn(20, 4)))
    assert points["layer/flag"].value == Flag.UNCONVERGED
    assert math.isnan(points["layer/sign_diversity"].value)
    assert points["layer/spectral_norm"].value == pytest.approx(factor, nan_ok=True)
    assert math.isnan(points["all/sign_diversity"].value)
    assert math.isnan(points["all/collapsed_share"].value)


def test_nearly_equal_singular_values_are_flagged():
    weight = torch.diag(torch.tensor([1.0, 1.0, 0.5]))
    points, _ = read(Given(weight, torch.randn(20, 3)))
    assert points["layer/flag"].value == Flag.UNCONVERGED
    assert points["layer/spectral_norm"].value == pytest.approx(1)


def test_layer_that_never_runs_is_flagged_with_one_warning():
    class Idle(Toy):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(4, 4)

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="inputs of `idle` were not seen") as record:
        fit(Idle(), [monitor(), keeper])
    assert len([w for w in record if "idle" in str(w.message)]) == 1
    assert [point.flag for point in keeper.curve("spectral_alignment/idle/sign_diversity")] == [Flag.NOT_CALLED] * 4
    assert all(point.value > 0 for point in keeper.curve("spectral_alignment/idle/spectral_norm"))
    assert all(0 < point.value < 1 for point in keeper.curve("spectral_alignment/all/sign_diversity"))


def test_frozen_layers_that_never_run_are_flagged_without_a_warning():
    class Replaced(Toy):
        def __init__(self):
            super().__init__()
            self.originals = nn.ModuleList(nn.Linear(4, 4) for _ in range(2)).requires_grad_(False)

    keeper = PointKeeper()
    fit(Replaced(), [monitor(), keeper])  # warnings are errors
    for name in ("originals.0", "originals.1"):
        curve = keeper.curve(f"spectral_alignment/{name}/sign_diversity")
        assert [point.flag for point in curve] == [Flag.NOT_CALLED] * 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_every_call_counts_but_recomputation_does_not(reentrant):
    class Siamese(Toy):
        def training_step(self, batch, batch_idx):
            views = (batch.requires_grad_(), batch + 1)
            checkpoint = torch.utils.checkpoint.checkpoint
            features = [checkpoint(self.encoder, view, use_reentrant=reentrant) for view in views]
            return self.head(features[0] - features[1]).pow(2).mean()

    keeper = PointKeeper()
    fit(Siamese(), [monitor(), keeper])
    assert [point.n for point in keeper.curve("spectral_alignment/encoder.0/sign_diversity")] == [64] * 4
    assert [point.n for point in keeper.curve(HEAD)] == [32] * 4


@pytest.mark.parametrize("place", ["inside", "whole"])
def test_compiled_model(place):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Compiled(Toy):
        def __init__(self):
            super().__init__()
            if place == "inside":
                self.encoder = torch.compile(self.encoder, backend=backend)

    def run(callbacks):
        graphs.clear()
        torch.compiler.reset()
        torch.manual_seed(0)
        model, keeper = Compiled(), PointKeeper()
        whole = torch.compile(model, backend=backend) if place == "whole" else model
        fit(whole, [*callbacks, keeper], batches(30))
        return weights(model), keeper, len(graphs)

    plain, _, alone = run([])
    watched, keeper, number = run([monitor(every_n_steps=5, rows=16)])
    assert number == alone
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert [point.n for point in keeper.curve("spectral_alignment/encoder.2/sign_diversity")] == [16] * 7


def test_odd_accumulation_window_at_the_end_of_an_epoch():
    trainer = fit(Toy(), [monitor(every_n_steps=1)], batches(5), accumulate_grad_batches=2)
    assert [step for step, _ in trainer.logger.curve(HEAD)] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # it is the point
def test_resumed_run_continues_its_curves(tmp_path, monkeypatch):
    loader = DataLoader(torch.randn(32, 16).repeat(6, 1), batch_size=32)

    def run(name, **kwargs):
        torch.manual_seed(0)
        keeper = PointKeeper()
        save = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename=name + "-{step}")
        trainer = Trainer(
            **{
                **QUIET,
                "max_epochs": 3,
                "logger": MemoryLogger(),
                "callbacks": [monitor(), keeper, save],
                "enable_checkpointing": True,
            }
        )
        trainer.fit(Toy(), loader, **kwargs)
        return [(point.key, point.step, point.value) for point in keeper.points]

    whole = run("first")
    colds = []
    monkeypatch.setattr(power_iteration, "_cold_block", lambda *args: colds.append(args))
    rest = run("again", ckpt_path=str(tmp_path / "first-step=5.ckpt"), weights_only=True)
    assert rest
    assert not colds
    assert rest == whole[-len(rest) :]


def test_two_monitors_have_two_states():
    assert monitor(layers=["head"]).state_key != monitor(layers=["encoder"]).state_key


def test_hooks_are_gone_after_the_fit_and_after_a_failure():
    model = Toy()
    fit(model, [monitor()])
    failing = Toy(fail_at=3)
    with pytest.raises(ValueError, match="boom"):
        fit(failing, [monitor(every_n_steps=4)])
    assert not any(module._forward_pre_hooks for net in (model, failing) for module in net.modules())


def test_one_callback_can_watch_one_model_after_another():
    once, keeper = monitor(), PointKeeper()
    fit(Toy(), [once])
    fit(Given(torch.outer(A, B), B.expand(5, 4)), [once, keeper])
    assert keeper.curve("spectral_alignment/layer/alignment_mean")[0].value == pytest.approx(1)


def test_layers_are_chosen_by_name():
    keeper = PointKeeper()
    fit(Toy(), [monitor(layers=["encoder"]), keeper])
    assert {point.key.split("/")[1] for point in keeper.points} == {"all", "encoder.0", "encoder.2"}


def test_histograms(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fit(Toy(), [monitor()], batches(24), logger=logger)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("spectral_alignment/head/alignment")] == [0, 19]
    histogram = events.Histograms("spectral_alignment/head/alignment")[0].histogram_value
    assert histogram.num == 32
    assert -1 <= histogram.min < histogram.max <= 1


def test_convolutions_are_passed_over(caplog):
    class Picture(Toy):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 4), nn.Flatten())

    keeper = PointKeeper()
    with caplog.at_level(logging.INFO):
        fit(Picture(), [monitor(), keeper])
    assert "watches 1 weight matrix. Of 1 other no module receives the inputs as rows. Choose with" in caplog.text
    assert {point.key.split("/")[1] for point in keeper.points} == {"all", "head"}
    with pytest.raises(MisconfigurationException, match=r"matches no layer whose inputs .*\(encoder.1\)"):
        fit(Picture(), [monitor(layers=["encoder"])])


def test_model_without_a_matrix():
    class Bare(LightningModule):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(16))

        def training_step(self, batch, batch_idx):
            return (batch * self.scale).pow(2).mean()

        configure_optimizers = Toy.configure_optimizers

    keeper = PointKeeper()
    fit(Bare(), [monitor(), keeper])
    assert not keeper.points


def test_stand_alone_validation_draws_nothing():
    keeper = PointKeeper()
    Trainer(**{**QUIET, "limit_val_batches": 2}, logger=False, callbacks=[monitor(every_n_steps=1), keeper]).validate(
        Toy(), batches(), verbose=False
    )
    assert not keeper.points


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"layers": "head"}, r"Write `layers=\['head'\]`"),
        ({"layers": []}, "`layers` is empty"),
        ({"rows": 1}, "`rows` must be at least 2, got 1"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        monitor(**arguments)


def test_pattern_without_a_match_lists_what_there_is():
    with pytest.raises(MisconfigurationException, match=r"'tail' matches no submodule of Toy\. It has: .*head"):
        fit(Toy(), [monitor(layers=["tail"])])


def test_what_was_heard_before_a_batch_that_never_ended_is_forgotten():
    layer = nn.Linear(4, 3)
    heard = InputProjections(weight_matrices(nn.Sequential(layer)), limit=16)
    direction = {"0": torch.eye(4)[0]}
    for rows in (5, 2):
        heard.aim(direction, None)
        heard.armed = True
        layer(torch.ones(rows, 4))
    [projected] = heard.pop().values()
    assert projected.projections.tolist() == [1.0, 1.0]
    heard.remove()


def test_weights_that_only_functions_use_are_told_once_with_their_count():
    class Functional(Toy):
        def __init__(self):
            super().__init__()
            self.stack = nn.ModuleList(nn.Linear(8, 8) for _ in range(10))

        def training_step(self, batch, batch_idx):
            features = self.encoder(batch)
            for layer in self.stack:
                features = nn.functional.linear(features, layer.weight)
            return self.head(features).pow(2).mean()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(Functional(), [monitor(every_n_steps=2)])
    [message] = [str(w.message) for w in told if "SpectralAlignmentMonitor" in str(w.message)]
    assert "`stack.0`" in message
    assert "`stack.7` and 2 more were not seen" in message
    assert "10 of 13 matrices" in message
