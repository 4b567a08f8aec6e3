"""Knowledge distillation from the network before a task: learning without forgetting (LwF)."""

from collections.abc import Callable
from random import Random
from typing import Any, Literal, get_args

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.continual.replay import rehearsal_batch
from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.evaluation.evaluation_pass import has_forward
from lightning_collapse.callbacks.loss_terms.auxiliary_loss import AuxiliaryLoss, one_name
from lightning_collapse.callbacks.loss_terms.teacher import Call, Teacher, named_parts
from lightning_collapse.losses.base import TooFewRowsError, nothing
from lightning_collapse.losses.distillation import (
    distillation_loss,
    feature_distillation_loss,
    squared_distillation_loss,
)
from lightning_collapse.losses.schedule import Weight
from lightning_collapse.replay.replay_buffer import ReplayBuffer
from lightning_collapse.utilities.arguments import require_not_negative, require_one_of, require_positive
from lightning_collapse.utilities.batch import batch_size
from lightning_collapse.utilities.copies import checksum, fill, frozen_copy, frozen_parameters, tensors_of
from lightning_collapse.utilities.distributed import process_rank
from lightning_collapse.utilities.hooks import ModuleHook
from lightning_collapse.utilities.modules import in_backward, is_channels_first
from lightning_collapse.utilities.private_torch import tree_leaves
from lightning_collapse.utilities.targets import call_on
from lightning_collapse.utilities.trainer import is_sharded

Kind = Literal["logits", "features", "squared"]
TERMS = {"logits": "divergence", "features": "cosine_distance", "squared": "squared_distance"}
"""What the curve without the weight is called."""


