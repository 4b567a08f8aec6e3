"""Private API of Lightning: what it does not say in public of a running trainer; the only file that looks inside."""

import pickle
from collections.abc import Callable
from contextvars import ContextVar
from inspect import signature
from math import inf, isinf
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_collapse.utilities.twin_packages import is_kind, path_of

_aside: ContextVar[bool] = ContextVar("aside", default=False)
_PIPE = 8 * 1024
"""Far less than a pipe holds: 29 KB of curves were seen to block one."""


def logging_step(trainer: Trainer) -> int:
    """The x-axis of Lightning's own curves: optimizer steps, counted once for several optimizers."""
    step: int = _epoch_loop(trainer)._batches_that_stepped
    return step


def is_resumed(trainer: Trainer) -> bool:
    """Whether the fit that begins goes on from a checkpoint; asked in ``on_fit_start``.

    The step counter cannot tell, since loops are restored later, nor can the calls of ``load_state_dict``: tuners such
    as ``LearningRateFinder`` and ``BatchSizeFinder`` save the states of all callbacks and load them again before a
    callback's ``on_fit_start``, and leave the path of their own checkpoint in ``trainer.ckpt_path``.
    """
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def ends_step(trainer: Trainer) -> bool:
    """Whether the running training batch is the last of its accumulation window (the epoch's odd last one too)."""
    return not _epoch_loop(trainer)._should_accumulate()


def batches_until(trainer: Trainer, every_n_steps: int) -> int:
    """Training batches from the running one to the next point of a cadence; 0 if the running one ends in a point.

    An epoch that ends inside an accumulation window brings the point earlier than this says.
    """
    steps = -(logging_step(trainer) + 1) % every_n_steps
    accumulate = trainer.accumulate_grad_batches
    if accumulate == 1 or ends_step(trainer):
        return steps * accumulate
    left: int = -_epoch_loop(trainer).batch_progress.current.ready % accumulate
    return steps * accumulate + left


def is_due(trainer: Trainer, every_n_steps: int, ahead: int = 0) -> bool:
    """Whether the running training batch ends in a point of a cadence; at the same steps as Lightning's own curves.

    With ``ahead`` whether it ends an optimizer step, and so many steps later one ends in a point.
    """
    return every_n_steps > 0 and (logging_step(trainer) + 1 + ahead) % every_n_steps == 0 and ends_step(trainer)


def batches_of_epoch(trainer: Trainer) -> int | None:
    """Training batches of an epoch; of a stream, which may never end, as many as the latest epoch read, if any."""
    number = trainer.num_training_batches
    if not isinf(number):
        return int(number)
    read: int = _epoch_loop(trainer).batch_progress.current.ready
    return read or None


def without_module(callback: Callback) -> dict[str, Any]:
    """Attributes of a callback but for ``log`` and ``log_dict``: these are its module's, and a copy would hold it."""
    return {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}


def planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the fit, if its length is known."""
    steps: float = trainer.max_steps
    if steps < 0 and trainer.max_epochs is not None and trainer.max_epochs > 0:
        steps = trainer.max_epochs * trainer.num_training_batches / trainer.accumulate_grad_batches
    return int(steps) if 0 < steps < inf else None


def loss_scale(trainer: Trainer, optimizer: Optimizer | None = None) -> Tensor | None:
    """Factor that gradients carry for the sake of 16-bit training, where it lies: nothing waits for the device.

    Args:
        trainer: Whose gradients.
        optimizer: ``None`` asks right after a backward pass; with an optimizer it is what its gradients carry when
            ``on_before_optimizer_step`` is called: nothing, unless it takes the factor out itself, as fused ones do.

    Returns:
        0-dimensional, or ``None`` where gradients are as they are.
    """
    if optimizer is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # `GradScaler.get_scale` would wait for the device
    return getattr(scaler, "_scale", None) if scaler is not None and scaler.is_enabled() else None


def unscaled_squares(trainer: Trainer, optimizer: Optimizer, squares: Tensor) -> Tensor:
    """Squared norms of the gradients that an optimizer gets, without the factor that they may carry."""
    scale = loss_scale(trainer, optimizer)
    return squares if scale is None else squares / scale.to(squares).square()


def to_device(trainer: Trainer, batch: Any, prepared: bool = False) -> Any:
    """A batch as a step would get it: in the trainer's precision, through the batch hooks, on the device.

    Args:
        trainer: Whose step.
        batch: One that the training does not train on of itself, see :func:`is_aside`.
        prepared: Whether it is in that precision and has been through the hooks before the transfer already.
    """
    token = _aside.set(True)
    try:
        if not prepared:
            batch = trainer.precision_plugin.convert_input(batch)
            batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    finally:
        _aside.reset(token)


def is_aside() -> bool:
    """Whether a batch in a batch hook is one of :func:`to_device`, and none of the training's own."""
    return _aside.get()


def batch_hook_owner(trainer: Trainer, hook: str) -> Any:
    """The module or data module whose hook a batch goes through on its way to the device."""
    return trainer._data_connector._datahook_selector.get_instance(hook)  # type: ignore[union-attr]


def synchronizes_last(trainer: Trainer) -> bool:
    """Whether processes accumulate gradients each on its own until the last micro-batch of a step."""
    return isinstance(trainer.model, DistributedDataParallel)


def is_in_buckets(module: nn.Module) -> bool:
    """Whether a wrapper sums the gradients of a ``LightningModule``: it knows nothing of new parameters."""
    return isinstance(getattr(getattr(module, "_trainer", None), "model", None), DistributedDataParallel)


