"""What ``WeightSpectrumMonitor`` draws, through a real ``Trainer``."""

import math

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, WeightSpectrumMonitor, register_measure
from lightning_collapse.functional import stable_rank, svd_entropy
from lightning_collapse.monitoring.weight_spectra import reading_flops
from lightning_collapse.utilities.points import Flag
from lightning_collapse.utilities.registry import MEASURES
from tests.toys import QUIET, ManualToy, PointKeeper, Toy, batches, fit, weights

TOP = "weights/head/spectral_norm"


class Steps(Callback):
    """Copies a weight before and after every batch, and so knows what the update was."""

    def __init__(self, name):
        self.name, self.before, self.updates, self.weights = name, None, [], []

    def read(self, pl_module):
        return pl_module.get_parameter(self.name).detach().double().clone()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = self.read(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(self.read(pl_module))
        self.updates.append(self.weights[-1] - self.before)


def spectrum(matrix):
    return torch.from_numpy(np.linalg.svd(matrix.flatten(1).numpy(), compute_uv=False))


def monitor(**kwargs):
    return WeightSpectrumMonitor(**{"every_n_steps": 2, **kwargs})


class Adam(Toy):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class ByHand(ManualToy):
    """Two optimizers, one of which steps twice."""

    def training_step(self, batch, batch_idx):
        for optimizer in (*self.optimizers(), self.optimizers()[0]):
            optimizer.zero_grad()
            self.manual_backward(self.head(self.encoder(batch)).pow(2).mean())
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.encoder, self.head)]


@pytest.mark.parametrize("toy", [Toy, Adam, ByHand])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_readings_are_those_of_the_weights_and_of_the_step_to_them(toy, accumulate):
    if toy is ByHand and accumulate == 2:
        pytest.skip("Lightning refuses to accumulate for a module that optimizes by hand")
    steps = Steps("encoder.0.weight")
    trainer = fit(toy(), [steps, monitor(every_n_steps=1)], batches(5), accumulate_grad_batches=accumulate)
    which = [0, 1, 2, 3, 4] if accumulate == 1 else [1, 3, 4]  # the odd last one steps too
    for family, matrices in (("weights", steps.weights), ("updates", steps.updates)):
        for name, measure in (
            ("spectral_norm", lambda s: s[0]),
            ("stable_rank", stable_rank),
            ("svd_entropy", svd_entropy),
        ):
            drawn = [value for _, value in trainer.logger.curve(f"{family}/encoder.0/{name}")]
            expected = [measure(spectrum(matrices[i])).item() for i in which]
            assert drawn == pytest.approx(expected, rel=1e-4 if family == "updates" else 1e-6)
    drawn = [value for _, value in trainer.logger.curve("updates/encoder.0/relative_norm")]
    assert drawn == pytest.approx([(steps.updates[i].norm() / steps.weights[i].norm()).item() for i in which], rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true", "16-mixed"])
def test_every_precision_and_nothing_is_changed(precision):
    def run(callbacks):
        torch.manual_seed(0)
        model = Adam()
        scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
        kwargs = {"plugins": [scaler]} if precision == "16-mixed" else {"precision": precision}
        if precision == "16-true":  # the moments of Adam do not fit
            model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.01)
        return model, fit(model, callbacks, **kwargs)

    steps = Steps("head.weight")
    watched, trainer = run([steps, monitor()])
    state = torch.random.get_rng_state()
    plain, _ = run([])
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    for family, matrices in (("weights", steps.weights), ("updates", steps.updates)):
        drawn = [value for _, value in trainer.logger.curve(f"{family}/head/spectral_norm")]
        expected = [spectrum(matrices[i])[0].item() for i in (1, 3, 5)]
        first = matrices[0] - steps.updates[0] if family == "weights" else matrices[0]  # before the first step
        expected.insert(0, spectrum(first)[0].item())
        assert drawn == pytest.approx(expected, rel=1e-3)


class Attention(LightningModule):
    """Packed attention, convolution, tied embedding, a parametrized and an adapted layer, a vector."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.conv = nn.Conv1d(16, 6, 3, padding=1)
        self.normed = parametrizations.weight_norm(nn.Linear(6, 16))
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.table.weight
        self.score = nn.Linear(12, 1)

    def training_step(self, batch, batch_idx):
        x = self.table(batch)
        x = self.conv(self.attention(x, x, x)[0].transpose(1, 2)).transpose(1, 2)
        return self.score(self.head(self.normed(x))).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_packed_tied_parametrized_and_convolution_weights():
    steps, model = Steps("attention.in_proj_weight"), Attention()
    callbacks = [steps, monitor(every_n_steps=1), monitor(every_n_steps=1, layers=["table"], embeddings=True)]
    with torch.random.fork_rng():
        tokens = DataLoader(torch.randint(12, (8, 5)), batch_size=4)
    trainer = fit(model, callbacks[:2], tokens)
    names = {key.split("/")[1] for key in trainer.callback_metrics}
    parts = {"attention.q", "attention.k", "attention.v", "attention.out_proj"}
    assert names == parts | {"conv", "normed", "head", "all"}  # of one row, as of a table, there is no spectrum
    for i, part in enumerate("qkv"):
        for family, matrices in (("weights", steps.weights), ("updates", steps.updates)):
            [*_, (_, drawn)] = trainer.logger.curve(f"{family}/attention.{part}/spectral_norm")
            assert drawn == pytest.approx(spectrum(matrices[-1].chunk(3)[i])[0].item(), rel=1e-4)
    metrics = trainer.callback_metrics
    for name, weight in (("conv", model.conv.weight), ("normed", model.normed.weight)):
        assert metrics[f"weights/{name}/spectral_norm"] == pytest.approx(spectrum(weight.detach())[0].item())
    trainer = fit(Attention(), [callbacks[2]], tokens)
    assert "weights/table/spectral_norm" in trainer.callback_metrics


def test_all_matrices_together():
    keeper, model = PointKeeper(), Toy()
    fit(model, [monitor(), keeper])
    last = {point.key: point.value for point in keeper.points if point.step == 5}
    norms = [last[f"weights/{name}/spectral_norm"] for name in ("encoder.0", "encoder.2", "head")]
    assert last["weights/all/spectral_norm"] == max(norms)
    squares = sum(p.detach().square().sum().item() for p in model.parameters() if p.ndim == 2)
    assert last["weights/all/norm"] == pytest.approx(math.sqrt(squares))
    ranks = [last[f"weights/{name}/stable_rank"] for name in ("encoder.0", "encoder.2", "head")]
    assert last["weights/all/stable_rank"] == pytest.approx(sum(ranks) / 3)
    assert "weights/head/norm" not in last


def test_every_measure_and_every_registered_curve():
    names = ["norm", "spectral_norm", "stable_rank", "svd_entropy", "outliers", "power_law"]
    keeper = PointKeeper()
    fit(Toy(), [monitor(measures=names), keeper], batches(2))
    drawn = {"/".join(p.key.split("/")[::2]) for p in keeper.points}
    assert drawn == {f"{curve.family or 'weights'}/{curve.name}" for curve in WeightSpectrumMonitor.declares}
    spectral = [m.name for m in MEASURES.values() if m.kind == "spectrum" and m.name != "unbiased_participation_ratio"]
    trainer = fit(Toy(), [monitor(measures=spectral)], batches(2))
    assert trainer.callback_metrics["weights/head/quartile_ratio"] >= 1


def test_nulls_are_those_of_random_matrices():
    keeper = PointKeeper()
    fit(Toy(), [monitor(measures=["svd_entropy", "outliers", "power_law", "spectral_norm"]), keeper], batches(2))
    nulls = {point.key: point.null for point in keeper.points}
    values = torch.linalg.svdvals(torch.randn(200, 32, 16, dtype=torch.float64))
    assert nulls["weights/encoder.0/svd_entropy"] == pytest.approx(svd_entropy(values).mean().item(), rel=0.01)
    assert nulls["weights/encoder.0/outlier_share"] == 0
    assert nulls["weights/encoder.0/power_law_alpha"] > 1
    assert math.isnan(nulls["weights/encoder.0/spectral_norm"])
    [*_, point] = keeper.curve("weights/encoder.0/outlier_share")
    assert point.value == 0  # two steps do not train


def test_raw_optimizers_that_lightning_does_not_see_are_flagged():
    class Raw(ManualToy):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers().optimizer
            optimizer.zero_grad()
            self.manual_backward(self.head(self.encoder(batch)).pow(2).mean())
            optimizer.step()

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="no optimizer step was announced") as caught:
        fit(Raw(), [monitor(), keeper])
    assert len([w for w in caught if "announced" in str(w.message)]) == 1
    assert {p.flag for p in keeper.points if p.key.startswith("updates")} == {Flag.NOT_CALLED}
    assert {p.flag for p in keeper.points if p.key.startswith("weights")} == {Flag.OK}


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_frozen_zero_and_bad_weights_are_flagged(number):
    class Odd(Toy):
        def __init__(self):
            super().__init__()
            self.zero, self.bad = nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.zeros_(self.zero.weight)
            nn.init.constant_(self.bad.weight, number)
            self.encoder.requires_grad_(False)

    keeper = PointKeeper()
    fit(Odd(), [monitor(measures=["svd_entropy", "outliers", "power_law"]), keeper], batches(2))
    flags = {point.key.rpartition("/")[0]: point.flag for point in keeper.points}
    assert flags["weights/zero"] == flags["updates/encoder.0"] == flags["updates/zero"] == Flag.CONSTANT
    assert flags["weights/bad"] == flags["updates/bad"] == Flag.NONFINITE
    assert flags["weights/all"] == Flag.CONSTANT  # the gravest
    assert flags["weights/encoder.0"] == flags["weights/head"] == flags["updates/head"] == Flag.OK
    assert all(math.isnan(p.value) for p in keeper.points if "/bad/" in p.key and not p.key.endswith("flag"))
    assert 0 < keeper.curve("weights/all/svd_entropy")[0].value < 1


def test_solver_that_gives_up_is_flagged(monkeypatch):
    def fails(gram):
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    keeper = PointKeeper()
    fit(Toy(), [monitor(), keeper], batches(2))
    assert {point.flag for point in keeper.points} == {Flag.SOLVER}
    assert math.isnan(keeper.curve(TOP)[0].value)


def test_layers_by_module_by_matrix_and_by_glob():
    def names(*layers):
        trainer = fit(Toy(), [monitor(layers=layers, updates=False)], batches(2))
        assert not any(key.startswith("updates") for key in trainer.callback_metrics)
        return {key.split("/")[1] for key in trainer.callback_metrics} - {"all"}

    assert names("encoder") == names("encoder.*") == names("encoder.0", "encoder.2") == {"encoder.0", "encoder.2"}
    assert names("head", "encoder.0") == {"encoder.0", "head"}
    with pytest.raises(MisconfigurationException, match=r"'nothing' matches no weight matrix of Toy\. It has: encoder"):
        fit(Toy(), [monitor(layers=["head", "nothing"])])


def test_wide_matrices_are_left_out_and_said(caplog):
    with caplog.at_level("INFO"):
        trainer = fit(Toy(), [monitor(max_dim=8)], batches(2))
    assert {key.split("/")[1] for key in trainer.callback_metrics} == {"encoder.2", "head", "all"}
    assert "leaves out encoder.0" in caplog.text


def test_many_matrices_are_thinned_out():
    class Deep(Toy):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 8), *[nn.Linear(8, 8) for _ in range(60)])

    trainer = fit(Deep(), [monitor()], batches(2))
    names = {key.split("/")[1] for key in trainer.callback_metrics} - {"all"}
    assert len(names) == 32
    assert {"encoder.0", "head"} <= names


def test_model_without_a_matrix():
    class Scale(Toy):
        def __init__(self):
            super().__init__()
            del self.encoder, self.head
            self.scale = nn.Parameter(torch.ones(16))

        def training_step(self, batch, batch_idx):
            return (batch * self.scale).pow(2).mean()

    assert fit(Scale(), [monitor()]).logger.rows == []


def test_default_cadence_follows_the_cost(caplog):
    keeper, cheap = PointKeeper(), PointKeeper()
    with caplog.at_level("INFO"):
        fit(Toy(), [WeightSpectrumMonitor(max_overhead=20.0), cheap], log_every_n_steps=2)
        fit(Toy(), [WeightSpectrumMonitor(max_overhead=0.5), keeper], batches(50), log_every_n_steps=2)
    assert "reads 3 matrices every 2 steps" in caplog.text
    assert [point.step for point in cheap.curve(TOP)] == [0, 1, 3, 5]
    steps = [point.step + 1 for point in keeper.curve(TOP)][1:]
    # 6 operations per weight and row of 32; 14.5 n^3 or so per spectrum, twice
    cost = 2 * sum(4.5 * o * i * min(o, i) + 10 * min(o, i) ** 3 for o, i in ((32, 16), (8, 32), (2, 8)))
    multiple = math.ceil(cost / (0.5 * 2 * 6 * 32 * (32 * 16 + 8 * 32 + 2 * 8)))
    assert multiple > 1
    assert steps == [2 * multiple * (i + 1) for i in range(50 // (2 * multiple))]


def test_fit_that_ends_before_the_first_point_says_so():
    with pytest.warns(UserWarning, match="the fit ended before the first point, due after .* Set `every_n_steps`"):
        fit(Toy(), [WeightSpectrumMonitor()])


def test_resumed_run_continues_its_cadence(tmp_path):
    loader = DataLoader(torch.randn(32, 16).repeat(40, 1), batch_size=32)

    def run(path=None):
        torch.manual_seed(0)
        keeper = PointKeeper()
        save = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)
        callbacks = [WeightSpectrumMonitor(max_overhead=0.3), keeper, save]
        options = {**QUIET, "max_epochs": 2, "enable_checkpointing": True, "logger": False, "log_every_n_steps": 3}
        Trainer(**{**options, "callbacks": callbacks}).fit(Toy(), loader, ckpt_path=path)
        return keeper.curve("updates/head/svd_entropy")

    whole = run()
    assert sum(point.step >= 40 for point in whole) >= 2
    torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    with pytest.warns(UserWarning, match="exists and is not empty"):
        rest = run(str(tmp_path / "epoch=0.ckpt"))
    assert [(p.step, p.value) for p in rest] == [(p.step, p.value) for p in whole if p.step >= 40]


def test_compiled_model_keeps_its_curves_and_is_not_compiled_again():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(callbacks):
        graphs.clear()
        torch.compiler.reset()
        torch.manual_seed(0)
        trainer = fit(torch.compile(Toy(), backend=backend), callbacks, batches(12), log_every_n_steps=1)
        return trainer, len(graphs)

    (_, plain), (trainer, watched) = run([]), run([monitor(), WeightSpectrumMonitor(["head"], max_overhead=1e9)])
    assert watched == plain
    assert len(trainer.logger.curve("updates/head/stable_rank")) == 12


def test_one_transfer_at_a_point_and_none_between(monkeypatch):
    waits, seen = [], []
    to_list, item = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append("tolist") or to_list(tensor))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: waits.append("item") or item(tensor))
    callback = monitor(every_n_steps=3)
    for hook in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        original = getattr(callback, hook)

        def counted(trainer, *args, original=original):
            waits.clear()
            original(trainer, *args)
            seen.extend((trainer.fit_loop.epoch_loop._batches_that_stepped, wait) for wait in waits)
            copied = callback._before is not None
            assert not copied or trainer.fit_loop.epoch_loop._batches_that_stepped in (0, 2, 5, 8)

        monkeypatch.setattr(callback, hook, counted)
    fit(Toy(), [callback], batches(9), logger=False)
    # the first point computes its nulls on the host
    assert [entry for entry in seen if entry[0] > 2] == [(5, "tolist"), (8, "tolist")]
    assert callback._before is None


def test_failing_measure_of_the_users_own_reads_nan():
    @register_measure
    def broken(singular_values):
        raise RuntimeError("oops")

    try:
        with pytest.warns(UserWarning, match="`broken` failed on weights and reads NaN: oops"):
            trainer = fit(Toy(), [monitor(measures=["broken", "stable_rank"])], batches(2))
        assert trainer.callback_metrics["weights/head/broken"].isnan()
        assert trainer.callback_metrics["weights/head/stable_rank"] >= 1
    finally:
        del MEASURES["broken"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "head"}, r"Write `layers=\['head'\]`"),
        ({"layers": []}, "`layers` is empty"),
        ({"measures": "rank"}, "`measures` takes a list of names, got 'rank'"),
        ({"measures": ["feature_std"]}, "Unknown measure of weights 'feature_std'. Choose from: alpha_req"),
        ({"max_overhead": 0}, "`max_overhead` .* must be positive, got 0"),
        ({"max_dim": 1}, "`max_dim` must be at least 2, got 1"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightSpectrumMonitor(**arguments)


def test_two_monitors_keep_apart():
    assert monitor(layers=["head"]).state_key != monitor(layers=["encoder"]).state_key
    trainer = fit(Toy(), [monitor(layers=["head"]), monitor(layers=["encoder"], every_n_steps=3)])
    assert [step for step, _ in trainer.logger.curve(TOP)] == [0, 1, 3, 5]
    assert [step for step, _ in trainer.logger.curve("weights/encoder.0/spectral_norm")] == [0, 2, 5]


@pytest.fixture
def median_size():
    @register_measure(kind="weights", range="0 to infinity", null=lambda rows, columns: float(rows))
    def median_size(weight):
        assert weight.shape != (4, 3), "of this shape it fails"
        return weight.abs().median()

    yield
    del MEASURES["median_size"]


def test_measures_of_weights_and_one_of_the_users_own(median_size):
    model, keeper = Toy(), PointKeeper()
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    with torch.no_grad():
        model.encoder[0].weight[:8] = 0
    ours = ["non_zero_share", "pq_index", "orthogonality_defect", "mergeable_share", "condition_number"]
    fit(model, [keeper, monitor(measures=[*ours, "median_size"], every_n_steps=1)], batches(1))
    last = {p.key: p for p in keeper.points if p.step == keeper.points[0].step}
    for name in ("encoder.0", "encoder.2", "head"):
        for measure in (*ours, "median_size"):
            assert math.isfinite(last[f"weights/{name}/{measure}"].value)
            if measure != "condition_number":
                assert f"updates/{name}/{measure}" not in last
    assert last["weights/encoder.0/non_zero_share"].value == 0.75
    assert last["weights/encoder.0/mergeable_share"].value >= 0.25
    assert last["weights/encoder.0/median_size"].null == 32
    assert last["weights/encoder.2/pq_index"].null == pytest.approx(0.1528, abs=1e-4)
    assert {"weights_per_unit", "pq_index"} <= {*monitor().curves, *monitor(measures=["pq_index"]).curves}
    assert "pq_index" not in monitor().curves


def test_a_measure_that_fails_reads_nan_and_training_goes_on(median_size):
    class Narrow(Toy):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(3, 4)

    with pytest.warns(UserWarning, match="`median_size` failed on weights and reads NaN: of this shape it fails"):
        trainer = fit(Narrow(), [monitor(measures=["median_size"], every_n_steps=1)], batches(1))
    assert math.isnan(trainer.callback_metrics["weights/extra/median_size"])
    assert math.isfinite(trainer.callback_metrics["weights/head/median_size"])


def test_measures_of_weights_are_counted_into_the_budget():
    plain, pairs = (["norm"], (64, 32)), (["norm", "mergeable_share"], (64, 32))
    assert reading_flops(*pairs, updates=True) - reading_flops(*plain, updates=True) == 4 * 64 * 64 * 32


class Pruned(Toy):
    """After some steps of training all but so many weights of a layer go, as many of the others as of all."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 6:
            weight = self.encoder[2].weight
            prune.l1_unstructured(self.encoder[2], "weight", amount=weight.numel() - self.kept)


@pytest.mark.parametrize("kept", [16, 7, 0])
def test_layer_collapse_is_a_layer_with_less_than_a_weight_per_unit(kept):
    model = Pruned(kept)
    units = model.encoder[2].out_features
    guard = CollapseGuard(rules=["layer_collapse"], action="log")
    fit(model, [monitor(), guard], batches(16))
    place, told = ("layer_collapse", "encoder.2"), lambda found: [(one.kind, one.layer) for one in found]
    assert told(guard.judge.verdicts) == ([place] if kept == 0 else [])
    assert told(guard.notices) == ([place] if 0 < kept < units else [])  # the loss has come to no harm


def test_layers_that_begin_empty_are_not_judged():
    model = Toy()
    for parameter in model.encoder[2].parameters():
        nn.init.zeros_(parameter)
        parameter.requires_grad_(False)
    guard = CollapseGuard(rules=["layer_collapse"], action="log")
    fit(model, [monitor(), guard], batches(16))
    assert not guard.judge.verdicts
