"""A fit of a setting, watched or not, and all that can be said of it when it has ended."""

import random
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from tests.faults.data import loader
from tests.faults.faults import FAULTS, At, Case
from tests.faults.loggers import loggers
from tests.faults.models import Lit, ManualLit
from tests.faults.setting import Setting
from tests.faults.watchers import build, measures_of_users

HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]
ROOM = 4 << 20
"""Bytes that the watchers of these models, of a few thousand weights, may hold."""


@dataclass
class Outcome:
    """What a fit left behind.

    Attributes:
        facts: By name whatever a watched fit must have in common with a bare one.
        held: Bytes in tensors that the watchers held at most, and whether a graph was among them.
        said: Warnings in the name of a watcher.
        refused: The watcher that raised when the fit started, as it may.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    held: int = 0
    keeps_graph: bool = False
    said: list[str] = field(default_factory=list)
    points: int = 0
    refused: int | None = None
    trace: str = ""


def fit(setting: Setting, watch: bool) -> Outcome:
    """Fit in a folder of its own, with every random state set."""
    torch._dynamo.reset()  # code that an earlier fit has compiled would be compiled no more
    random.seed(setting.seed)
    np.random.seed(setting.seed)
    torch.manual_seed(setting.seed)
    outcome = Outcome()
    before = _globals()
    with TemporaryDirectory() as folder, measures_of_users(), _warnings(outcome):
        _run(setting, watch, Path(folder).resolve(), outcome)
    outcome.facts |= {f"random state of {name}": state for name, state in _random_states().items()}
    now = _globals()
    outcome.facts |= {f"global {name}": now[name] if now[name] != before[name] else "as before" for name in now}
    return outcome


def _run(setting: Setting, watch: bool, folder: Path, outcome: Outcome) -> None:
    make = ManualLit if setting.manual else Lit
    model = make(setting.body, setting.optimizer, setting.scheduler, setting.objective, setting.logs)
    case = Case(model, [], {}, folder)
    for name, step, kind in setting.faults:
        FAULTS[name][0](case, step, kind)
    if setting.compiled == "inner":
        model.front = torch.compile(model.front, backend="eager")  # type: ignore[assignment]
    fitted: Any = torch.compile(model, backend="eager") if setting.compiled == "whole" else model
    checkpoint = folder / "leg.ckpt"
    legs = 1 if setting.legs in ("once", "sanity checked") else 2
    watchers: list[Callback] = []
    end, trainer = "finished", None
    for leg in range(legs):
        watched = watch and setting.legs != ("watched later", "watched first")[leg]
        if watched and not (leg and setting.legs == "again"):
            watchers = build(setting.watchers, case, setting.mapping)
        others = [*case.callbacks, *_company(setting, folder)]
        if legs == 2 and leg == 0 and setting.legs != "again":
            others.append(At(setting.stop_at, lambda trainer, _: _leave(trainer, checkpoint)))
        place = round(setting.places * len(others))
        held = [_Held(watchers, outcome)] if watched else []
        callbacks = [*others[:place], *(watchers if watched else []), *others[place:], *held]
        try:
            trainer = Trainer(**_options(setting, case, folder), callbacks=callbacks)
            resumes = leg and setting.legs != "again" and checkpoint.exists()
            trainer.fit(fitted, *_data(setting), ckpt_path=str(checkpoint) if resumes else None)
        except BaseException as error:
            outcome.refused = _refusing(error, watchers)
            outcome.trace = _trace(error)
            end = re.sub("0x[0-9a-f]+", "", f"{type(error).__name__}: {error}".replace(str(folder), ""))[:300]
            break
    outcome.points += sum(getattr(watcher, "points", 0) for watcher in watchers[-1:])
    outcome.facts |= {"end": end} | _facts(case, trainer, set(map(id, watchers)), folder)


def _leave(trainer: Trainer, checkpoint: Path) -> None:
    trainer.save_checkpoint(checkpoint)
    trainer.should_stop = True
    trainer.fit_loop.min_epochs = 0


def _options(setting: Setting, case: Case, folder: Path) -> dict[str, Any]:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_checkpointing": "ModelCheckpoint" in setting.company,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": setting.epochs,
        "limit_train_batches": setting.limit,
        "limit_val_batches": 0 if setting.validation == "none" else 2,
        "num_sanity_val_steps": 2 if setting.legs == "sanity checked" else 0,
        "log_every_n_steps": setting.log_every,
        "logger": loggers(setting.logger, folder),
        "precision": setting.precision,
    }
    if setting.validation == "middle" and setting.limit == 1.0:
        options["val_check_interval"] = 2
    if not setting.manual:
        options |= {"accumulate_grad_batches": setting.accumulate, "gradient_clip_val": setting.clip}
    if setting.precision == "16-mixed":
        del options["precision"]
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**18))]
    flags: dict[str, dict[str, Any]] = {
        "": {},
        "no inference_mode": {"inference_mode": False},
        "overfit_batches": {"overfit_batches": 2},
        "barebones": {"barebones": True, "logger": False, "log_every_n_steps": 0},
    }
    return options | case.options | flags.get(setting.flag, {setting.flag: True})


def _company(setting: Setting, folder: Path) -> list[Callback]:
    made: dict[str, Any] = {
        "EarlyStopping": lambda: lightning_callbacks.EarlyStopping("loss", patience=1, strict=False),
        "ModelCheckpoint": lambda: lightning_callbacks.ModelCheckpoint(folder / "company", every_n_train_steps=3),
        "SWA": lambda: lightning_callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1),
        "EMA": lambda: lightning_callbacks.EMAWeightAveraging(decay=0.5),
        "LearningRateMonitor": lambda: lightning_callbacks.LearningRateMonitor("step"),
        "Finetuning": lambda: Finetuning(),
        "Schedule": lambda: lightning_callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
    }
    refused = {
        "LearningRateMonitor": setting.logger == "none" or setting.flag == "barebones",
        "Schedule": setting.manual or setting.accumulate > 1,
        "SWA": setting.manual,
        "Finetuning": setting.manual,
    }
    return [made[name]() for name in setting.company if not refused.get(name)]


class Finetuning(lightning_callbacks.BaseFinetuning):
    """Thaws the body in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.front)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.front, optimizer)


