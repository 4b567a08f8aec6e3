"""Random faults: what befalls a fit, whether it is watched or not."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.faults.models import WIDTH, Lit


@dataclass
class Case:
    """A fit before it begins, for faults to add to.

    Attributes:
        options: Arguments of the trainer.
        record: What callbacks saw, to be the same in both fits.
        strangers: Modules that were parts of the model at some time.
    """

    model: Lit
    callbacks: list[Callback]
    options: dict[str, Any]
    folder: Path
    record: list[Any] = field(default_factory=list)
    strangers: list[nn.Module] = field(default_factory=list)


Fault = Callable[[Case, int, str], None]
FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {}
"""By name the function that puts a fault into a case at a step, and its kinds."""


def fault(*kinds: str) -> Callable[[Fault], Fault]:
    """Make a fault known by the name of its function."""

    def register(function: Fault) -> Fault:
        FAULTS[function.__name__] = function, kinds
        return function

    return register


class Opaque:
    """What no hook knows, and whose attributes raise."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"do not ask for {name}") if not name.startswith("__") else AttributeError(name)


class Marked(Tensor):
    """A subclass of a tensor."""


ODD: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda h: None,
    "dict": lambda h: {"hidden": h, "n": len(h)},
    "tuple": lambda h: (None, (h, h)),
    "list": lambda h: [h, h[:1]],
    "text": lambda h: "features",
    "opaque": lambda h: Opaque(),
    "iterator": lambda h: iter([h]),
    "nested": lambda h: torch.nested.as_nested_tensor(list(h.split(3))),
    "jagged": lambda h: torch.nested.as_nested_tensor(list(h.split(3)), layout=torch.jagged),
    "coo": lambda h: h.to_sparse(),
    "csr": lambda h: h.to_sparse_csr(),
    "mkldnn": lambda h: h.detach().float().to_mkldnn(),
    "complex": lambda h: torch.complex(h.float(), h.float()),
    "float8": lambda h: h.detach().to(torch.float8_e4m3fn),
    "quantized": lambda h: torch.quantize_per_tensor(h.detach().float(), 0.1, 0, torch.qint8),
    "meta": lambda h: h.detach().to("meta"),
    "zero rows": lambda h: h[:0],
    "zero width": lambda h: h[:, :0],
    "one row": lambda h: h[:1],
    "scalar": lambda h: h.mean(),
    "integers": lambda h: h.detach().nan_to_num().clamp(-9, 9).long(),
    "booleans": lambda h: h > 0,
    "wider": lambda h: torch.cat([h, h], dim=1),
    "rank five": lambda h: h[:, None, :, None, None],
    "channels last": lambda h: h.unflatten(1, (2, 2, 4)),
    "subclass": lambda h: h.as_subclass(Marked),
    "expanded": lambda h: h[:1].expand_as(h),
    "transposed": lambda h: h.T,
    "detached": lambda h: h.detach(),
    "overwritten": lambda h: h + 0,
    "double": lambda h: h.double(),
    "half": lambda h: h.half(),
    "nan": lambda h: h * torch.nan,
    "nan rows": lambda h: torch.cat([h[:-2], h[-2:] * torch.nan]),
    "infinite": lambda h: h / 0,
    "huge": lambda h: h * 1e30,
    "tiny": lambda h: h * 1e-40,
    "constant": lambda h: 0 * h + 1,
}


class Odd(nn.Module):
    """A linear layer that returns something odd from some training step of its model on."""

    def __init__(self, model: Lit, step: int, kind: str) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.model, self.step, self.kind = [model], step, kind  # in a list, or the model were a part of it

    def forward(self, h: Tensor) -> Any:
        out = self.inner(h)
        return out if self.model[0].now < self.step else ODD[self.kind](out)


