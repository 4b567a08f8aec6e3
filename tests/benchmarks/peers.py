"""What the nearest peers read, and what they cost, where this library reads and costs something: identical inputs.

The truth is computed here in ``float64`` from the published formulas. Times are processor time of one thread, the
sides in turn in one process. Each table is one theme; run some of them by name.

Run: ``make peers``, or in its environment ``python -m tests.benchmarks.peers [THEME ...]``.
"""

import importlib
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

try:
    importlib.import_module("torchvision")
except ModuleNotFoundError:  # not the peers' environment
    pass
except RuntimeError:  # its binaries do not load beside a CPU build of torch: declare what it asks for; nothing calls it
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_collapse import CollapseMonitor
from lightning_collapse.functional import effective_rank, feature_std, rankme, relative_spread
from lightning_collapse.losses import VICReg
from lightning_collapse.spectral import singular_values

BLOCK = 50  # the trainer's default `log_every_n_steps`, and so the monitor's default cadence
SEED = 0


def peer(module: str) -> Any:
    """A module of a peer, with its log lines off."""
    os.environ["LOGURU_LEVEL"] = "ERROR"
    return importlib.import_module(module)


SIDES = ("lightly", "stable-pretraining", "ours")


def vicreg(side: str) -> Callable[..., Tensor]:
    """The loss of one side; all are the released form of VICReg with (25, 25, 1)."""
    if side == "ours":
        return VICReg()
    package, _, gather = side.partition(", ")
    module = peer(f"{package.replace('-', '_')}.loss" + ("es" if package == "stable-pretraining" else ""))
    loss: Callable[..., Tensor] = module.VICRegLoss(gather_distributed=True) if gather else module.VICRegLoss()
    return loss


def true_vicreg(first: Tensor, second: Tensor) -> Tensor:
    """The released form as its authors wrote it, in ``float64``."""
    views = [view.double() for view in (first, second)]
    loss = 25 * (views[0] - views[1]).square().mean()
    for view in views:
        covariance = view.T.cov()
        hinge = torch.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
        off = covariance - covariance.diagonal().diag()
        loss = loss + 12.5 * hinge + off.square().sum() / view.shape[1]
    return loss


def true_rank(features: Tensor, center: bool, eps: float = 0.0) -> float:
    """Exponential of the entropy of the finite rows' singular values; with ``eps``, RankMe as its paper has it."""
    rows = features.double()[features.isfinite().all(dim=1)]
    values = torch.linalg.svdvals(rows - rows.mean(dim=0) if center else rows)
    p = values / values.sum() + eps
    return float(torch.special.entr(p).sum().exp()) if values.sum() > 0 else math.nan


def said(value: Callable[[], Any]) -> str:
    """A number, or the exception that came in its place."""
    try:
        return f"{float(value()):.3f}"
    except Exception as failure:
        return f"`{type(failure).__name__}`"


def known(truth: float) -> str:
    """A true value, where there is one."""
    return "undefined" if math.isnan(truth) else f"{truth:.3f}"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def seeing() -> None:
    """Which collapses the measures tell from health: 1024 rows of 128 features."""
    torch.manual_seed(SEED)
    n, d = 1024, 128
    direction = torch.randn(d)
    data = {
        "healthy, N(0, 1)": torch.randn(n, d),
        "rank 4": torch.randn(n, 4) @ torch.randn(4, d),
        "rank 1: one direction, random sign": torch.randn(n, 1).sign() * direction,
        "all rows equal but for 0.001": direction + 0.001 * torch.randn(n, d),
        "constant": direction.expand(n, d).clone(),
    }
    spread = peer("lightly.utils.debug").std_of_l2_normalized
    rows = []
    for name, x in data.items():
        readings = (spread(x) * d**0.5, effective_rank(singular_values(x)), feature_std(x), relative_spread(x))
        rows.append([name, known(true_rank(x, center=True)), *(f"{reading:.3f}" for reading in readings)])
    columns = ["data", "true effective rank", "lightly `std_of_l2_normalized` x sqrt(d)"]
    columns += ["our `effective_rank`", "our `feature_std`", "our `relative_spread`"]
    table("Seeing collapse", columns, rows)


def their_rankme(features: Tensor) -> float:
    """What stable-pretraining's callback logs when its queue holds these rows."""
    logged: dict[str, float] = {}
    callback = peer("stable_pretraining.callbacks.rankme").RankMe("rankme", "key", *features.shape, verbose=False)
    callback._target_queue = SimpleNamespace(data=features)
    module = SimpleNamespace(log=logged.__setitem__)
    callback.on_validation_batch_end(SimpleNamespace(global_rank=0), module, {}, {}, 0)
    return logged["rankme"]


