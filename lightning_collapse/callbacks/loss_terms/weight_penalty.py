"""Weight regularization: a penalty on the weights of any module, without a change to its code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import inf
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.evaluation.evaluation_pass import check_forward, check_pass
from lightning_collapse.callbacks.evaluation.preserved_fit import preserved_fit
from lightning_collapse.callbacks.evaluation.task_batches import TaskBatches, check_training_data
from lightning_collapse.callbacks.loss_terms.coherence_curves import publish_shares
from lightning_collapse.callbacks.loss_terms.gradient_changes import dense_gradients, squared_change
from lightning_collapse.callbacks.loss_terms.learning_trial import try_to_learn
from lightning_collapse.penalties.base import Penalty
from lightning_collapse.penalties.support.consolidation import check_gathers, check_optimizers
from lightning_collapse.penalties.support.real_parameters import real_ones
from lightning_collapse.replay.replay_buffer import ReplayLoader
from lightning_collapse.reporting.loss_term_curves import offer_terms, publish_terms, term_curves, terms_are_due
from lightning_collapse.utilities.distributed import all_reduce_sum
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.modules import clean_name
from lightning_collapse.utilities.optimizers import searches_line
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.trainer import loss_scale
from lightning_collapse.utilities.training_step import wrap_training_step
from lightning_collapse.utilities.twin_packages import is_kind


class WeightPenalty(TaskAware):
    """Keeps weights near where old tasks, or the start, need them.

    The gradient of the penalty is added once per optimizer step, after accumulation and reduction over processes and
    before clipping; the loss and the graph stay as they are. It works with automatic and manual optimization, several
    optimizers, any precision, data-parallel training and ``fully_shard``; the update is that of
    :class:`~lightning_collapse.ContinualMixin`, bit by bit. When a task ends the penalty learns what the task needs,
    from ``loader`` or the training data; whether it can is tried when a fit starts, on one batch. One object goes
    through all tasks; what it learned is in its state, so that a resumed run goes on as if it had not been
    interrupted, and nothing enters the model's ``state_dict``.

    Optimizers that search along a line, such as L-BFGS, see the value of the penalty in the loss, too, and whatever
    they evaluate on the way counts as one step. A step that a gradient scaler skips counts as none. Sparse gradients
    become dense, since a penalty pulls at every row.

    **Logged curves**, at logging steps: ``penalty/{name}/value``, its value, weight included, and
    ``penalty/{name}/gradient_ratio``, the norm of its gradient over that of the task. ``trainer.callback_metrics`` has
    them from the first step on. When a task has ended, ``continual/{module}/rank_one_share`` and
    ``continual/all/rank_one_share`` of ``RankOneEWC`` and ``EWC(estimator="empirical")``: which share of the trace of
    the Fisher information a rank-one penalty keeps.

    A checkpoint that a ``ModelCheckpoint`` saves during a fit does not know yet that the task has ended: save one
    after the fit, as ``fit_tasks`` does.

    Args:
        penalty: What to add, such as ``EWC(weight=100.0)``.
        name: Of the curves and of its state; by default that of the class of the penalty, in lower case.
        parameters: Names of parameters it is for, or glob patterns such as ``"encoder.*"``; all by default. Frozen
            ones get no pull, but are remembered.
        loader: Data of the task that ends, for penalties that need some: batches, or a function that returns them.
            Every process reads all of it. By default the training data, augmented as it is.

    Raises:
        ValueError: If an argument is of the wrong kind, or ``parameters`` is empty.
        MisconfigurationException: When the fit starts, if the strategy is ``"fsdp"`` or DeepSpeed, another penalty has
            the name, a pattern matches nothing, no parameter is trainable, a parameter has shrunk since it was
            remembered, a penalty that reads data has no way to call the module, the training data are several loaders
            or can be read only once and ``loader`` does not say what to read, an optimizer takes sparse gradients
            alone, or one that searches along a line is stepped by hand; with the first batch, if a task could not be
            learned from it.

    Example::

        ewc = WeightPenalty(EWC(weight=100.0))
        for task in tasks:
            Trainer(callbacks=[ewc], max_epochs=4).fit(model, task)
    """

    def __init__(
        self,
        penalty: Penalty,
        name: str | None = None,
        parameters: Sequence[str] | None = None,
        loader: Loader | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(penalty, Penalty):
            raise ValueError(f"`penalty` takes an object such as `EWC(weight=100.0)`, got {penalty!r}.")
        listed = not isinstance(parameters, str) and parameters and all(isinstance(name, str) for name in parameters)
        if parameters is not None and not listed:
            raise ValueError(
                f"`parameters` takes a list of names or patterns, or None for all parameters, got {parameters!r}."
            )
        check_pass(loader, None, None)
        self.penalty = penalty
        self.name = name or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(penalty).__name__).lower()
        self.patterns = parameters
        self.loader = loader
        self._warned = False
        self._detachers: list[Callable[[], None]] = []
        self._tried = False
        self._evaluated: dict[int, bool] = {}  # of optimizers within a step, whether its gradient was seen
        self._parameters: dict[str, nn.Parameter] = {}
        self._ids: list[int] = []  # of what optimizers step
        self._owned: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self._squares: dict[str, list[Tensor]] = {"task": [], "penalty": []}
        self._value: Tensor | None = None

    @override
    def _without_fit(self) -> dict[str, Any]:
        tables: dict[str, Any] = {name: {} for name in ("_evaluated", "_parameters", "_owned")}
        own = {"_detachers": [], "_tried": False, "_ids": [], "_squares": {"task": [], "penalty": []}, "_value": None}
        return super()._without_fit() | tables | own

    def _forget(self) -> None:
        for detach in self._detachers:
            detach()
        vars(self).update(WeightPenalty._without_fit(self))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._forget()
        self.containment.owner = f"WeightPenalty(name={self.name!r})"
        if is_kind(trainer.strategy, FSDPStrategy, DeepSpeedStrategy):
            raise MisconfigurationException(
                f"`WeightPenalty` needs parameters with shapes of their own, and {type(trainer.strategy).__name__}"
                " flattens them. Use `ModelParallelStrategy` with `fully_shard`, or `strategy='ddp'`."
            )
        if self.penalty.needs_data and hasattr(self.penalty, "outputs"):  # else a whole task is trained before it fails
            call = self.penalty.outputs or getattr(self.penalty, "losses", None)
            check_forward(pl_module, call, f"`{type(self.penalty).__name__}`", "outputs")
        twins = [other for other in weight_penalties(trainer) if other.name == self.name and other is not self]
        if twins:
            raise MisconfigurationException(
                f"Two penalties are called {self.name!r}. Tell them apart with `WeightPenalty(..., name=...)`."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # not in `on_fit_start`: strategies that shard restore a checkpoint after it
        self._parameters = self._choose(pl_module)
        if self.penalty.needs_data and self.loader is None:
            check_training_data(trainer, f"`WeightPenalty({type(self.penalty).__name__}(...))`")
        try:
            if self.penalty.needs_data:
                check_gathers(pl_module)
            check_optimizers(self.penalty, trainer.optimizers)
            self.penalty.start(self._parameters)
        except ValueError as error:
            raise MisconfigurationException(f"`WeightPenalty`, {self.name!r}: {error}") from error
        for optimizer in trainer.optimizers:
            self._meet(pl_module, optimizer)
        self._ids = _ids_of(trainer.optimizers)
        if self.penalty.needs_data and self.loader is not None:
            self._try(trainer, pl_module, TaskBatches(trainer, self.loader, limit=1))
        self._warn_of_overshoot(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (ids := _ids_of(trainer.optimizers)) != self._ids:  # a head has grown within the fit
            self._ids = ids
            self._owned.clear()
            with self.containment("meeting new parameters", "it goes on with those that it knows"):
                self._parameters = self._choose(pl_module)
                self.penalty.start(self._parameters)
        if self.penalty.needs_data and not self._tried and batch is not None:
            self._try(trainer, pl_module, [batch])

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        scale = loss_scale(trainer, optimizer)
        everyone = weight_penalties(trainer)
        if everyone[0] is self:  # all see the gradient of the task before any adds to it
            for other in everyone:
                with other.containment("seeing a step", "its importances and curves may have gaps"):
                    other._observe(trainer, pl_module, optimizer, scale)
        with self.containment("its pull", "steps in which it fails go without it"):
            self._pull(trainer, pl_module, optimizer, scale)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._evaluated.clear()
        with self.containment("publishing its curves", "they may have gaps"):
            self.penalty.skip_step()
            if self._value is not None:
                self._publish(trainer, pl_module, self._value)
        self._value = None
        for found in self._squares.values():
            found.clear()

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = f"learning task {self.task_index}"
        consequence = "it is not remembered, those before it are. Which data to read can be said with `loader=...`"
        with self.containment(task, consequence), preserved_fit(trainer, pl_module, gradients=True):
            self.penalty.consolidate(pl_module, TaskBatches(trainer, self.loader))
        with self.containment("publishing rank-one shares", "they may have gaps"):
            publish_shares(trainer, pl_module, self.penalty)
        if task not in self.containment.failed:
            self._warn_of_overshoot(trainer)

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"penalty": self.penalty.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.penalty.load_state_dict(state_dict["penalty"])

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._forget()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._forget()

    def _warn_of_overshoot(self, trainer: Trainer) -> None:
        """Say so where steps along the penalty alone would diverge, which is known of SGD; no clipping, no task."""
        if trainer.gradient_clip_val:
            return
        for optimizer in trainer.optimizers:
            curvature = self.penalty.curvature(self._of(optimizer))
            if curvature is None or type(optimizer) is not torch.optim.SGD:
                continue
            limit = min(_largest_curvature(group) for group in optimizer.param_groups)
            if curvature > limit and not self._warned:  # waits for the device, which a task's end does anyway
                self._warned = True
                largest = self.penalty.weight * limit / curvature.item()
                rank_zero_warn(
                    f"`WeightPenalty`, {self.name!r}: at this learning rate steps along the penalty overshoot ever"
                    f" more, unless its weight is below {largest:.2g}. It is {self.penalty.weight:.4g}. Lower it or the"
                    " learning rate, or set `Trainer(gradient_clip_val=...)`."
                )

    def _meet(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Have an optimizer tell when it steps, and refuse one that no penalty goes with."""
        owned, who = self._of(optimizer), f"`WeightPenalty`, {self.name!r}: {type(optimizer).__name__}"
        if owned and isinstance(optimizer, SparseAdam):
            raise MisconfigurationException(
                f"{who} takes sparse gradients alone, and a penalty pulls at every row. Leave the parameters of sparse"
                f" embeddings out with `parameters=[...]`, or take SGD or Adagrad."
            )
        if owned and searches_line(optimizer):
            if not pl_module.automatic_optimization:
                raise MisconfigurationException(
                    f"{who} compares losses, and yours, in a closure stepped by hand, knows nothing of the penalty. Let"
                    " Lightning optimize automatically, or take an optimizer that needs no closure."
                )
            self._detachers.append(wrap_training_step(pl_module, self._with_value))
        if isinstance(optimizer, Optimizer):
            before = optimizer.register_step_pre_hook(lambda *_: self._evaluated.update({id(optimizer): False}))
            after = optimizer.register_step_post_hook(lambda *_: self._settle(optimizer))
            self._detachers += [before.remove, after.remove]

    def _with_value(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A training step whose loss has the value of the penalty in it; its gradient is added elsewhere."""
        output = step(*args, **kwargs)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or not torch.is_grad_enabled():
            return output
        loss = loss + self.penalty.value(self._parameters).detach().to(loss)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _try(self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any]) -> None:
        filled = self.loader is None or (
            isinstance(self.loader, Iterable) and not isinstance(self.loader, ReplayLoader)
        )
        told = self.penalty, self.name, self._parameters, trainer, pl_module, batches
        self._tried = try_to_learn(*told, may_be_empty=not filled) or self.loader is not None

    def _observe(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, scale: Tensor | None
    ) -> None:
        if self._evaluated.get(id(optimizer)):
            return  # of the evaluations of one step the first one, where it sets out
        owned = self._of(optimizer)
        self.penalty.skip_step()  # had the one before been made, it would be settled
        self.penalty.observe(owned, scale)
        if self._is_due(trainer):
            self._squares["task"].append(squared_change(dense_gradients(owned), {}, pl_module.device))

    def _pull(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, scale: Tensor | None) -> None:
        owned, again = self._of(optimizer), self._evaluated.get(id(optimizer))
        if id(optimizer) in self._evaluated:
            self._evaluated[id(optimizer)] = True
        if again or not self._is_due(trainer):
            self.penalty.add_gradients(owned, scale)
            return
        past = {name: (gradient.clone(), share) for name, (gradient, share) in dense_gradients(owned).items()}
        if self._value is None:
            self._value = self.penalty.value(self._parameters).detach()
        self.penalty.add_gradients(owned, scale)
        self._squares["penalty"].append(squared_change(dense_gradients(owned), past, pl_module.device))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _settle(self, optimizer: Optimizer) -> None:
        self._evaluated.pop(id(optimizer), None)
        with self.containment("seeing a step", "its importances and curves may have gaps"):
            self.penalty.after_step(self._parameters)

    @property
    def _curve(self) -> str:
        return Point("penalty", self.name, "value", 0, 0.0).key

    def _is_due(self, trainer: Trainer) -> bool:
        return trainer.training and (terms_are_due(trainer) or self._curve not in trainer.callback_metrics)

    def _publish(self, trainer: Trainer, pl_module: LightningModule, value: Tensor) -> None:
        squares = all_reduce_sum(torch.stack([torch.stack(found).sum() for found in self._squares.values()]))
        ratio = (squares[1] / squares[0]).sqrt()
        curves = term_curves(self.name, value, {"gradient_ratio": ratio}, family="penalty")
        if terms_are_due(trainer):
            publish_terms(trainer, pl_module, curves)
        else:
            offer_terms(trainer, curves)

    def _of(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Parameters that an optimizer steps, by name."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        if self._owned.get(id(optimizer), (-1, {}))[0] != size:
            ids = set(_ids_of([optimizer]))
            self._owned[id(optimizer)] = size, {n: p for n, p in self._parameters.items() if id(p) in ids}
        return self._owned[id(optimizer)][1]

    def _choose(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        named = {clean_name(name): parameter for name, parameter in pl_module.named_parameters()}
        named = real_ones(named)
        patterns = ["*"] if self.patterns is None else self.patterns
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise MisconfigurationException(
                    f"`WeightPenalty(parameters=[{pattern!r}])` matches no parameter of {type(pl_module).__name__}. It"
                    f" has: {', '.join(named)}."
                )
        chosen = {name: p for name, p in named.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
        if not any(parameter.requires_grad for parameter in chosen.values()):
            raise MisconfigurationException(
                f"`WeightPenalty`, {self.name!r}: none of its {len(chosen)} parameters is trainable: there is nothing"
                " to penalize. Choose others with `parameters=[...]`."
            )
        return chosen


def weight_penalties(trainer: Trainer) -> list[WeightPenalty]:
    """All that act in a trainer: its callbacks, and those of a module with a ``ContinualMixin``."""
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, WeightPenalty)]
    return [*callbacks, *getattr(trainer.lightning_module, "weight_penalties", {}).values()]


def _ids_of(optimizers: Iterable[Any]) -> list[int]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [id(parameter) for group in groups for parameter in group["params"]]


def _largest_curvature(group: dict[str, Any]) -> float:
    """Up to which SGD with momentum converges on a parabola."""
    lr, momentum = float(group["lr"]), float(group["momentum"])
    if lr <= 0:
        return inf
    if group["nesterov"]:
        return 2 * (1 + momentum) / (lr * (1 + 2 * momentum))
    return 2 * (1 + momentum) / (lr * (1 - float(group["dampening"]) if momentum else 1))


register_curve(
    "penalty",
    "gradient_ratio",
    reads="gradients",
    range="0 to infinity",
    collapsed="far above 1: the new task is not learned",
    source="norm of the penalty's over that of the task's",
)