def is_sharded(trainer: Trainer, module: nn.Module) -> bool:
    """Whether no process holds the whole of every parameter."""
    marks = ("full_tensor", "ds_id")  # of DTensor (FSDP2, tensor parallel) and of DeepSpeed's third stage
    cut = any(hasattr(parameter, mark) for parameter in module.parameters() for mark in marks)
    return cut or is_kind(trainer.strategy, FSDPStrategy)


def refuse_sharded(trainer: Trainer, module: nn.Module, who: str, does: str) -> None:
    """Refuse a model that no process holds the whole of, for someone who does something to whole tensors.

    Raises:
        MisconfigurationException: If :func:`is_sharded`.
    """
    if is_sharded(trainer, module):
        raise MisconfigurationException(f"`{who}` {does}, and no process holds the whole of a sharded one. Use DDP.")


def refuse_flattened(trainer: Trainer, who: str, what: str = "parameters") -> None:
    """Refuse a strategy whose flattened parameters belong to no module.

    Raises:
        MisconfigurationException: For ``strategy="fsdp"``.
    """
    if is_kind(trainer.strategy, FSDPStrategy):
        raise MisconfigurationException(
            f"`{who}` cannot read the flattened {what} of `strategy='fsdp'`."
            " Use `ModelParallelStrategy` with `fully_shard`."
        )


def save_checkpoint(trainer: Trainer, path: str, who: str) -> bool:
    """Save a checkpoint and say whether it is there; a failure is a warning. Collective.

    Whatever the reason (a full disk, an object that cannot be pickled): a run that is only watched goes on. The first
    process alone writes, so only it may fail; the others wait for it then in the barrier that ends a save.
    """
    return _save(trainer, lambda: trainer.save_checkpoint(path), path, who)


def save_state(trainer: Trainer, make_state: Callable[[], dict[str, Any]], path: str, who: str) -> bool:
    """Save a state of training that is no whole checkpoint, as :func:`save_checkpoint` does. Collective."""

    def save() -> None:
        trainer.strategy.save_checkpoint(make_state(), path)
        trainer.strategy.barrier("Trainer.save_checkpoint")

    return _save(trainer, save, path, who)


def remove_checkpoint(trainer: Trainer, path: str, who: str) -> None:
    """Remove a checkpoint that this run has written, if it is still there; a failure is a warning."""
    try:
        trainer.strategy.remove_checkpoint(path)  # the first process does
    except Exception as error:
        rank_zero_warn(f"`{who}` could not remove its checkpoint {path!r}: {error!r:.400}")


def load_own_checkpoint(trainer: Trainer, path: str) -> dict[str, Any]:
    """A checkpoint that this run has written, whatever classes are in it; raises if it cannot be read."""
    load = trainer.strategy.load_checkpoint
    if "weights_only" in signature(load).parameters:
        return load(path, weights_only=False)
    return load(path)  # Lightning before 2.6, which asks torch to


def _save(trainer: Trainer, save: Callable[[], None], path: str, who: str) -> bool:
    problem = ""
    try:
        save()
    except Exception as error:
        problem = f"`{who}` could not save a checkpoint as {path!r}: {error!r:.400}"
        trainer.strategy.barrier("Trainer.save_checkpoint")
    saved = trainer.strategy.reduce_boolean_decision(not problem)
    if problem:
        rank_zero_warn(problem)
    return saved


def hands_back_weights_only(trainer: Trainer) -> bool:
    """Whether training runs in spawned processes, whose callbacks are lost when they end."""
    return is_kind(trainer.strategy.launcher, _MultiProcessingLauncher)


def lighten_results(trainer: Trainer, is_detail: Callable[[str], bool]) -> bool:
    """Drop details from ``callback_metrics`` if a spawned process could not hand them back, and say whether it did so.

    ``ddp_spawn`` and ``ddp_notebook`` send them through a pipe that nobody reads before the process has ended: what the
    pipe does not hold, 64 KiB, makes it wait forever, see ``_MultiProcessingLauncher``.
    """
    if not hands_back_weights_only(trainer):
        return False
    metrics = trainer.callback_metrics
    details = [name for name in metrics if is_detail(name)]
    size = len(pickle.dumps({name: value.cpu().numpy() for name, value in metrics.items()}))
    if size <= _PIPE or not details:
        return False
    for name in details:
        del metrics[name]
    return True


def is_compiled_whole(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has compiled the steps of a ``LightningModule``."""
    return getattr(module, "_compiler_ctx", None) is not None


def forget_compilation(copy: Any, memo: dict[int, Any], module: Any) -> None:
    """Have a deep copy of a ``LightningModule`` know nothing of compiled steps: with ``copy`` after, else before."""
    if copy is not None:
        copy._compiler_ctx = None
    elif is_compiled_whole(module):
        memo[id(module._compiler_ctx)] = {}


def is_in_another_hook(module: nn.Module) -> bool:
    """Whether Lightning runs a hook of a callback or of the module right now, and not the training step itself.

    Under manual optimization it calls some from inside the step: ``on_before_backward``, ``on_before_optimizer_step``.
    """
    return getattr(module, "_current_fx_name", None) not in (None, "training_step")


def tensorboard_writer(logger: Logger) -> tuple[Any, str] | None:
    """The writer of a TensorBoard logger's event file and what precedes its tags; ``None`` for any other logger.

    That is also one whose ``log_metrics`` is a subclass's own, and one of a process that does not write.
    """
    if path_of(type(logger).log_metrics) != path_of(TensorBoardLogger.log_metrics) or rank_zero_only.rank != 0:
        return None
    experiment, prefix = logger.experiment, logger._prefix
    writer = getattr(experiment, "file_writer", None)
    return None if writer is None else (writer, f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else "")


def _epoch_loop(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop
