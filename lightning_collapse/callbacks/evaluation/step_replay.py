"""Step replay: the running training step once more, with every module listened to, so that nothing else notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_collapse.monitoring.call_frames import CallFrames
from lightning_collapse.monitoring.step_frame import Frame
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.modules import hooks_ignored
from lightning_collapse.utilities.preserved_state import preserved_state
from lightning_collapse.utilities.random_states import own_random_states, restore_own_random_states
from lightning_collapse.utilities.trainer import loss_scale
from lightning_collapse.utilities.training_step import silent, unwrapped

_MOST = 64 * 1024**2
"""Bytes of buffers that are copied at every step; a model with more of them is repeated with those of the end."""


class StepReplay:
    """Keeps what a training step began with, and repeats it at once, before the weights are updated.

    Kept are references to the arguments, the random states of all generators and copies of the buffers. A repetition
    runs the module's own ``training_step``, without what other callbacks put around it, and its backward pass; weights,
    gradients, buffers, random states, modes, metrics and plain attributes of all submodules are put back, and nothing
    is logged by ``self.log``. What a step writes elsewhere (a file, a logger's own ``experiment``) is written twice.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._module = pl_module
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._random: dict[str, Any] = {}
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what a step begins with; waits for nothing."""
        self._call = args, kwargs
        self._random = own_random_states()
        buffers = [buffer for buffer in self._module.buffers() if not nn.parameter.is_lazy(buffer)]
        if sum(buffer.numel() * buffer.element_size() for buffer in buffers) <= _MOST:
            self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def forget(self) -> None:
        """Let go of the batch."""
        self._call, self._random, self._buffers = None, {}, []

    def run(self, trainer: Trainer, frames: CallFrames, step: int) -> Frame | None:
        """Repeat the step that is kept, measured by ``frames``; ``None`` if there is none that can be."""
        if self._call is None or any(hasattr(value, "__next__") for value in self._call[0]):  # of a loader that went on
            return None
        module = self._module
        with ExitStack() as stack:
            stack.callback(frames.close)
            stack.enter_context(hooks_ignored())
            stack.enter_context(preserved_attributes(module))
            stack.enter_context(preserved_state(module, autocast=True, training=True))
            stack.enter_context(silent(module))
            restore_own_random_states(self._random)
            with torch.no_grad():
                for buffer, value in self._buffers:
                    buffer.copy_(value)
            frames.open(step, everything=True)
            _repeat(trainer, module, frames, *self._call)
            return frames.close()
        return None


def _repeat(
    trainer: Trainer, module: LightningModule, frames: CallFrames, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Forward and backward, measured; an exception ends the one that it is raised in."""
    contained = Containment("FirstNonFinite")
    frames.begin((args, kwargs))
    frames.armed = True
    output: Any = None
    try:
        with trainer.precision_plugin.train_step_context():
            output = unwrapped(module, "training_step")(*args, **kwargs)
    except Exception:
        if frames.frame is not None:
            frames.frame.raised = True
        return
    finally:
        frames.armed = False
    frames.end(output)
    loss = output.get("loss") if isinstance(output, dict) else output
    weights = list(module.parameters())
    trained = [i for i, weight in enumerate(weights) if weight.requires_grad]
    if not isinstance(loss, Tensor) or not loss.requires_grad or not trained:
        return
    scale = loss_scale(trainer)
    loss = loss / trainer.accumulate_grad_batches * (1 if scale is None else scale)
    with contained("the backward pass of a step that is repeated", "only its forward pass is looked at"):
        # not `backward()`: hooks that reduce gradients, or step an optimizer, sit where they accumulate
        found = torch.autograd.grad(loss, [weights[i] for i in trained], allow_unused=True)
        gradients: list[Tensor | None] = [None] * len(weights)
        for i, gradient in zip(trained, found, strict=True):
            gradients[i] = gradient
        frames.note_gradients(gradients)


@contextmanager
def preserved_attributes(root: nn.Module) -> Iterator[None]:
    """Put back what a step changes in metrics, and which plain attributes of modules are which objects."""
    attributes = [(module, dict(vars(module))) for module in root.modules()]
    lists = [(value, list(value)) for _, own in attributes for value in own.values() if type(value) is list]
    metrics = [(module, _copied(module.metric_state)) for module in root.modules() if isinstance(module, Metric)]
    try:
        yield
    finally:
        for module, own in attributes:
            now = vars(module)
            for name in now.keys() - own.keys():
                del now[name]
            now.update(own)
        for value, items in lists:
            value[:] = items
        for metric, state in metrics:
            for name, value in state.items():
                setattr(metric, name, value)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else list(value) for name, value in state.items()}
