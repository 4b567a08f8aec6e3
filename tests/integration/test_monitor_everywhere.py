"""``CollapseMonitor`` and ``CollapseGuard`` in every kind of fit: they change nothing and always draw."""

import csv
import io
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos import Transformer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, CollapseMonitor, GeometryPhaseMonitor, SpectralAlignmentMonitor
from tests.toys import ManualToy, MemoryLogger, PointKeeper, Toy, batches, fit, weights

ENCODER = "collapse/encoder/effective_rank"
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"]


def watch(**kwargs):
    return [CollapseMonitor(**{"every_n_steps": 2, **kwargs}), CollapseGuard(action="log")]


def fitted(model_class, callbacks, loader=None, **kwargs):
    torch.manual_seed(0)
    model = model_class()
    trainer = fit(model, callbacks, loader, **kwargs)
    return model, trainer


@pytest.mark.parametrize("toy", [Toy, ManualToy])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_and_random_state_are_the_same_without_us(toy, precision, accumulate):
    if toy is ManualToy and accumulate == 2:
        pytest.skip("Lightning refuses to accumulate for a module that optimizes by hand")
    options = {"precision": precision, "accumulate_grad_batches": accumulate}
    watched, trainer = fitted(toy, watch(), **options)
    after_watched = torch.random.get_rng_state()
    plain, _ = fitted(toy, [], **options)
    assert torch.equal(after_watched, torch.random.get_rng_state())
    for name, value in weights(plain).items():
        assert torch.equal(value, weights(watched)[name]), name
    curve = trainer.logger.curve("collapse/encoder.2/effective_rank")
    assert [step for step, _ in curve] == ([0, 1, 3, 5] if accumulate == 1 else [0, 1])
    assert all(1 <= value <= 8 for _, value in curve)


def test_gradient_scaler():
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    watched, trainer = fitted(Toy, watch(), plugins=[plugin])
    plain, _ = fitted(Toy, [], plugins=[MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))])
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    assert len(trainer.logger.curve("collapse/encoder.2/effective_rank")) == 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_value_is_that_of_the_same_features_in_double_precision(precision):
    """Rank-one features must read rank one, where a Gram matrix in half precision reads dozens."""

    class RankOne(Toy):
        def training_step(self, batch, batch_idx):
            line = torch.linspace(-1, 1, 32, device=batch.device, dtype=batch.dtype).unsqueeze(1)
            features = self.encoder(line * torch.ones_like(batch))
            return self.head(features).pow(2).mean()

        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(16, 64, bias=False))
            self.head = nn.Linear(64, 2)

    _, trainer = fitted(RankOne, watch(layers=["encoder"], rows=32), precision=precision)
    rank = trainer.logger.curve(ENCODER)[0][1]
    eigenvalue_rank = trainer.logger.curve("collapse/encoder/eigenvalue_effective_rank")[0][1]
    assert eigenvalue_rank == pytest.approx(1, abs=1e-3)
    # what is left is the rounding of the features themselves to eight bits
    assert rank < (1.5 if "bf16" in precision else 1.1)


def test_two_optimizers():
    class Two(ManualToy):
        def training_step(self, batch, batch_idx):
            loss = self.head(self.encoder(batch)).pow(2).mean()
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.encoder, self.head)]

    _, trainer = fitted(Two, watch())
    assert [step for step, _ in trainer.logger.curve("collapse/encoder.2/effective_rank")] == [0, 1, 3, 5]


def test_no_logger_keeps_callback_metrics():
    _, trainer = fitted(Toy, watch(layers=["encoder"]), logger=False)
    assert 1 < trainer.callback_metrics[ENCODER] <= 8


