"""LightningCLI: configurations load, save and load again, layers need no quotes, and help is written for a terminal."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import (
    CollapseGuard,
    Regularizer,
    Rollback,
    SkipStep,
    SwitchOn,
    callbacks,
    layers,
    losses,
    penalties,
)
from lightning_collapse.losses import AntiCollapseLoss, LinearRamp, LinearWarmup, VarianceLoss
from lightning_collapse.penalties import Penalty
from lightning_collapse.rules import MODES, RULES, TASKS

jsonargparse = pytest.importorskip("jsonargparse")
from lightning.pytorch.cli import LightningCLI  # noqa: E402  # it needs jsonargparse

SHOWN = [
    kind
    for package in (callbacks, layers, losses, penalties)
    for name in package.__all__
    if inspect.isclass(kind := getattr(package, name)) and issubclass(kind, Callback | nn.Module | Penalty)
    if not inspect.isabstract(kind) and kind is not AntiCollapseLoss and not issubclass(kind, layers.ConvertedModule)
]
SHOWN += [Rollback, SkipStep, SwitchOn, LinearRamp, LinearWarmup]
CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 2
  log_every_n_steps: 1
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  logger: {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {folder}}}}}
  callbacks:
    - class_path: lightning_collapse.CollapseMonitor
    - class_path: lightning_collapse.Regularizer
      init_args:
        loss: lightning_collapse.losses.VCReg
        layer: layer
    - class_path: lightning_collapse.CollapseGuard
      init_args: {guard}
"""
GUARDS = {
    "default": "{}",
    "name": "{action: warn}",
    "objects": """
        action:
          - log
          - {class_path: lightning_collapse.Rollback, init_args: {factor: 0.3}}
          - {class_path: lightning_collapse.SwitchOn, init_args: {name: vcreg, ramp: 7}}
        task: regression""",
}


class Batches(BoringModel):
    def train_dataloader(self) -> Any:
        return DataLoader(RandomDataset(32, 64), batch_size=8)


def run(config: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, CollapseGuard]:
    """The configuration that a run from ``config`` saves, and its guard."""
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--config", str(config)])
    cli = LightningCLI(Batches, seed_everything_default=1, save_config_kwargs={"overwrite": True})
    assert "regularizer/vcreg/value" in cli.trainer.callback_metrics
    [guard] = [callback for callback in cli.trainer.callbacks if isinstance(callback, CollapseGuard)]
    return Path(cli.trainer.log_dir) / "config.yaml", guard


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what LightningCLI calls in jsonargparse
@pytest.mark.parametrize("guard", GUARDS)
def test_what_a_run_saves_loads_again(guard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "given.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, guard=GUARDS[guard]))
    saved, first = run(config, monkeypatch)
    text = saved.read_text()
    again, second = run(saved, monkeypatch)
    assert again.read_text() == text
    for made in (first, second):
        assert isinstance(made.action, str) == (guard == "name")
        if guard == "objects":
            log, rollback, switch = made.action
            assert (log, rollback.factor, switch.name, switch.ramp) == ("log", 0.3, "vcreg", 7)
            assert isinstance(rollback, Rollback)
            assert isinstance(switch, SwitchOn)
        if guard == "default":
            assert [*made.action] == ["warn", "log"]


def test_older_name_of_a_layer() -> None:
    assert Regularizer(VarianceLoss(), "encoder").layer == Regularizer(VarianceLoss(), on="encoder").layer == "encoder"
    assert Regularizer(VarianceLoss(), layer="encoder").on == "encoder"
    with pytest.raises(ValueError, match=r"older name of `layer`, and both are given: 'a' and 'b'. Drop `on`"):
        Regularizer(VarianceLoss(), "a", on="b")
    with pytest.raises(ValueError, match=r"`layer` must be the name of a layer, got None"):
        Regularizer(VarianceLoss())


def help_of(kind: type) -> str:
    parser = jsonargparse.ArgumentParser(prog="train.py")
    parser.add_class_arguments(kind, "it", fail_untyped=False)
    return " ".join(parser.format_help().split())


@pytest.mark.parametrize("kind", SHOWN, ids=lambda kind: kind.__name__)
def test_help_is_written_for_a_terminal(kind: type) -> None:
    text = help_of(kind)
    assert not re.search(r":\w+:`|\.\. \w+::|\\[a-z]+\b", text)
    for argument in inspect.signature(kind).parameters:
        assert f"--it.{argument}" in text


def test_help_of_the_guard_lists_values() -> None:
    text = help_of(CollapseGuard).replace("- ", "-")  # where it breaks lines
    for value in ("warn", "log", "checkpoint", "stop", *RULES, *TASKS, *MODES):
        assert value in text, value
