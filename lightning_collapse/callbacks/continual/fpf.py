"""Forgetting prioritized finetuning (FPF): when a task ends, tune the modules that have moved most on kept samples."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from inspect import signature
from typing import Any, TypeVar, cast

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.continual.forgetting_monitor import select_top, state_of
from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.evaluation.step_replay import preserved_attributes
from lightning_collapse.callbacks.evaluation.task_batches import TaskBatches
from lightning_collapse.monitoring.parameter_snapshot import ParameterSnapshot, mean_changes
from lightning_collapse.utilities.arguments import require_positive, require_whole
from lightning_collapse.utilities.batch import batch_size
from lightning_collapse.utilities.distributed import all_reduce_sum, from_all_processes, process_rank
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.modules import clean_name, hooks_ignored
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.trainer import ends_step, logging_step, loss_scale, planned_steps, refuse_sharded
from lightning_collapse.utilities.training_step import silent, unwrapped

T = TypeVar("T")


class FPF(TaskAware):
    r"""Tunes the few modules that forget on a balanced buffer, when a task ends (FPF) or several times in it (k-FPF).

    Modules are ranked by how far they have moved since the tuning before, or since the fit began,
    :math:`d_\ell = \|\theta_\ell - \theta_\ell^{\text{before}}\|_1 / |\theta_\ell|`, those of the running statistics of
    a normalization beside those of its weights, as :class:`~lightning_collapse.ForgettingMonitor` draws them. The top
    ``fraction`` is then trained by gradient descent on ``data``, through the module's own ``training_step`` under the
    trainer's precision; all else is frozen, the statistics of other normalizations too. The authors choose by a
    threshold and not by a share [1].

    The training does not notice: optimizers, schedules, counters, gradients, modes, ``requires_grad``, random states
    and metrics are as they were, nothing is logged, and what callbacks add to a loss is not added here. Gradients are
    means over the samples of all processes. One that has none takes its steps on a batch of another, for the sums
    within a step and for running statistics; it counts for nothing. Kept, and in the state, is one copy of buffers and
    of parameters that are trained; frozen ones are neither copied nor ranked. Put it before callbacks that measure or
    remember a task when that ends.

    Args:
        data: Batches as ``training_step`` takes them, or a function that returns them, such as a method of a replay
            buffer; about equally many samples of every class. They are read again until there were enough.
        fraction: Share of the modules to tune, rounded up.
        iterations: Steps of a tuning.
        lr: Their learning rate.
        times: How often in a fit, at equal intervals, the last one when its task ends.

    Attributes:
        tuned: Names of the modules that were tuned last, the most sensitive first; ``.buffers`` ends the names of
            running statistics.

    Raises:
        ValueError: If ``data`` are no batches, or a number is out of range.
        MisconfigurationException: When the fit starts, for manual optimization, a ``training_step`` that takes an
            iterator, sharded parameters, a schedule-free optimizer, or with ``times`` above 1 for a fit of unknown
            length or with fewer steps.

    References:
        [1] Zhao et al., *Does continual learning equally forget all parameters?*, ICML 2023.
        https://arxiv.org/abs/2304.04158

    Example::

        fpf = FPF(train_loaders[0], iterations=100)  # or the batches of a replay buffer
        fit_tasks(lambda: Trainer(max_epochs=5, callbacks=[fpf, metrics]), model, tasks)
    """

    changes_weights = True

    def __init__(
        self, data: Loader, fraction: float = 0.2, iterations: int = 300, lr: float = 0.01, times: int = 1
    ) -> None:
        super().__init__()
        wrong = isinstance(data, str | Mapping | Iterator) or not (isinstance(data, Iterable) or callable(data))
        if wrong or (isinstance(data, Sequence) and not data):
            raise ValueError(
                "`data` takes batches that can be read again and again, or a function without arguments that returns"
                f" them, got {data!r}."
            )
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be above 0 and at most 1, got {fraction}.")
        require_whole(1, iterations=iterations, times=times)
        require_positive(lr=lr)
        self.data, self.fraction, self.iterations, self.lr, self.times = data, fraction, iterations, lr, times
        self.tuned: list[str] = []
        self._tensors: dict[str, Tensor] = {}
        self._groups: dict[str, list[str]] = {}
        self._frozen: dict[str, Tensor] = {}
        self._snapshot: ParameterSnapshot | None = None
        self._restored: dict[str, Tensor] | None = None
        self._tunings = 0

    @override
    def _without_fit(self) -> dict[str, Any]:
        return super()._without_fit() | {"_tensors": {}, "_frozen": {}}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        step = signature(unwrapped(pl_module, "training_step")).parameters
        if not pl_module.automatic_optimization or "dataloader_iter" in step:
            raise MisconfigurationException(
                f"`FPF` takes gradients of the loss that `training_step` returns of a batch, and that of"
                f" {type(pl_module).__name__} steps its optimizers itself or takes an iterator. Return the loss of a"
                " batch, with `automatic_optimization = True`."
            )
        refuse_sharded(trainer, pl_module, "FPF", "tunes whole parameters")
        self._tensors, self._groups, self._frozen = {}, {}, {}
        for name, tensor, suffix in state_of(pl_module):
            if suffix or tensor.requires_grad:
                self._follow(name, tensor, suffix)
            else:  # beside adapters a whole model, which stays where it is
                self._frozen[name] = tensor

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        steps = planned_steps(trainer)
        if self.times > 1 and (steps is None or steps < self.times):
            raise MisconfigurationException(
                f"`FPF(times={self.times})` tunes at equal intervals of a fit, and this one has"
                f" {'no length that is known' if steps is None else f'{steps} steps'}. Set `max_steps`, or `times=1`."
            )
        if not self._trained:
            self._restored = None
        self._snapshot = ParameterSnapshot(self._tensors, self._restored)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        late = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        for name in late:
            assert self._snapshot is not None
            self._follow(name, parameter := self._frozen.pop(name))
            self._snapshot.add({name: parameter}, self._restored)
        if self._restored:  # of what is frozen again at first in a resumed fit it waits
            self._restored = {name: self._restored[name] for name in self._frozen.keys() & self._restored.keys()}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.times == 1 or trainer.fast_dev_run or not ends_step(trainer):
            return
        step, steps = logging_step(trainer) + 1, planned_steps(trainer)
        if steps and step < steps and step * self.times // steps > (step - 1) * self.times // steps:
            with self.containment("tuning within a task", "weights stay as they were trained"):
                self._tune(trainer, pl_module)

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tune(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._tensors, self._frozen = {}, {}

    @override
    def state_dict(self) -> dict[str, Any]:
        snapshot = None if self._snapshot is None else self._snapshot.state_dict()
        return {**super().state_dict(), "tuned": list(self.tuned), "tunings": self._tunings, "snapshot": snapshot}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.tuned, self._tunings = state_dict["tuned"], state_dict["tunings"]
        self._restored = state_dict["snapshot"]

    def _follow(self, name: str, tensor: Tensor, suffix: str = "") -> None:
        self._tensors[name] = tensor
        owner = clean_name(name).rpartition(".")[0] or "model"
        self._groups.setdefault(owner + suffix, []).append(name)

    def _tune(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank modules and tune the first of them; weights come back if that fails. Collective."""
        assert self._snapshot is not None
        top = select_top(mean_changes(self._snapshot, self._tensors, self._groups), self.fraction)
        names = {name for group in top for name in self._groups[group]}
        weights = [p for n, p in pl_module.named_parameters() if n in names and p.requires_grad and not p.is_complex()]
        before = [weight.detach().clone() for weight in weights]
        try:
            with (
                preserved_state(pl_module, autocast=True, training=True),
                hooks_ignored(),
                preserved_attributes(pl_module),
                silent(pl_module),
            ):
                for seed in (torch.manual_seed, random.seed, np.random.seed):  # the same when it is repeated
                    seed(1009 * self._tunings + process_rank())
                buffers = _freeze(pl_module, weights, {group.removesuffix(".buffers") for group in top})
                self._descend(trainer, pl_module, weights)
                values = [getattr(module, name).clone() for module, name in buffers]
        except Exception:
            for weight, value in zip(weights, before, strict=True):
                weight.data.copy_(value)
            raise
        finally:
            self._tunings += 1
        for (module, name), value in zip(buffers, values, strict=True):
            getattr(module, name).data.copy_(value)
        self.tuned = top
        self._snapshot, self._restored = ParameterSnapshot(self._tensors), None

    def _descend(self, trainer: Trainer, pl_module: LightningModule, weights: list[nn.Parameter]) -> None:
        sizes = [weight.numel() for weight in weights]
        with closing(self._batches(trainer)) as batches:
            batch = _on_all(batches.__next__)
            lent = _first_of_another(batch, pl_module.device)
            for index in range(self.iterations):
                batch = _on_all(batches.__next__) if index else batch
                here = lent if batch is None else batch
                rows, gradient = _on_all(partial(_gradient, trainer, pl_module, here, index, weights))
                if batch is None:
                    rows, gradient = 0, torch.zeros_like(gradient)
                total = all_reduce_sum(torch.cat([gradient * rows, gradient.new_tensor([rows])]))
                mean = total[:-1] / total[-1]  # of no number where there were no samples
                parts = torch.split(torch.where(mean.sum().isfinite(), mean, 0.0), sizes)
                for weight, part in zip(weights, parts, strict=True):
                    weight.data.sub_((self.lr * part.view_as(weight)).to(weight.dtype))

    def _batches(self, trainer: Trainer) -> Generator[Any, None, None]:
        """Those with rows, again and again; ``None`` for ever where there is none."""
        passes, found = 0, True
        while found:
            passes, found = passes + 1, False
            for batch in TaskBatches(trainer, self.data):
                if batch_size(batch):
                    found = True
                    yield batch
        if passes > 1:
            raise RuntimeError("`data` holds no batch any more")
        while True:
            yield None