def test_several_loggers_and_their_files(tmp_path):
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv"), MemoryLogger()]
    fitted(Toy, watch(layers=["encoder"]), logger=loggers)
    events = EventAccumulator(loggers[0].log_dir).Reload()
    assert [event.step for event in events.Scalars(ENCODER)] == [0, 1, 3, 5]
    assert "collapse/encoder/log10_std" in events.Tags()["histograms"]
    assert "collapse/effective_rank" in events.Tags()["images"]
    assert "legend/curves/text_summary" in events.Tags()["tensors"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert "guard/complete_collapse" in events.Tags()["scalars"]
    rows = list(csv.DictReader(io.StringIO((Path(loggers[1].log_dir) / "metrics.csv").read_text())))
    assert [int(row["step"]) for row in rows if row[ENCODER]] == [0, 1, 3, 5]


def test_hostile_layer_names_stay_inside_the_log_folder(tmp_path):
    class Hostile(Toy):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential()
            for name, layer in (("../../up", nn.Linear(16, 8)), ("a b/<c>", nn.Linear(8, 8)), ("é", nn.Linear(8, 8))):
                self.encoder._modules[name] = layer  # `add_module` refuses dots, loaders of foreign models may not

    log = tmp_path / "inside" / "deeper"
    loggers = [TensorBoardLogger(log), CSVLogger(log)]
    _, trainer = fitted(Hostile, watch(), logger=loggers)
    keys = {key for key in trainer.callback_metrics if key.endswith("/effective_rank")}
    assert len(keys) == 5
    assert all(key.count("/") == 2 and ".." not in key and " " not in key for key in keys)
    assert {path.name for path in tmp_path.iterdir()} == {"inside"}
    assert {path.name for path in (tmp_path / "inside").iterdir()} == {"deeper"}


@pytest.mark.filterwarnings("ignore:.*fast_dev_run")
def test_fast_dev_run():
    fitted(Toy, watch(every_n_steps=1), fast_dev_run=True, logger=True, limit_val_batches=None)


def test_boring_model():
    _, trainer = fitted(BoringModel, [CollapseMonitor(every_n_steps=1)], batches(width=32))
    assert {key for key in trainer.callback_metrics if key.endswith("effective_rank")} == {
        f"collapse/{layer}/{measure}"
        for layer in ("layer", "layer.input")
        for measure in ("effective_rank", "eigenvalue_effective_rank")
    }


def test_transformer_of_lightning_itself():
    class Language(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Transformer(vocab_size=50, ninp=32, nhead=2, nhid=32, nlayers=2)

        def training_step(self, batch, batch_idx):
            output = self.model(batch[:, :-1], batch[:, 1:])
            return nn.functional.nll_loss(output.reshape(-1, 50), batch[:, 1:].reshape(-1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    loader = DataLoader(torch.randint(50, (64, 17)), batch_size=16)
    _, trainer = fitted(Language, watch(max_overhead=1e9), loader)
    layers = {key.split("/")[1] for key in trainer.callback_metrics if key.startswith("collapse/")}
    blocks = {f"model.transformer.{part}.layers.{i}" for part in ("encoder", "decoder") for i in (0, 1)}
    assert layers == blocks | {"model.decoder", "model.decoder.input"}
    assert trainer.callback_metrics["collapse/model.decoder.input/n"] == 128  # four per feature, of 512 tokens


def test_model_built_in_configure_model():
    class Lazy(Toy):
        def __init__(self):
            LightningModule.__init__(self)
            self.fail_at = None

        def configure_model(self):
            if not hasattr(self, "encoder"):
                self.encoder, self.head = nn.Sequential(nn.Linear(16, 8)), nn.Linear(8, 2)

    _, trainer = fitted(Lazy, watch(layers=["encoder"]))
    assert len(trainer.logger.curve(ENCODER)) == 4


@pytest.mark.filterwarnings("ignore:.*swa_lrs")
def test_stochastic_weight_averaging_beside_it():
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    watched, trainer = fitted(Toy, [*watch(layers=["encoder"]), averaging], max_epochs=3)
    plain, _ = fitted(Toy, [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)], max_epochs=3)
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    assert len(trainer.logger.curve(ENCODER)) == 10


@pytest.mark.parametrize("place", ["inside", "whole"])
@pytest.mark.parametrize("calls", [1, 2])
def test_compiled_model(place, calls):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Compiled(Toy):
        def __init__(self):
            super().__init__()
            if place == "inside":
                self.encoder = torch.compile(self.encoder, backend=backend)

        def training_step(self, batch, batch_idx):
            return sum(self.head(self.encoder(batch)).pow(2).mean() for _ in range(calls))

    def run(callbacks):
        graphs.clear()
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Compiled()
        trainer = fit(torch.compile(model, backend=backend) if place == "whole" else model, callbacks, batches(30))
        return model, trainer

    plain, _ = run([])
    watched, trainer = run(watch(layers=["encoder*"], every_n_steps=5, rows=48))
    assert len(graphs) == 1
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())
    assert [n for _, n in trainer.logger.curve("collapse/encoder.2/n")] == [min(32 * calls, 48)] + [48] * 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what LightningCLI calls in jsonargparse
def test_command_line_and_yaml(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 4
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger: false
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: lightning_collapse.CollapseMonitor
      init_args: {{layers: [layer], measures: [stable_rank, rankme], every_n_steps: 2}}
"""
    )
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(config)])
    cli = LightningCLI(BoringModel, save_config_callback=None, seed_everything_default=1)
    assert "collapse/layer/rankme" in cli.trainer.callback_metrics


class HostTransfers(TorchDispatchMode):
    """Counts what waits for a device when the tensors are on one."""

    WAITS = ("_local_scalar_dense", "nonzero", "_linalg_eigh", "_linalg_svd", "unique", "masked_select")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.WAITS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_no_step_without_a_point_waits_for_the_device(monkeypatch):
    transfers = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor.shape) or to_list(tensor))
    callback, seen = CollapseMonitor(layers=["encoder", "head"], every_n_steps=4, rows=96), {}
    for hook in ("on_train_batch_start", "on_train_batch_end"):
        original = getattr(callback, hook)

        def counted(trainer, *args, original=original):
            with HostTransfers() as mode:
                transfers.clear()
                original(trainer, *args)
            entry = seen.setdefault(trainer.fit_loop.epoch_loop._batches_that_stepped, ([], []))
            entry[0].extend(mode.seen)
            entry[1].extend(transfers)

        monkeypatch.setattr(callback, hook, counted)
    forward = nn.Module._call_impl
    waits = []

    def watched(module, *args, **kwargs):
        with HostTransfers() as mode:
            output = forward(module, *args, **kwargs)
        waits.extend(mode.seen)
        return output

    monkeypatch.setattr(nn.Linear, "__call__", watched)
    fitted(Toy, [callback], batches(12), logger=False)
    assert waits == []  # the hooks themselves, with rows to keep or without
    for step, (ops, reads) in seen.items():
        if step in (0, 3):
            continue  # once: the first batch decides on the rows, the first point computes its nulls on the host
        if step % 4 == 3:
            assert set(ops) == {"_linalg_eigh"}
            assert len(ops) <= 2
            assert len(reads) == 1
        else:
            assert (ops, reads) == ([], [])


def test_memory_does_not_grow_and_no_graph_is_kept():
    import gc

    def alive():
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return len(tensors), sum(t.grad_fn is not None for t in tensors)

    counts = []

    class Count(PointKeeper):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step in (60, 120, 180):
                self.points.clear()
                counts.append(alive())

    fitted(Toy, [CollapseMonitor(every_n_steps=3, layers=["encoder"]), Count()], batches(180), logger=False)
    assert counts[2][0] <= counts[1][0]
    assert counts[2][1] <= counts[1][1]


class Jacobians(Toy):
    """Runs its layers inside function transforms too, as physics-informed networks do."""

    def training_step(self, batch, batch_idx):
        jacobians = torch.func.vmap(torch.func.jacrev(self.encoder))(batch)
        return jacobians.pow(2).mean() + super().training_step(batch, batch_idx)


def test_calls_inside_function_transforms_are_not_listened_to():
    monitors = [kind(every_n_steps=2) for kind in (CollapseMonitor, SpectralAlignmentMonitor, GeometryPhaseMonitor)]
    trainer = fit(Jacobians(), monitors)
    plain = fit(Toy(), [CollapseMonitor(every_n_steps=2)])
    assert trainer.callback_metrics["collapse/head/n"] == plain.callback_metrics["collapse/head/n"]
    assert trainer.callback_metrics["spectral_alignment/encoder.0/flag"] == 0
