"""Training state: what a rollback saves, compares with the present, and brings back whole or not at all."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_collapse.callbacks.loss_terms.regularizer import Regularizer
from lightning_collapse.utilities.sharding import local

AVERAGES, TERMS = "averages", "regularizers"


def capture(trainer: Trainer) -> dict[str, Any]:
    """Weights as they are trained, optimizers, schedulers, the gradient scaler, and what callbacks average. Collective.

    Not a checkpoint of the trainer: there any callback may put other weights in the place of those that are trained, as
    ``WeightAveraging`` does with the average. What the module itself adds to a checkpoint is kept, but for the weights.
    """
    strategy, precision, module = trainer.strategy, trainer.precision_plugin, trainer.lightning_module
    weights = strategy.lightning_module_state_dict()
    state = {
        "global_step": trainer.global_step,
        "state_dict": dict(weights),
        "optimizer_states": [strategy.optimizer_state(optimizer) for optimizer in trainer.optimizers],
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        type(precision).__qualname__: precision.state_dict(),
        AVERAGES: {key: _average(callback) for key, callback in _averaging(trainer)},
        TERMS: {term.state_key: term.state_dict() for term in _terms(trainer)},
    }
    module.on_save_checkpoint(state)
    return {**state, "state_dict": weights}


def apply(trainer: Trainer, state: dict[str, Any]) -> None:
    """Bring back what :func:`capture` has found; may raise when half of it is done, see :func:`undo`. Collective."""
    trainer.lightning_module.on_load_checkpoint(state)
    trainer.strategy.load_model_state_dict(state, strict=trainer.lightning_module.strict_loading)
    trainer.strategy.load_optimizer_state_dict(state)
    for config, of in zip(trainer.lr_scheduler_configs, state["lr_schedulers"], strict=True):
        config.scheduler.load_state_dict(of)
    if of := state.get(type(trainer.precision_plugin).__qualname__):
        trainer.precision_plugin.load_state_dict(of)
    for key, callback in _averaging(trainer):
        _load_average(callback, state[AVERAGES][key])
    for term in _terms(trainer):  # a running covariance may hold what went wrong
        term.load_state_dict(state[TERMS].get(term.state_key, {}))


def describe(trainer: Trainer) -> dict[str, Any]:
    """What a state must have in common with the present one to be of use: numbers, strings, lists and dicts only."""
    tensors = {**dict(trainer.lightning_module.named_parameters()), **dict(trainer.lightning_module.named_buffers())}
    averages = {f"{key}.{n}": m for key, callback in _averaging(trainer) for n, m in _modules(callback)}
    return {
        "weights": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "parameter groups": [[len(g["params"]) for g in optimizer.param_groups] for optimizer in trainer.optimizers],
        "schedulers": [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs],
        "averages": {f"{key}.{n}": list(t.shape) for key, m in averages.items() for n, t in m.state_dict().items()},
    }


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In which respect the present differs from the state that was described before, in words; empty if in none."""
    for what, of in now.items():
        if before.get(what) == of:
            continue
        if what == "parameter groups":
            return f"{what} of the optimizers have changed: {_groups(before.get(what, ()))} then, {_groups(of)} now"
        if not isinstance(of, dict):
            return f"{what} have changed: {before.get(what)} then, {of} now"
        then = before.get(what, {})
        names = [name for name in {**then, **of} if then.get(name) != of.get(name)]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{what} have changed: `{names[0]}`{more}"
    return ""


def _groups(counts: Sequence[Sequence[int]]) -> str:
    """How many groups of how many parameters."""
    return " and ".join(f"{len(of)} of {', '.join(map(str, of))} parameters" for of in counts) or "none"


class Undo:
    """A copy of the present state in the main memory, to go back to if another one cannot be brought back whole.

    Args:
        trainer: Whose state.
    """

    def __init__(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        live = [local(tensor.detach()) for tensor in (*module.parameters(), *module.buffers())]
        self._trainer = trainer
        self._tensors = [(tensor, tensor.to("cpu", copy=True)) for tensor in live]
        holders = [*trainer.optimizers, *(config.scheduler for config in trainer.lr_scheduler_configs)]
        holders += [trainer.precision_plugin, *_terms(trainer)]
        self._states = [(holder, _on_cpu(holder.state_dict())) for holder in holders]
        self._averages = [(callback, _on_cpu(_average(callback))) for _, callback in _averaging(trainer)]

    @torch.no_grad()
    def __call__(self) -> None:
        """Put everything back."""
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for holder, state in self._states:
            holder.load_state_dict(state)
        for callback, average in self._averages:
            _load_average(callback, average)


def _terms(trainer: Trainer) -> list[Regularizer]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Regularizer)]


def _averaging(trainer: Trainer) -> Iterator[tuple[str, Callback]]:
    """Callbacks that keep a copy of the module or of a part of it, such as ``WeightAveraging``, EMA and SWA."""
    parts = {type(part) for part in trainer.lightning_module.modules()}
    trained = {id(parameter) for parameter in trainer.lightning_module.parameters()}
    for callback in trainer.callbacks:
        copies = [getattr(module, "module", module) for _, module in _modules(callback)]
        copies = [copy for copy in copies if type(copy) in parts and any(True for _ in copy.parameters())]
        if any(id(parameter) not in trained for copy in copies for parameter in copy.parameters()):
            yield callback.state_key, callback


def _modules(callback: Callback) -> list[tuple[str, nn.Module]]:
    """Modules that a callback holds."""
    return [(name, value) for name, value in vars(callback).items() if isinstance(value, nn.Module)]


def _average(callback: Callback) -> dict[str, Any]:
    """State of the copies that a callback keeps, and its counters."""
    return {
        "modules": {name: module.state_dict() for name, module in _modules(callback)},
        "counters": dict(_counters(callback)),
    }


def _counters(callback: Callback) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(callback).items() if isinstance(value, Tensor) and value.ndim == 0]


@torch.no_grad()
def _load_average(callback: Callback, state: Mapping[str, Any]) -> None:
    for name, module in _modules(callback):
        module.load_state_dict(state["modules"][name])
    for name, counter in _counters(callback):  # one that began since is at its beginning again
        counter.copy_(state["counters"].get(name, torch.zeros_like(counter)))


def _on_cpu(state: Any) -> Any:
    """A copy that shares nothing with the original."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: _on_cpu(value) for name, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list) else deepcopy(state)