def _data(setting: Setting) -> list[Any]:
    train = loader(setting.loader, setting.batches, setting.mapping)
    return [train] if setting.validation == "none" else [train, loader("short last", 2, setting.mapping)]


class _Held(Callback):
    """Weighs what watchers hold after every batch."""

    def __init__(self, watchers: Sequence[Callback], outcome: Outcome) -> None:
        self.watchers, self.outcome = watchers, outcome

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        own = {p.untyped_storage().data_ptr() for p in (*pl_module.parameters(), *pl_module.buffers())}
        tensors = [t for t in _tensors(self.watchers) if t.layout == torch.strided and t.device.type == "cpu"]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_nested}
        self.outcome.held = max(self.outcome.held, sum(size for where, size in sizes.items() if where not in own))
        self.outcome.keeps_graph |= any(t.grad_fn is not None for t in tensors)


def _tensors(roots: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors that objects of the package, containers and records hold, but not what they refer to of others."""
    seen, left = set(), list(roots)
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
        elif type(value).__module__.startswith("lightning_collapse.") and not isinstance(value, nn.Module):
            with suppress(TypeError):
                left += vars(value).values()


def _facts(case: Case, trainer: Trainer | None, ours: set[int], folder: Path) -> dict[str, Any]:
    model = case.model
    facts: dict[str, Any] = {"training steps": model.now, "losses": torch.tensor(model.ran), "record": case.record}
    facts |= {f"weight {name}": value.detach().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        facts[f"gradient {name}"] = parameter.grad
        facts[f"requires_grad {name}"] = parameter.requires_grad
    extras = [(f"former part {i}", module) for i, module in enumerate(case.strangers)]
    for name, module in [*model.named_modules(), *extras]:
        facts[f"attributes of {name or 'model'}"] = sorted(vars(module))
        facts[f"hooks of {name or 'model'}"] = {hook: len(vars(module).get(hook) or ()) for hook in HOOKS}
        facts[f"mode of {name or 'model'}"] = module.training
    facts["hooks of parameters"] = [len(p._backward_hooks or ()) for p in model.parameters()]
    facts["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.ckpt") if p.parent.name != "guard")
    if trainer is None:
        return facts
    facts |= {"optimizer steps": trainer.global_step, "epoch": trainer.current_epoch, "status": trainer.state.status}
    if trainer.state.finished:  # else reading them is what brings them up to date
        facts["metrics"] = {k: v for k, v in trainer.callback_metrics.items() if k in ("loss", "val_loss")}
    with suppress(AttributeError):  # a fit that failed at its start has none
        for i, optimizer in enumerate(trainer.optimizers):
            facts[f"optimizer {i}"] = optimizer.state_dict()
            facts[f"hooks of optimizer {i}"] = {k: len(v) for k, v in vars(optimizer).items() if "hooks" in k}
        facts["schedulers"] = [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs]
        facts["scaler"] = getattr(getattr(trainer.precision_plugin, "scaler", None), "state_dict", dict)()
    for callback in trainer.callbacks:
        if id(callback) not in ours and isinstance(callback, lightning_callbacks.EarlyStopping):
            facts["early stopping"] = callback.state_dict()
    return facts


def _random_states() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1:3], "python": random.getstate()}


def _globals() -> dict[str, Any]:
    module = nn.modules.module
    return {
        "warning filters": list(warnings.filters),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "inference mode": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "module hooks": [len(v) for k, v in vars(module).items() if k.startswith("_global") and "hooks" in k],
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "optimizer hooks": len(_global_optimizer_pre_hooks),
    }


@contextmanager
def _warnings(outcome: Outcome) -> Iterator[None]:
    """Collects what is said in the name of a watcher."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    names = ("Monitor`", "CollapseGuard`", "ContinualMetrics`")
    outcome.said = [str(w.message) for w in said if any(f"{name}" in str(w.message)[:40] for name in names)]


def _refusing(error: BaseException, watchers: Sequence[Callback]) -> int | None:
    """Which watcher raised in ``on_fit_start`` what may be raised there."""
    trace = error.__traceback__ if isinstance(error, ValueError | TypeError | MisconfigurationException) else None
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name in ("on_fit_start", "setup"):
            for i, watcher in enumerate(watchers):
                if frame.f_locals.get("self") is watcher:
                    return i
        trace = trace.tb_next
    return None


def _trace(error: BaseException) -> str:
    """The innermost place of the package that an exception passed through."""
    where, trace = "", error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if "/lightning_collapse/" in path:
            where = f"{path.rpartition('/lightning_collapse/')[2]}:{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return where
