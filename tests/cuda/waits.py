"""Host synchronization: whoever waits for the device between points of a monitor, in a loss or in a penalty.

On a GPU it is torch's own ``set_sync_debug_mode("error")``; elsewhere a dispatch mode that records what would wait
there, so that the same code runs everywhere.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_collapse import callbacks
from lightning_collapse.utilities.registry import LOSSES, PENALTIES
from tests.losses.cases import CASES as LOSS_CASES
from tests.monitors import MONITORS, make
from tests.penalties.cases import CASES as PENALTY_CASES
from tests.penalties.toys import Classifier
from tests.toys import QUIET

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh")
DECOMPOSITIONS = ("_linalg_eigh", "_linalg_svd", "linalg_eig", "_linalg_solve_ex", "linalg_qr", "linalg_lstsq", "geqrf")
EVERY = 4


@dataclass
class Found:
    """What waited inside a piece of code, and which decompositions ran, which on a GPU wait by themselves."""

    waits: list[str] = field(default_factory=list)
    decompositions: set[str] = field(default_factory=set)


class Waiting(TorchDispatchMode):
    """Records what reads a tensor on the host."""

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        boolean = name == "aten::index.Tensor" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITS or boolean:
            self.found.waits.append(name)
        if name.removeprefix("aten::") in DECOMPOSITIONS:
            self.found.decompositions.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(device: str) -> Iterator[Found]:
    """Fills a record with what waits inside; on a GPU the first wait raises there, and is recorded too."""
    found = Found()
    try:
        with no_wait() if device == "cuda" else nullcontext(), Waiting(found):
            yield found
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        found.waits.append(str(error))


@contextmanager
def no_wait() -> Iterator[None]:
    """Whoever waits for a GPU inside raises; that this is a prototype, which torch says once, is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Between(Callback):
    """Watches the batches that do not end in a point; it stands first among the callbacks, and :attr:`last` last."""

    def __init__(self, device: str) -> None:
        self.device, self.found = device, Found()
        self.last = _Last(self)
        self._inside: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > EVERY and (batch_idx + 1) % EVERY:  # what a first batch and a first point find out once is over
            self._inside = watched(self.device)
            self._batch = self._inside.__enter__()

    def leave(self, error: BaseException | None = None) -> None:
        """The batch has ended, or failed."""
        if self._inside is not None:
            inside, self._inside = self._inside, None
            inside.__exit__(type(error) if error else None, error, None)
            self.found.waits += self._batch.waits
            self.found.decompositions |= self._batch.decompositions

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.leave(exception)


class _Last(Callback):
    def __init__(self, first: Between) -> None:
        self.first = first

    def on_train_batch_end(self, *args: Any) -> None:
        self.first.leave()


class Small(LightningModule):
    """A classifier with attention, so that every monitor has something to watch."""

    def __init__(self, outputs: int = 4, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.embed = nn.Linear(4, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.act, self.head = nn.ReLU(), nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.block(self.embed(x)).mean(dim=1)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        if out.shape[1] == 1:
            return nn.functional.mse_loss(out, y.unsqueeze(1).float())
        return nn.functional.cross_entropy(out, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, fused=self.fused)


def monitors(device: str) -> Iterator[tuple[str, Found]]:
    """Every monitor beside a guard, and what waits in it between points; first of all a fit without any."""
    yield "no monitor", between_points(device)
    for name in MONITORS:
        watchers = [make(name), *([] if name == "CollapseMonitor" else [callbacks.CollapseMonitor()])]
        outputs = 1 if "Regression" in name else 4
        yield name, between_points(device, *watchers, callbacks.CollapseGuard("log"), outputs=outputs)
    yield "SkipStep of a fused optimizer", skipping(device, fused=True)


def skipping(device: str, fused: bool) -> Found:
    """What waits where steps may be skipped."""
    guard = callbacks.CollapseGuard(callbacks.SkipStep())
    return between_points(device, callbacks.StabilityMonitor(), guard, fused=fused)


def between_points(device: str, *added: Callback, outputs: int = 4, fused: bool = False) -> Found:
    """What waits in a fit, in the batches that do not end in a point."""
    torch.manual_seed(0)
    data = [(torch.randn(32, 5, 4), torch.arange(32) % 4) for _ in range(3 * EVERY)]
    between = Between(device)
    options = {**QUIET, "accelerator": "gpu" if device == "cuda" else "cpu", "devices": 1, "log_every_n_steps": EVERY}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = Trainer(**options, logger=False, callbacks=[between, *added, between.last])
        try:
            trainer.fit(Small(outputs, fused), DataLoader(data, batch_size=None))
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
    # what is contained in a hook does not end the fit, but is said
    between.found.waits += [str(each.message) for each in said if "synchronizing" in str(each.message)]
    return between.found


def losses(device: str) -> Iterator[tuple[str, Found]]:
    """Every loss, forward and backward, on features that fit it."""
    for name in sorted(LOSSES):
        case, loss = LOSS_CASES[name], LOSSES[name](**LOSS_CASES[name].arguments).to(device)
        views = case.active(next(iter(case.shapes.values())), loss.views)
        leaves = [view.float().to(device).requires_grad_() for view in views]
        loss(*leaves).backward()  # what is made once, such as the handle of a library, is made here
        with watched(device) as found:
            loss(*leaves).backward()
        yield name, found


def penalties(device: str) -> Iterator[tuple[str, Found]]:
    """Every penalty, in a step of a second task."""
    for name in sorted(PENALTIES):
        torch.manual_seed(0)
        case, model = PENALTY_CASES[name], Classifier().to(device)
        penalty = PENALTIES[name](case.weight, **(case.arguments if case.toy is None else case.toy))
        x, y = torch.randn(32, 6, device=device), torch.arange(32, device=device) % 3
        for _ in "12":
            penalty.start(dict(model.named_parameters()))
            _step(model, penalty, x, y)
            penalty.consolidate(model, [(x, y)])
        penalty.start(dict(model.named_parameters()))
        _step(model, penalty, x, y)
        with watched(device) as found:
            _step(model, penalty, x, y)
        yield name, found


def _step(model: Classifier, penalty: Any, x: Tensor, y: Tensor) -> None:
    parameters = dict(model.named_parameters())
    model.zero_grad()
    model.training_step((x, y), 0).backward()
    penalty.observe(parameters)
    penalty.add_gradients(parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter -= 0.01 * parameter.grad
    penalty.after_step(parameters)