class Failing(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no way back")


class Hook:
    """Does something in a forward pass of the layer that it hooks, at one training step.

    Watchers run the step too, ahead of it. A model fails whoever runs it, but a user interrupts the training.
    """

    def __init__(self, model: Lit, step: int, kind: str) -> None:
        self.model, self.step, self.kind = model, step, kind

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        due = self.model.now == self.step and (self.kind != "interrupt" or _is_stepping(self.model))
        return HOOKS[self.kind](values[-1]) if due else None


def _is_stepping(model: Lit) -> bool:
    """Whether Lightning runs a training step now: it counts a batch before the step and after it."""
    trainer: Any = model._trainer  # copies have none
    progress = None if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.current
    return progress is not None and progress.started > progress.processed


def _raise(error: BaseException) -> Any:
    raise error


def _overwrite(output: Tensor) -> None:
    with torch.no_grad():
        output.data.zero_()


HOOKS: dict[str, Callable[[Any], Any]] = {
    "value": lambda output: _raise(ValueError("boom")),
    "memory": lambda output: _raise(MemoryError("boom")),
    "stop iteration": lambda output: _raise(StopIteration("boom")),
    "interrupt": lambda output: _raise(KeyboardInterrupt()),
    "backward": Failing.apply,
    "zeros": _overwrite,
    "inputs nan": lambda args: (args[0] * torch.nan,),
    "inputs infinite": lambda args: (args[0] / 0,),
    "inputs huge": lambda args: (args[0] * 1e20,),
    "inputs zero": lambda args: (args[0] * 0,),
    "inputs nan row": lambda args: (torch.cat([args[0][:-1], args[0][-1:] * torch.nan]),),
}


class At(Callback):
    """Calls a function with trainer and module after the batch of one training step."""

    def __init__(self, step: int, act: Callable[[Trainer, Any], Any], always: bool = False) -> None:
        self.step, self.act, self.always = step, act, always

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        now = int(pl_module.now)  # type: ignore[arg-type]
        if now == self.step or (self.always and now > self.step):
            self.act(trainer, pl_module)


@fault(*ODD)
def output_is_odd(case: Case, step: int, kind: str) -> None:
    case.model.middle = Odd(case.model, step, kind)


@fault("value", "memory", "stop iteration", "interrupt", "backward", "zeros")
def forward_fails(case: Case, step: int, kind: str) -> None:
    case.model.middle.register_forward_hook(Hook(case.model, step, kind))


@fault("inputs nan", "inputs infinite", "inputs huge", "inputs zero", "inputs nan row")
def input_is_bad(case: Case, step: int, kind: str) -> None:
    case.model.front.register_forward_pre_hook(Hook(case.model, step, kind))


@fault("value", "interrupt")
def callback_fails(case: Case, step: int, kind: str) -> None:
    case.callbacks.append(At(step, lambda *_: HOOKS[kind](None)))


@fault("None", "nan", "step raises")
def loss_is_bad(case: Case, step: int, kind: str) -> None:
    bad = {"None": lambda loss: None, "nan": lambda loss: loss * torch.nan, "step raises": lambda loss: 1 / 0}[kind]
    cls = type(case.model)

    class Bad(cls):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return bad(loss) if self.now == step else loss

    case.model.__class__ = Bad


def _replace(model: Lit, layer: nn.Module | None) -> None:
    model.middle = layer  # type: ignore[assignment]


def _move(model: Lit) -> None:
    for parameter in model.middle.parameters():
        parameter.data = parameter.data.clone()


def _fill(model: Lit, value: float) -> None:
    with torch.no_grad():
        for parameter in model.middle.parameters():
            parameter.fill_(value)


CHANGES: dict[str, Callable[[Lit], Any]] = {
    "dead": lambda model: _replace(model, None),
    "replaced": lambda model: _replace(model, nn.Linear(WIDTH, WIDTH).to(next(model.parameters()))),
    "frozen": lambda model: model.middle.requires_grad_(False),
    "thawed": lambda model: model.middle.requires_grad_(True),
    "eval": lambda model: model.front.eval(),
    "double": lambda model: model.middle.double(),
    "moved": _move,
    "zeroed": lambda model: _fill(model, 0),
    "nan": lambda model: _fill(model, torch.nan),
    "hooked": lambda model: model.middle.register_forward_hook(lambda module, args, output: output),
    "monkeypatched": lambda model: setattr(model.middle, "forward", model.middle.forward),
}


@fault(*CHANGES)
def layer_changes(case: Case, step: int, kind: str) -> None:
    if kind == "thawed":
        case.model.middle.requires_grad_(False)

    def act(trainer: Trainer, model: Lit) -> None:
        case.strangers.extend(model.middle.modules())
        CHANGES[kind](model)

    case.callbacks.append(At(step, act))


@fault("no_grad", "grad", "eval", "inference", "vmap", "jacobian")
def callback_runs_model(case: Case, step: int, kind: str) -> None:
    def act(trainer: Trainer, model: Lit) -> None:
        x = torch.linspace(-1, 1, 5 * WIDTH).view(5, WIDTH).to(next(model.parameters()).dtype)
        flags = {module: module.training for module in model.modules()}
        if kind in ("eval", "vmap", "jacobian"):
            model.eval()
        with torch.inference_mode(kind == "inference"), torch.set_grad_enabled(kind in ("grad", "jacobian")):
            if kind == "vmap":
                out = torch.vmap(lambda row: model(row.unsqueeze(0)), randomness="same")(x)
            elif kind == "jacobian":
                out = torch.func.jacrev(lambda rows: model(rows).sum(dim=0))(x)
            else:
                out = model(x)
        if kind == "grad":
            out.sum().backward()
            model.zero_grad()
        for module, training in flags.items():
            module.training = training
        case.record.append(out.detach().clone())

    case.callbacks.append(At(step, act, always=True))


@fault("deepcopy", "pickle", "save", "copy runs", "state")
def module_is_copied(case: Case, step: int, kind: str) -> None:
    def act(trainer: Trainer, model: Lit) -> None:
        if kind == "state":
            model.load_state_dict(copy.deepcopy(model.state_dict()))
            return
        try:
            if kind == "save":
                torch.save(model, written := io.BytesIO())
                twin = torch.load(io.BytesIO(written.getvalue()), weights_only=False)
            else:
                twin = pickle.loads(pickle.dumps(model)) if kind == "pickle" else copy.deepcopy(model)
        except Exception as error:  # what torch itself cannot copy, it cannot copy in both fits
            case.record.append(type(error).__name__)
            return
        case.strangers.extend(twin.modules())
        if kind == "copy runs":
            with torch.no_grad():
                twin(torch.ones(7, WIDTH, dtype=next(model.parameters()).dtype))

    case.callbacks.append(At(step, act))


@fault("unwritable", "every step")
def disk(case: Case, step: int, kind: str) -> None:
    blocked = case.folder / "blocked"
    blocked.write_text("a file where a folder is expected")
    folder = blocked / "checkpoints" if kind == "unwritable" else case.folder / "checkpoints"
    case.options["enable_checkpointing"] = True
    every = step if kind == "unwritable" else 1
    case.callbacks.append(ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1))


@fault("stop", "limit")
def fit_is_cut(case: Case, step: int, kind: str) -> None:
    if kind == "limit":
        case.options["max_steps"] = step
        return
    case.callbacks.append(At(step, lambda trainer, _: setattr(trainer, "should_stop", True)))