class Distillation(AuxiliaryLoss, TaskAware):
    """Learning without forgetting: from the second task on, a frozen copy of the network before it is the teacher.

    When a task ends, the module is copied, in eval mode and without gradients. From then on every ``training_step``
    has the teacher answer on the inputs that the student was called with, under the same autocast, and adds
    ``weight`` times :func:`~lightning_collapse.losses.distillation_loss` of the two, or
    :func:`~lightning_collapse.losses.feature_distillation_loss`. Of a head that has grown since, the old classes, which
    come first, are compared. The teacher draws no random number of the run, its BatchNorm statistics stand still, and
    it is no part of the model: not of its ``state_dict``, its optimizers or its data-parallel wrapper. Its weights are
    in the state of the callback, so a resumed run has it too. Hooks of the module are not copied. Nor are
    parameters that were frozen, and unchanged, all through the fit: student and teacher share them, in memory and in a
    checkpoint, so that beside a large model with adapters the teacher is as large as the adapters. One that is trained
    later is copied before.

    What is compared is what the module's own ``forward`` returns where ``training_step`` calls it, ``self(x)``, or what
    a ``layer`` returns. The teacher is called as the student was: the outermost module that was called around the
    layer, on the same arguments. Where that does not hold the whole path from the inputs, as in
    ``self.head(self.encoder(x))`` with ``layer="head"``, say with ``outputs`` how the answer to a batch is had. Tokens
    ``(N, L, D)`` are a row each, maps ``(N, C, *spatial)`` are averaged over space; with ``kind="squared"`` all numbers
    of a sample are one row.

    With ``replay`` both answer on rehearsal in place of the training batch, as many rows as that has: rows of a buffer,
    which a :class:`~lightning_collapse.Replay` fills, or what a function makes of the teacher, as in generative
    distillation. This is one more forward pass of the student, in training mode, through ``forward`` or ``outputs``.
    The random numbers of such a function are its own, others in every step.

    At logging steps it publishes ``regularizer/{name}/value``, which is what was added to the loss, and without the
    weight ``regularizer/{name}/divergence``, of features ``cosine_distance``, or ``squared_distance``.

    Args:
        layer: Name of the layer, or a glob that matches exactly one; ``None`` for ``forward`` of the module.
        weight: Factor of the loss, 1 in the paper: a number, or a function of the step.
        temperature: Of the softened probabilities, 2 in the paper.
        kind: ``"logits"``, ``"features"`` for their directions, or ``"squared"`` for
            ``squared_distillation_loss``.
        outputs: Returns the output of a module, the teacher, on a batch; ``None`` repeats the calls of the student.
        name: Name of the curves.
        replay: A ``ReplayBuffer``, or a function of the teacher and a number of rows
            that returns a batch.
        on: The older name of ``layer``, which YAML 1.1 reads as a boolean.

    Raises:
        ValueError: If ``temperature`` is not positive, ``kind`` is none of these or ``replay`` is neither.
        MisconfigurationException: At the start of the fit, if the module optimizes by hand, is sharded or cannot be
            copied, if there is no such layer or no ``forward``, or if the name is taken; at the first training step, if
            the layer did not run, or did not run on inputs that the teacher can be given.

    References:
        Li & Hoiem, *Learning without Forgetting*, ECCV 2016. https://arxiv.org/abs/1606.09282

    Example::

        lwf = Distillation()
        for task in tasks:
            Trainer(callbacks=[lwf]).fit(model, task)
    """

    remedy = "Add `distillation_loss(logits, teacher_logits)` of `lightning_collapse.losses` to your loss instead."

    def __init__(
        self,
        layer: str | None = None,
        weight: Weight = 1.0,
        temperature: float = 2.0,
        kind: Kind = "logits",
        outputs: Callable[[Any, Any], Any] | None = None,
        name: str = "distillation",
        *,
        replay: ReplayBuffer | Callable[[Any, int], Any] | None = None,
        on: str | None = None,
    ) -> None:
        require_positive(temperature=temperature)
        require_one_of(get_args(Kind), kind=kind)
        if not (replay is None or callable(replay) or isinstance(replay, ReplayBuffer)):
            raise ValueError(f"`replay` must be a `ReplayBuffer` or a function, got {replay!r:.80}.")
        super().__init__(one_name(layer, on), weight, name)
        if not callable(weight):
            require_not_negative(weight=weight)
        self.temperature = temperature
        self.kind = kind
        self.outputs = outputs
        self.replay = replay
        self._teacher: Teacher | None = None
        self._saved: dict[str, Tensor] | None = None
        self._frozen: dict[str, int] = {}  # checksums when the fit began
        self._shared: dict[str, int] = {}  # of what the teacher has of the student
        self._call: Call | None = None
        self._calls: list[Call] = []
        self._no_rows: Tensor | None = None  # set by the first step that went well

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | self._without_fit()

    @override
    def hook(self, trainer: Trainer, pl_module: LightningModule) -> list[Callable[[], None]]:
        name, layer = self._layer(pl_module)
        if is_sharded(trainer, pl_module):
            raise MisconfigurationException(
                "`Distillation` copies the module, and no process holds the whole of a sharded one. Use DDP, or call"
                " `distillation_loss` of `lightning_collapse.losses` with a teacher of your own."
            )
        self._channels_first = is_channels_first(layer)
        self._no_rows = None
        frozen = frozen_parameters(pl_module)
        self._frozen = checksum(frozen)
        if self._saved is not None or self._teacher is None:
            try:
                copy = frozen_copy(pl_module, frozen.values())  # now, that it fails before the training of a task
                if self._saved is not None:
                    fill(copy, self._saved)
                    self._teacher, self._saved = Teacher(copy, self._shared), None
            except Exception as error:
                raise MisconfigurationException(
                    f"`Distillation` needs a copy of {type(pl_module).__name__} as it was, and has none: {error!r:.400}"
                ) from error
        if self._teacher is not None:
            self._check_shared(self._teacher)
            self._teacher.hook(pl_module.device, name, self.rows_of)
        around = {key: part for key, part in named_parts(pl_module).items() if any(m is layer for m in part.modules())}
        if self.outputs is not None:
            around = {name: layer}
        hooks = [ModuleHook(layer, function=self._capture)]
        for key, part in around.items():
            hooks.append(ModuleHook(part, before=True, function=self._enter(key)))
            hooks.append(ModuleHook(part, function=self._leave(key)))  # after `_capture`
        return [hook.remove for hook in hooks]

    @override
    def reset(self) -> None:
        self._call = None
        self._calls.clear()

    @override
    def captured(self) -> list[Tensor]:
        return [row for call in self._calls for row in call.rows if row is not None]

    @override
    def rows_of(self, output: Any) -> Tensor | None:
        if self.kind != "squared":
            return super().rows_of(output)
        whole = isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 0
        return output.reshape(len(output), -1).clone() if whole else None

    @override
    def term(self, trainer: Trainer, batch: Any) -> Tensor | None:
        if self._teacher is None and (self.replay is not None or self._no_rows is not None):
            return None
        if self._teacher is not None:
            self._keep_apart(self._teacher)
        student: Tensor | None = None
        teacher: Tensor | None = None
        if self.replay is not None and self._teacher is not None:
            batch = self._rehearsal(trainer, self._teacher, batch_size(batch))
            if batch is None:  # here, and others may have rows
                none = torch.zeros(0, 1, device=trainer.strategy.root_device)
                return self._evaluate(trainer, none.clone().requires_grad_(), none)
            student = self._student_on(trainer.lightning_module, batch)
        problem = self._problem() if student is None else None
        if problem is None:
            student = torch.cat(self.captured()) if student is None else student
            if self._teacher is not None:
                teacher = self._answer(self._teacher, batch)
                problem = self._mismatch(student, teacher)
        if problem is not None and self._no_rows is None:
            raise MisconfigurationException(problem)
        if problem is not None:
            self.warn_once("skipped", f"{problem} Steps like this one go without the term.")
            # this process has no rows, but the others may have, and wait for it in their sums
            student = teacher = self._no_rows
        elif student is not None:
            self._no_rows = student.detach().new_empty(0, student.shape[1]).requires_grad_(student.requires_grad)
        return None if student is None or teacher is None else self._evaluate(trainer, student, teacher)

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._teacher = None  # first, for its memory
        frozen = frozen_parameters(pl_module)
        self._shared = {name: c for name, c in checksum(frozen).items() if self._frozen.get(name) == c}
        try:
            copy = frozen_copy(pl_module, [frozen[name] for name in self._shared])
        except Exception as error:
            rank_zero_warn(f"`Distillation` could not copy the module, so there is no teacher: {error!r:.400}")
            return
        for buffer in copy.buffers():  # those of BatchNorm differ between processes
            buffer.copy_(trainer.strategy.broadcast(buffer))
        self._teacher = Teacher(copy, self._shared)
        self._teacher.hook(pl_module.device, self._layer(pl_module)[0], self.rows_of)

    @override
    def state_dict(self) -> dict[str, Any]:
        teacher = self._saved
        if self._teacher is not None:
            named = tensors_of(self._teacher.module)
            teacher = {name: tensor for name, tensor in named.items() if name not in self._teacher.shared}
        return {**super().state_dict(), "teacher": teacher, "shared": dict(self._shared)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._teacher, self._saved = None, state_dict["teacher"]
        self._shared = dict(state_dict.get("shared", {}))  # version 0.1.0 has none

    def _check_shared(self, teacher: Teacher) -> None:
        """Whether what is shared is still what the task ended with."""
        now = checksum(teacher.shared)
        changed = [name for name, number in now.items() if self._shared[name] != number]
        self._shared = now
        if changed:
            self.warn_once(
                "changed",
                f"`Distillation`: {changed[0]} and {len(changed) - 1} others are frozen, so that the teacher has them"
                " of the model, and they are not what they were when the task ended. Load the model with the weights"
                " that it had, or unfreeze what is to change.",
            )

    def _keep_apart(self, teacher: Teacher) -> None:
        """Copy what the student has begun to train, before its first step."""
        trained = {name: p.detach() for name, p in teacher.shared.items() if p.requires_grad}
        if trained:
            fill(teacher.module, trained)
            for name in trained:
                del teacher.shared[name], self._shared[name]

    def _layer(self, pl_module: LightningModule) -> tuple[str, nn.Module]:
        if self.layer is not None:
            return self.find(pl_module, self.layer)
        if not (has_forward(pl_module) or (self.replay is not None and self.outputs is not None)):
            raise MisconfigurationException(
                f"`Distillation` compares what `forward` returns, and {type(pl_module).__name__} has none. Write one"
                " and call it in `training_step`, or name a layer: `Distillation(layer=...)`."
            )
        return "", pl_module

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._open and self._call is None:
                self._call = Call(name, args, kwargs, [])

        return enter

    def _capture(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._call is not None and torch.is_grad_enabled() and not in_backward():
            self._call.rows.append(self.rows_of(output))

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._call is not None and self._call.name == name:
                if self._call.rows:
                    self._calls.append(self._call)
                self._call = None

        return leave

    def _rehearsal(self, trainer: Trainer, teacher: Teacher, n: int) -> Any:
        """What both answer on in place of the training batch; ``None`` where a buffer has no rows."""
        if isinstance(self.replay, ReplayBuffer):
            return rehearsal_batch(trainer, self.replay, n)
        assert self.replay is not None
        device = trainer.strategy.root_device
        own = Random(f"rehearsal {self.task_index} {trainer.fit_loop.total_batch_idx} {process_rank()}").getrandbits(63)
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(own)
            return move_data_to_device(self.replay(teacher.module, n), device)

    def _student_on(self, module: LightningModule, batch: Any) -> Tensor | None:
        """Have the student answer on rehearsal; ``None`` where its calls were captured."""
        self.reset()  # of what it answered in the step
        if self.outputs is not None:
            return self.rows_of(self.outputs(module, batch))
        self._open = True
        try:
            call_on(module, batch)
        finally:
            self._open = False
        return None

    def _answer(self, teacher: Teacher, batch: Any) -> Tensor | None:
        """What the teacher returns where the student was captured."""
        device = next((p.device for p in teacher.module.parameters()), torch.device("cpu"))
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if self.outputs is not None:
                return self.rows_of(self.outputs(teacher.module, batch))
            with teacher.captured() as rows:
                for call in self._calls:
                    teacher.parts[call.name](*call.args, **call.kwargs)
                present = [row for row in rows if row is not None]
        return torch.cat(present) if present else None

    def _evaluate(self, trainer: Trainer, student: Tensor, teacher: Tensor) -> Tensor:
        (student_rows, teacher_rows), counts = self._finite.select([student, teacher])
        try:
            if self.kind == "logits":
                value = distillation_loss(student_rows, teacher_rows, self.temperature)
            else:
                loss = feature_distillation_loss if self.kind == "features" else squared_distillation_loss
                value = loss(student_rows, teacher_rows)
        except TooFewRowsError as error:
            said = str(error)
            if isinstance(self.replay, ReplayBuffer) and not len(self.replay):
                said = (
                    "`Distillation`: its `replay` holds no rows. Put `Replay(buffer)` among the callbacks, or fill it."
                )
            self.warn_once("skipped", f"{said} Steps like this one go without the term.")
            return nothing(student)
        value = value if counts is None else torch.where(counts, value, torch.zeros_like(value))
        return self.add(trainer, value, {TERMS[self.kind]: value})

    def _problem(self) -> str | None:
        """Why the student's calls are none that a teacher can repeat, and what to do."""
        what = "its `forward`" if self.layer is None else f"{self.layer!r}"
        if not self._calls:
            return (
                f"`Distillation(layer={self.layer!r})` needs the module to call {what} with gradient in"
                " `training_step`, and it did not. Call it there, or name another with `layer`."
            )
        if any(row is None for call in self._calls for row in call.rows):
            why = self._unreadable
            return f"`Distillation(layer={self.layer!r})` needs a floating-point tensor, and {what} returned none{why}."
        if self.outputs is None and any(
            isinstance(leaf, Tensor) and leaf.grad_fn is not None
            for call in self._calls
            for leaf in tree_leaves((call.args, call.kwargs))
        ):
            return (
                f"`Distillation(layer={self.layer!r})`: {what} was called on what other layers had computed, and the"
                " teacher must start from the inputs. Say how: `outputs=lambda module, batch: module.head("
                "module.encoder(batch[0]))`; or call all of it as one module."
            )
        return None

    def _mismatch(self, student: Tensor, teacher: Tensor | None) -> str | None:
        """Why the two cannot be compared."""
        if teacher is None:
            return f"`Distillation(layer={self.layer!r})`: the teacher returned no floating-point tensor."
        more = student.shape[1] > teacher.shape[1] and self.kind == "logits"  # a head that has grown
        if len(student) != len(teacher) or (student.shape[1] != teacher.shape[1] and not more):
            return (
                f"`Distillation(layer={self.layer!r})` cannot compare {tuple(student.shape)} of the student with"
                f" {tuple(teacher.shape)} of the teacher: the same rows are needed, and"
                f" {'no fewer columns' if self.kind == 'logits' else 'as many columns'}."
            )
        return None
