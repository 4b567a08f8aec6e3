"""Gradient projection: after each optimizer step, no part of the update is left that would change old tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.constraints.constraint import Constraint
from lightning_collapse.callbacks.continual.monitored_curves import require_available
from lightning_collapse.callbacks.continual.step_offset import StepsAcrossTasks
from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.evaluation.evaluation_pass import check_forward, check_pass
from lightning_collapse.callbacks.evaluation.preserved_fit import preserved_fit
from lightning_collapse.callbacks.evaluation.task_batches import TaskBatches, check_training_data
from lightning_collapse.penalties.support.fisher_pass import Outputs
from lightning_collapse.projections import GPM, UpdateProjection
from lightning_collapse.reporting import publish
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.points import Point
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.sharding import local, unsharded


class Projection(StepsAcrossTasks, Constraint):
    """Keeps old tasks by moving weights only in directions that these do not look along.

    Right after each optimizer step of the second task and later ones the update is projected, whatever the optimizer,
    its momentum and its weight decay are, and whatever was accumulated, scaled or clipped before; of several optimizers
    the weights that each has stepped. When a task ends, one pass over some of its data, in eval mode, finds the
    directions; random states and buffers are as they were. One object goes through all tasks. Its state makes a resumed
    run go on bit by bit, and nothing enters the model's ``state_dict``. With ``fully_shard`` every process projects its
    own rows.

    Running statistics of batch normalization follow the new task and change what old ones get: take
    ``track_running_stats=False``, or a normalization without statistics. What changes weights after it in the list of
    callbacks, such as ``MaxNorm``, is not projected. Heads of other tasks, and outputs that shall
    learn freely, are left out by ``layers``.

    **Logged curves**, when a task ends: ``continual/{layer}/rank``, the number of protected directions, and
    ``continual/{layer}/capacity_left``, the share of directions that are free; ``NullSpace`` adds
    ``continual/{layer}/null_share``, the share of old inputs' energy in these.

    Args:
        method: Such as ``GPM(threshold=0.97)``, the default, ``SGP()``, ``NullSpace()``,
            ``HebbianSubspace()`` or ``OGD()``.
        layers: Names of modules, or glob patterns of them, each with all inside it; what lies outside is free. All by
            default.
        loader: Data of the task that ends: batches, or a function that returns them. By default the training data.
        freeze: Whether biases, normalizations and what else inside cannot be projected stay as they are from the second
            task on, as published. They are named when the fit starts.
        outputs: How the module is called on a batch, ``outputs(module, batch)``; by default on its inputs.

    Raises:
        ValueError: If an argument is of the wrong kind.
        MisconfigurationException: When the fit starts, as :class:`~lightning_collapse.Constraint` does; if nothing can
            be projected, a weight is kept in half precision, in which it drifts by rounding, is sharded along its
            inputs, or has another width than when a task was learned; if an optimizer hands over other weights than it
            trains, or there are several for ``OGD``; if the module cannot be called or its data not be read again.

    References:
        See :class:`~lightning_collapse.projections.GPM` and the others there.

    Example::

        projection = Projection(GPM(threshold=0.97), layers=["body"])
        for task in tasks:
            Trainer(callbacks=[projection], max_epochs=5).fit(model, task)
    """

    consequence = "old tasks are not protected any more"

    def __init__(
        self,
        method: UpdateProjection | None = None,
        layers: Sequence[str] | None = None,
        loader: Loader | None = None,
        freeze: bool = True,
        outputs: Outputs | None = None,
    ) -> None:
        StepsAcrossTasks.__init__(self)
        Constraint.__init__(self)
        if method is not None and not isinstance(method, UpdateProjection):
            raise ValueError(f"`method` takes an object such as `GPM(threshold=0.97)`, got {method!r}.")
        if outputs is not None and not callable(outputs):
            raise ValueError(f"`outputs` takes a function of the module and a batch, got {outputs!r}.")
        check_layers(layers, "all layers")
        check_pass(loader, None, None)
        self.method = method or GPM()
        self.layers = layers
        self.loader = loader
        self.freeze = freeze
        self.outputs = outputs
        self._before: dict[str, Tensor] = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(method=type(self.method).__name__, layers=self.layers)

    @override
    def choose(self, pl_module: LightningModule) -> Mapping[str, Tensor]:
        try:
            self.method.start(pl_module, self.layers, self.freeze)
        except ValueError as error:
            raise MisconfigurationException(f"`Projection`: {error}") from error
        return self.method.parameters

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        TaskAware.on_fit_start(self, trainer, pl_module)
        check_forward(pl_module, self.outputs, "`Projection`", "outputs")
        for optimizer in trainer.optimizers:
            if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
                raise MisconfigurationException(
                    f"`Projection` acts on the weights of a step, and {type(optimizer).__name__} hands over others in"
                    " the end. Use an optimizer without `train()` and `eval()`, such as AdamW."
                )
        if self.method.joint and len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                f"`{type(self.method).__name__}` projects all parameters together, and there are"
                f" {len(trainer.optimizers)} optimizers. Use one, or `Projection(GPM())`."
            )
        Constraint.on_fit_start(self, trainer, pl_module)
        if self.task_index == 0:
            self._announce(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.loader is None:
            check_training_data(trainer, "`Projection`")
        with unsharded(pl_module):
            for name, parameter in pl_module.named_parameters():
                if hasattr(parameter, "full_tensor"):
                    raise MisconfigurationException(
                        f"`Projection` runs the module when a task ends, and `{name}` is a DTensor that `fully_shard`"
                        " has not made and cannot gather. Use `fully_shard`, or `strategy='ddp'`."
                    )
        self.choose(pl_module)  # once more: strategies that shard restore a checkpoint after the fit has started
        curves = [Point("continual", layer, "capacity_left", 0, 0.0).key for layer in self.method.readings()]
        require_available(trainer, curves, "a task ends, and so does the fit", "Projection")

    @override
    def prepare(self, weights: Mapping[str, Tensor]) -> None:
        if not self.method.learned:
            return
        missing = [name for name in weights if name not in self._before]
        self._before |= {name: local(weights[name]).detach().clone() for name in missing}
        kept = [name for name in weights if name not in missing]
        if kept:
            foreach.copy_([self._before[name] for name in kept], [local(weights[name]) for name in kept])

    @override
    def apply_all(self, weights: Mapping[str, Tensor]) -> None:
        self.method.project_(weights, self._before)

    @override
    def apply(self, name: str, weight: Tensor) -> None:
        self.apply_all({name: weight})

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._weights:
            return  # it has failed, and has said so
        with preserved_fit(trainer, pl_module, gradients=True):
            self.method.learn(pl_module, TaskBatches(trainer, self.loader), self.outputs)
        step, found = self._steps.step(trainer), self.method.readings().items()
        points = [Point("continual", layer, name, step, value) for layer, of in found for name, value in of.items()]
        publish(trainer, pl_module, points)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        TaskAware.on_exception(self, trainer, pl_module, exception)
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        TaskAware.teardown(self, trainer, pl_module, stage)
        self._stop()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "method": self.method.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.method.load_state_dict(state_dict["method"])

    @override
    def _stop(self) -> None:
        super()._stop()
        self._before = {}
        self.method.release()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_before": {}}

    def _announce(self, pl_module: LightningModule) -> None:
        frozen, parameters = self.method.frozen, self.method.parameters
        names = ", ".join(frozen[:8]) + (f" and {len(frozen) - 8} more" if len(frozen) > 8 else "")
        said = f"`Projection({type(self.method).__name__})`: {len(parameters) - len(frozen)} parameters are projected"
        said += f" from the second task on, and frozen are {names}" if frozen else " from the second task on"
        said += f". It takes {self.method.nbytes() / 2**20:.1f} MiB at most."
        if any(getattr(part, "track_running_stats", False) for part in pl_module.modules()):
            said += " Running statistics of batch normalization are not held, and change what old tasks get."
        rank_zero_info(said)


def _register() -> None:
    gpm, nscl = "Saha et al., ICLR 2021, arXiv 2103.09762", "Wang et al., CVPR 2021, arXiv 2103.07113"
    for name, span, collapsed, source in (
        ("rank", "0 to the width of the inputs", "the width: nothing new can be learned", gpm),
        ("capacity_left", "0 to 1", "near 0: nothing new can be learned", gpm),
        ("null_share", "0 to 1", "above 0.05: old outputs change", nscl),
    ):
        register_curve("continual", name, reads="layer inputs", range=span, collapsed=collapsed, source=source)


_register()
