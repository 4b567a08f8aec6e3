"""Every public name shows how it is used, and what it shows runs: doctests by pytest, the blocks of callbacks here."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_collapse
from lightning_collapse import losses, penalties
from lightning_collapse.rules import RULES, Rule, register_rule
from lightning_collapse.utilities.registry import CURVES, MONITORS, Curve
from tests import attention
from tests.continual import Learner, task
from tests.integration.siamese import Siamese
from tests.toys import QUIET, batches

PACKAGES = ["", *(path.parent.name for path in Path(lightning_collapse.__file__).parent.glob("*/__init__.py"))]
MODULES = [importlib.import_module(f"lightning_collapse.{package}".rstrip(".")) for package in sorted(PACKAGES)]
PUBLIC = {
    f"{module.__name__}.{name}": found
    for module in MODULES
    for name in module.__all__
    if callable(found := getattr(module, name))
}
BLOCKS = {
    name: inspect.cleandoc(of.__doc__).partition("Example::\n")[2]
    for name, of in {id(of): (name, of) for name, of in PUBLIC.items()}.values()  # several packages have it
    if "Example::" in (of.__doc__ or "")
}


def has_example(of: Any) -> bool:
    return ">>>" in (of.__doc__ or "") or "Example::" in (of.__doc__ or "")


RETURNED = "\n".join(
    str(inspect.signature(inspect.unwrap(of)).return_annotation)
    for of in PUBLIC.values()
    if inspect.isfunction(of) and has_example(of)
)
"""What public functions that have an example return."""


def is_shown_by_a_function(of: Any) -> bool:
    """Whether it is a record, or one of a few values, that such a function returns: its example is that function's."""
    record = hasattr(of, "_fields") or hasattr(of, "__dataclass_fields__") or hasattr(of, "__members__")
    return record and re.search(rf"\b{of.__name__}\b", RETURNED) is not None


def test_all_packages_are_looked_at() -> None:
    assert len(MODULES) == 16
    assert len(PUBLIC) > 250


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name: str) -> None:
    assert has_example(PUBLIC[name]) or is_shown_by_a_function(PUBLIC[name])


class Base(lightning.pytorch.LightningModule):
    """What a block that derives a module of its own leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Priced(Base):
    """A regression whose batches name their target."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch["rooms"]), batch["price"])


class Scored(Learner):
    """One that logs a perplexity in validation."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/perplexity", nn.functional.cross_entropy(self(batch[0]), batch[1]).exp())


class FiveTasks(lightning.pytorch.LightningDataModule):
    task_index = 0

    def train_dataloader(self) -> Any:
        return loader(self.task_index)


def loader(seed: int = 0) -> Any:
    return DataLoader(task(seed), batch_size=16)


def prices() -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = [{"rooms": torch.randn(6, generator=generator), "price": torch.randn(2, generator=generator)}] * 64
    return DataLoader(rows, batch_size=32)


def setting(block: str) -> tuple[Any, Any]:
    """A module that the callbacks of a block fit, and its data."""
    if "VICReg" in block:
        return Siamese(), batches()
    if "Attention" in block or "GeometryPhase" in block:
        return attention.GPT(), attention.tokens()
    if "price" in block:
        return Priced(), prices()
    return Scored(), loader()


@pytest.mark.filterwarnings("ignore:`.*Monitor`")  # of fits this short, and of rows this few
@pytest.mark.filterwarnings("ignore:`EWC|`KFACEWC|`WeightPenalty")  # of weights that are meant for other losses
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name.endswith(".report"):
        watched = {"callbacks": [lightning_collapse.CollapseMonitor(every_n_steps=1)], "logger": TensorBoardLogger(".")}
        lightning.pytorch.Trainer(**{**QUIET, **watched}).fit(Learner(), loader())
    model, data = setting(BLOCKS[name])
    made: list[lightning.pytorch.Trainer] = []

    def trainer(**given: Any) -> lightning.pytorch.Trainer:
        quiet = {**QUIET, "limit_val_batches": 1, "log_every_n_steps": 1, "logger": False, "num_sanity_val_steps": 0}
        made.append(lightning.pytorch.Trainer(**{**quiet, **given}))
        return made[-1]

    given: dict[str, Any] = {
        **{name.rpartition(".")[2]: of for name, of in PUBLIC.items()},
        **{name: getattr(losses, name) for name in losses.__all__},
        **{name: getattr(penalties, name) for name in penalties.__all__},
        "Trainer": trainer,
        "LightningModule": Base,
        "nn": nn,
        "torch": torch,
        "Rule": Rule,
        "Curve": Curve,
        "register_rule": register_rule,
        "model": model,
        "tasks": [loader(0), loader(1)],
        "train_loaders": [loader(0), loader(1)],
        "test_loaders": [loader(0), loader(1)],
        "five_tasks": FiveTasks(),
        "test_loader_of_task_0": loader(0),
        "test_loader_of_task_1": loader(1),
        "metrics": lightning_collapse.ContinualMetrics([loader(seed) for seed in range(5)]),
    }
    before = set(given)
    known = [(table, dict(table)) for table in (RULES, CURVES, MONITORS)]
    try:
        exec(inspect.cleandoc(BLOCKS[name]), given)
        for of in [given[new] for new in given if new not in before and inspect.isclass(given[new])]:
            if issubclass(of, Base):
                views = DataLoader(TensorDataset(torch.randn(64, 16), torch.randn(64, 16)), batch_size=32)
                trainer().fit(of(), views if "view in batch" in BLOCKS[name] else loader())
        for one in made:
            if one.state.fn is None:
                one.fit(model, data, data if isinstance(model, Scored) else None)
        assert all(one.state.finished for one in made)
        assert made or Path("collapse.html").exists()
    finally:
        for table, entries in known:
            table.clear()
            table.update(entries)