def our_rankme(features: Tensor) -> Tensor:
    """The function, which the monitor calls as well."""
    return rankme(singular_values(features, center=False))


def rankmes() -> None:
    """RankMe of known matrices; the last rows by both callbacks in fits whose layer returns the isotropic rows."""
    torch.manual_seed(SEED)
    n, d = 2048, 384
    isotropic = torch.linalg.qr(torch.randn(n, d)).Q * n**0.5
    with_nan = isotropic.clone()
    with_nan[7] = torch.nan
    data = {
        "isotropic": isotropic,
        "rank 1": torch.randn(n, 1) * torch.randn(d),
        "all zeros": torch.zeros(n, d),
        "isotropic, NaN in one row": with_nan,
        "isotropic, `bfloat16`": isotropic.bfloat16(),
    }
    rows = []
    for name, x in data.items():
        both: list[Callable[[], Any]] = [partial(their_rankme, x), partial(our_rankme, x)]
        rows.append([name, known(true_rank(x, center=False, eps=1e-7)), *map(said, both)])
    for precision in ("bf16-mixed", "bf16-true"):
        fits = [partial(rankme_of_fit, side, isotropic, precision) for side in SIDES[1:]]
        truth = known(true_rank(isotropic.bfloat16(), center=False, eps=1e-7))
        rows.append([f"isotropic, fit with `{precision}`", truth, *map(said, fits)])
    table("RankMe, 2048 x 384", ["features", "paper, float64", "stable-pretraining", "ours"], rows)


