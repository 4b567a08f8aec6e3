"""Training-step scope: hooks are armed while the training step of a batch runs, and at no other time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from lightning_collapse.utilities.modules import hooks_ignored
from lightning_collapse.utilities.trainer import is_in_another_hook
from lightning_collapse.utilities.training_step import wrap_method


class Armable(Protocol):
    """Hooks that are switched on and off, such as :class:`~lightning_collapse.monitoring.FeatureHooks`."""

    armed: bool


class StepScope:
    """Arms hooks for the forward passes that are the training step's own.

    Other callbacks run the model too, before the step of a batch and after it: an evaluation, a probe, a picture. What
    they compute is no training row. All that runs inside ``training_step`` is one, whatever the optimization, with or
    without gradient: both networks of a GAN, the target network of BYOL; but not what callbacks do in hooks that
    Lightning calls from inside the step under manual optimization. Where an optimizer calls its closure several times a
    batch (LBFGS), and Lightning the step, the first time counts: it sees the weights that the batch began with.

    Args:
        module: The ``LightningModule``; its step is wrapped until :meth:`remove` is called. Of a module without a
            ``training_step``, which something else trains, the first forward pass after a request is the step.

    Example:
        >>> from types import SimpleNamespace
        >>> class Lit(nn.Module):
        ...     def training_step(self, batch):
        ...         return hooks.armed
        >>> lit, hooks = Lit(), SimpleNamespace(armed=False)
        >>> scope = StepScope(lit)
        >>> scope.request(hooks)
        >>> hooks.armed, lit.training_step(0), lit.training_step(0), hooks.armed
        (False, True, False, False)
    """

    def __init__(self, module: nn.Module) -> None:
        self._requested: tuple[Armable, ...] = ()
        self._module = module
        step = "training_step" if hasattr(module, "training_step") else "forward"
        self._unwrap = wrap_method(module, step, self._around)

    def request(self, *hooks: Armable) -> None:
        """Have these hooks, and no others, armed while the next training step runs."""
        self._requested = hooks

    def remove(self) -> None:
        """Take the wrapper off; may be called twice."""
        self._requested = ()
        self._unwrap()

    def _around(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._requested:
            return step(*args, **kwargs)
        hooks, self._requested = self._requested, ()
        for hook in hooks:
            hook.armed = True
        try:
            with hooks_ignored(lambda: is_in_another_hook(self._module)):
                return step(*args, **kwargs)
        finally:
            for hook in reversed(hooks):
                hook.armed = False