def _on_all(function: Callable[[], T]) -> T:
    """What a function returns, or on every process an error if it has failed on one; collective."""
    result, problem = None, ""
    try:
        result = function()
    except Exception as error:
        problem = repr(error)
    if problems := [problem for problem in from_all_processes(problem) if problem]:
        raise RuntimeError(problems[0])
    return cast(T, result)


def _first_of_another(batch: Any, device: torch.device) -> Any:
    """The batch of the first process that has one, on those that have none; collective.

    Raises:
        RuntimeError: On every process, if none has one.
    """
    there = from_all_processes(batch is not None)
    if all(there):
        return None
    if not any(there):
        raise RuntimeError("`data` holds no batch: fill the buffer before the task ends")
    first = there.index(True)
    packed = _on_all(lambda: pickle.dumps(move_data_to_device(batch, "cpu")) if process_rank() == first else b"")
    lent = from_all_processes(packed)[first]
    return None if batch is not None else move_data_to_device(pickle.loads(lent), device)


def _gradient(
    trainer: Trainer, pl_module: LightningModule, batch: Any, index: int, weights: list[nn.Parameter]
) -> tuple[int, Tensor]:
    """Samples, and the gradient of all weights in one vector, of one batch of this process."""
    step = unwrapped(pl_module, "training_step")
    with trainer.precision_plugin.train_step_context():
        output = step(batch, *([index] if len(signature(step).parameters) > 1 else []))
    loss = output.get("loss") if isinstance(output, Mapping) else output
    rows = 0 if loss is None else batch_size(batch)
    scale = loss_scale(trainer)
    found: Sequence[Tensor | None] = [None] * len(weights)
    if isinstance(loss, Tensor) and loss.requires_grad and weights:
        # not `backward()`: hooks that reduce gradients sit where they accumulate
        found = torch.autograd.grad(loss if scale is None else loss * scale, weights, allow_unused=True)
    dense = [torch.zeros_like(w) if g is None else g.to_dense() for g, w in zip(found, weights, strict=True)]
    parts = [part.flatten().to(torch.promote_types(part.dtype, torch.float32)) for part in dense]
    flat = torch.cat(parts) if parts else torch.zeros(0, device=pl_module.device)
    return rows, flat if scale is None else flat / scale


def _freeze(pl_module: LightningModule, weights: list[nn.Parameter], moving: set[str]) -> list[tuple[nn.Module, str]]:
    """Leave alone all but some weights and the buffers of some modules, which are returned."""
    chosen = {id(weight) for weight in weights}
    for parameter in pl_module.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    buffers = []
    for name, module in pl_module.named_modules():
        own = [key for key, buffer in module._buffers.items() if buffer is not None]
        if (clean_name(name) or "model") in moving:
            buffers += [(module, key) for key in own]
        elif any(module._buffers[key].is_floating_point() for key in own):  # a normalization goes by its statistics
            module.training = False
    return buffers