class Encoder(LightningModule):
    """Hands its features out in the dictionary that stable-pretraining reads, and has the place for its queues."""

    def __init__(self, encoder: nn.Module, width: int, lr: float) -> None:
        super().__init__()
        self.callbacks_modules = nn.ModuleDict()
        self.encoder, self.head, self.lr = encoder, nn.Linear(width, 10), lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        features = self.encoder(batch[0])
        loss = nn.functional.cross_entropy(self.head(features), batch[1])
        return {"loss": loss, "long": features.detach(), "short": features.detach()}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(
    module: LightningModule, batch: Any, callbacks: list[Callback], steps: int, every: int, **kwargs: Any
) -> Trainer:
    """A fit with a validation every so many steps, and these callbacks only."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.callbacks = callbacks  # without what stable-pretraining's entry point adds to every trainer
    loader: DataLoader[Any] = DataLoader([batch] * (steps + 1), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)
    return trainer


def rankme_of_fit(side: str, rows: Tensor, precision: Any) -> Tensor:
    """RankMe of a layer that returns the rows of the batch as they are, as the callback of one side logs it."""
    n, d = rows.shape
    identity = nn.Linear(d, d, bias=False)
    nn.init.eye_(identity.weight)
    if side == "ours":
        key, callback = "collapse/encoder/rankme", CollapseMonitor(["encoder"], ["rankme"], every_n_steps=1, rows=n)
    else:
        key, callback = "rankme", peer("stable_pretraining.callbacks.rankme").RankMe("rankme", "short", n, d, False)
    batch = rows, torch.zeros(n, dtype=torch.long)
    trainer = fit(Encoder(identity, d, lr=0.0), batch, [callback], 1, 1, precision=precision, logger=False)
    return trainer.callback_metrics[key]


def autocast() -> None:
    """VICReg under autocast: 1024 rows of 128 features that a layer returned in half precision."""
    torch.manual_seed(SEED)
    rows = []
    for std in (1, 16):
        first = std * torch.randn(1024, 128)
        second = first + 0.1 * std * torch.randn(1024, 128)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            views = [view.to(dtype) for view in (first, second)]
            value, truth = value_and_gradient(true_vicreg, [view.double() for view in views])
            cells = []
            for side in SIDES:
                found, gradient = value_and_gradient(vicreg(side), views)
                cells.append(f"{found:.6g}, {error(gradient, truth):.0e}")
            rows.append([f"{std}", str(dtype).removeprefix("torch."), f"{value:.6g}", *cells])
    columns = ["std", "autocast", "float64 of the same rows", *SIDES]
    table("VICReg, value and relative error of its gradient", columns, rows)


def value_and_gradient(loss: Callable[..., Tensor], views: Sequence[Tensor]) -> tuple[float, Tensor]:
    """Of the first view; under autocast if it is in half precision."""
    leaf = views[0].clone().requires_grad_()
    half = leaf.dtype.itemsize == 2
    with torch.autocast("cpu", dtype=leaf.dtype if half else torch.bfloat16, enabled=half):
        value = loss(leaf, views[1])
    value.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad


def error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.double() - truth).norm() / truth.norm())


class Clock(Callback):
    """Adds up, between two validations, the processor time of what it watches. Must be the trainer's last callback.

    Args:
        layers: The layer whose forward hooks are watched too, for a name.
    """

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.blocks: list[defaultdict[str, float]] = [defaultdict(float)]
        self._started = 0.0

    def watch(self, name: str, callback: Callback, steps: Sequence[str], points: Sequence[str] = ()) -> Callback:
        """Time methods of a callback, those that serve points apart."""
        for method in (*steps, *points):
            timed = self._timed(f"a point of {name}" if method in points else name, getattr(callback, method))
            setattr(callback, method, timed)
        return callback

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = call(*args, **kwargs)
            self.blocks[-1][name] += time.process_time() - start
            return result

        return timed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for layer in self.layers.values():  # the monitor registers its own hooks later, when the fit starts
            layer.register_forward_hook(lambda *_: setattr(self, "_started", time.process_time()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, layer in self.layers.items():
            layer.register_forward_hook(partial(self._after, name))

    def _after(self, name: str, *_: Any) -> None:
        self.blocks[-1][name] += time.process_time() - self._started

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.blocks.append(defaultdict(float))


class Unsorted(Callback):
    """Appends to the other queue of stable-pretraining, which keeps no order; ``RankMe`` cannot be told to use it."""

    def __init__(self, key: str, length: int, width: int) -> None:
        self.key = key
        self.queue = peer("stable_pretraining.callbacks.queues").UnsortedQueue(length, width, torch.float32)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.queue.append(outputs[self.key])


def cost() -> None:
    """Both monitors in one fit of an encoder with 768 outputs, batch 256, a validation and a point every 50 steps."""
    torch.manual_seed(SEED)
    width, warm, blocks = 768, 2, 10  # the longest queue is full after 79 steps
    encoder = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Identity())
    monitors = {
        "`CollapseMonitor()`": CollapseMonitor(["encoder"]),
        "`CollapseMonitor(rows=2048)`": CollapseMonitor(["encoder.2"], every_n_steps=BLOCK, rows=2048),
    }
    clock = Clock(dict(zip(monitors, (encoder, encoder[2]), strict=True)))
    callbacks: list[Callback] = []
    table_rows: dict[str, tuple[str, str]] = {}  # for a name: rows behind a point, and what to compare with
    for (ours, monitor), (key, length) in zip(monitors.items(), {"long": 20000, "short": 2048}.items(), strict=True):
        theirs, unsorted = f"stable-pretraining `RankMe`, queue of {length}", f"its `UnsortedQueue` of {length}, alone"
        rank = peer("stable_pretraining.callbacks.rankme").RankMe(theirs, key, length, width, verbose=False)
        queue = peer("stable_pretraining.callbacks.queue").OnlineQueue(key, length, width, torch.float32, True, False)
        callbacks += [
            clock.watch(ours, monitor, ["on_train_batch_start", "on_train_batch_end"], ["measure", "publish"]),
            clock.watch(theirs, queue, ["on_train_batch_end"], ["on_validation_epoch_start"]),
            clock.watch(theirs, rank, [], ["on_validation_batch_end"]),
            clock.watch(unsorted, Unsorted(key, length, width), ["on_train_batch_end"]),
        ]
        table_rows |= {ours: ("", ours), theirs: (f"{length}", ours), unsorted: ("", ours)}
    batch = torch.randn(256, width), torch.randint(10, (256,))
    with tempfile.TemporaryDirectory() as folder:
        module, logger = Encoder(encoder, width, lr=0.01), TensorBoardLogger(folder)
        trainer = fit(module, batch, [*callbacks, clock], (warm + blocks) * BLOCK, BLOCK, logger=logger)
    for name, monitor in monitors.items():
        (layer,) = monitor.layers or ()
        table_rows[name] = f"{trainer.callback_metrics[f'collapse/{layer}/n']:.0f}", name
    measured = clock.blocks[warm : warm + blocks]
    columns = ["what", "rows behind a point", "ms per step, points apart", "ms per point"]
    columns += ["ms per step, a point every 50 steps (lowest and highest of 10)", "times ours"]
    table(
        "Cost of watching 768 features, batch 256",
        columns,
        [cost_row(measured, name, *cells) for name, cells in table_rows.items()],
    )


def cost_row(blocks: Sequence[Mapping[str, float]], name: str, rows: str, ours: str) -> list[str]:
    """Means over the blocks, of which one has pictures."""
    points = [1000 * block[f"a point of {name}"] for block in blocks]
    totals, reference = ([1000 * in_all(block, side) / BLOCK for block in blocks] for side in (name, ours))
    steps = statistics.mean(totals) - statistics.mean(points) / BLOCK
    times = statistics.mean(totals) / statistics.mean(reference)
    spread = f"{statistics.mean(totals):.3g} ({min(totals):.3g}, {max(totals):.3g})"
    if not rows:
        return [name, "", f"{steps:.3f}", "", "", ""]
    return [name, rows, f"{steps:.3f}", f"{statistics.mean(points):.0f}", spread, f"{times:.1f}"]


def in_all(block: Mapping[str, float], name: str) -> float:
    """Seconds of a block; the monitor makes its points inside the hooks of a step, the peer apart from them."""
    return block[name] if "CollapseMonitor" in name else block[name] + block[f"a point of {name}"]


def speed() -> None:
    """Forward and backward of VICReg in ``float32``, the three in turn."""
    torch.manual_seed(SEED)
    losses = [vicreg(side) for side in SIDES]
    rows = []
    for (n, d), rounds in {(256, 2048): 15, (256, 256): 101, (1024, 256): 51, (8192, 64): 51, (32, 32): 501}.items():
        views = torch.randn(n, d), torch.randn(n, d)
        times = [[processor_time(loss, views) for loss in losses] for _ in range(rounds + 1)][1:]
        medians = [f"{1000 * statistics.median(side):.2f}" for side in zip(*times, strict=True)]
        ratios = []
        for i in range(len(SIDES) - 1):
            low, middle, high = statistics.quantiles([turn[-1] / turn[i] for turn in times], n=4)
            ratios.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        rows.append([f"{n} x {d}", *medians, *ratios])
    columns = ["rows x features", *(f"{name}, ms" for name in SIDES)]
    columns += [f"ours / {name} (quartiles)" for name in SIDES[:-1]]
    table("VICReg, forward and backward", columns, rows)


def processor_time(loss: Callable[..., Tensor], views: Sequence[Tensor]) -> float:
    """Seconds of one evaluation with its gradient."""
    leaves = [view.clone().requires_grad_() for view in views]
    start = time.process_time()
    loss(*leaves).backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start


def ddp() -> None:
    """Gradient of a projector on two processes, averaged as DDP does, against one process on all rows."""
    rows = []
    sides = ["lightly", "lightly, gather_distributed=True", *SIDES[1:]]
    for name, sizes in {"equal: 64 and 64 rows": (64, 64), "uneven: 96 and 32 rows": (96, 32)}.items():
        weight, views = projector(sum(sizes))
        true_vicreg(*(view.double() @ weight.double() for view in views)).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        truth = weight.grad.double()
        rows.append([name, *(on_two_processes(side, sizes, truth) for side in sides)])
    table("VICReg on two processes: length of the gradient over the true one, relative error", ["batch", *sides], rows)


def projector(rows: int) -> tuple[Tensor, list[Tensor]]:
    """The weight of a projector, with a gradient, and two views."""
    torch.manual_seed(SEED)
    weight = torch.randn(32, 128, requires_grad=True)
    first = torch.randn(rows, 32)
    return weight, [first, first + 0.1 * torch.randn(rows, 32)]


def on_two_processes(side: str, sizes: Sequence[int], truth: Tensor) -> str:
    """What came back; a side that does not answer within minutes hangs."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        workers = [context.Process(target=work, args=(rank, side, sizes, folder)) for rank in range(len(sizes))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(180)
            worker.kill()
            worker.join()
        results = [torch.load(path) for path in sorted(Path(folder).glob("*.pt"))]
    failed = [result for result in results if isinstance(result, str)]
    if failed or not results:
        return f"`{failed[0]}`" if failed else "no answer"
    gradient = results[0].double()
    return f"{float(gradient.norm() / truth.norm()):.3f}, {error(gradient, truth):.0e}"


def work(rank: int, side: str, sizes: Sequence[int], folder: str) -> None:
    """One of the processes: leave the averaged gradient, or the name of the exception."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gloo writes a page before it aborts
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=len(sizes),
        timeout=timedelta(seconds=20),
    )
    weight, views = projector(sum(sizes))
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    result: Tensor | str
    try:
        vicreg(side)(*(view[own] @ weight for view in views)).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        torch.distributed.all_reduce(weight.grad)
        result = weight.grad / len(sizes)
    except Exception as failure:
        result = type(failure).__name__
    torch.save(result, f"{folder}/{rank}.pt")


THEMES = {"seeing": seeing, "rankme": rankmes, "autocast": autocast, "cost": cost, "speed": speed, "ddp": ddp}


def main(themes: Sequence[str]) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    packages = ("lightning-collapse", "lightly", "stable-pretraining", "lightning", "torch")
    print(", ".join(f"{package} {version(package)}" for package in packages))
    for theme in themes or THEMES:
        THEMES[theme]()


if __name__ == "__main__":
    main(sys.argv[1:])
