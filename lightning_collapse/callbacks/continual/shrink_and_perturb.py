"""Shrink and perturb: take a part of the way back to a fresh start, so that a warm one does not generalize worse."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.utilities.copies import bare_copy
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.trainer import logging_step, refuse_sharded

_RESETS = ("reset_parameters", "_reset_parameters")  # the latter of `nn.MultiheadAttention` and `nn.Transformer`


class ShrinkAndPerturb(TaskAware):
    r"""Shrink the weights and add a bit of a fresh network, before every task but the first [1].

    .. math:: \theta \leftarrow s\,\theta + p\,\theta_{\text{fresh}}

    Training that goes on from the weights of an earlier task generalizes worse than a fresh start; smaller weights with
    a little noise keep what was learned and lose the handicap. ``shrink=0, perturb=1`` is a fresh start and
    ``shrink=1, perturb=0`` a warm one. :math:`\theta_{\text{fresh}}` is not noise of one size but a newly initialized
    network, as in the code of [1], which applies it to all weights, those of normalization too.

    Weights change right before the first training step that they are for: what is validated, tested or saved when a
    task ends is what was trained. Only parameters that require a gradient change; buffers, such as running statistics,
    stay. So does the state of optimizers, which a new ``Trainer`` makes anew, as the paper does; with
    ``every_n_steps``, or where a task ends within a fit, they go on from it.

    Fresh weights are drawn with a seed of their own, another one each time and the same on every process; random
    numbers of the run are as they would be without.

    Args:
        shrink: ``s``; 0.4 in the paper.
        perturb: ``p``; 0.1 in the paper.
        every_n_steps: Optimizer steps between two times, in place of the starts of tasks.
        initialize: Returns a fresh module with the parameters of the trained one by name, for instance
            ``lambda: LitModel(width=64)``. ``None`` has each submodule of a copy run its ``reset_parameters``.
        seed: Of all that is drawn.

    Raises:
        ValueError: If ``shrink`` or ``perturb`` is negative, or ``every_n_steps`` not positive.
        MisconfigurationException: At the start of the fit, if parameters are sharded, if a module has parameters and no
            ``reset_parameters`` to make them anew, or if those of ``initialize`` are others.

    References:
        [1] Ash & Adams, *On Warm-Starting Neural Network Training*, NeurIPS 2020. https://arxiv.org/abs/1910.08475

    Example::

        shrink = ShrinkAndPerturb()
        for task in tasks:
            Trainer(callbacks=[shrink]).fit(model, task)
    """

    def __init__(
        self,
        shrink: float = 0.4,
        perturb: float = 0.1,
        every_n_steps: int | None = None,
        initialize: Callable[[], nn.Module] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, factor in (("shrink", shrink), ("perturb", perturb)):
            if not 0 <= factor < float("inf"):
                raise ValueError(f"`{name}` must be finite and not negative, got {factor}.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"`every_n_steps` must be at least 1, or None for the starts of tasks, got {every_n_steps}."
            )
        self.shrink = shrink
        self.perturb = perturb
        self.every_n_steps = every_n_steps
        self.initialize = initialize
        self.seed = seed
        self._times = 0
        self._last = 0  # the task, or the step, that was last prepared

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        refuse_sharded(trainer, pl_module, "ShrinkAndPerturb", "makes a fresh network")
        if self.initialize is None:
            _require_resets(pl_module)
        try:
            fresh = self._fresh(pl_module)  # now, that it fails before the training of a task and not after it
        except Exception as error:
            raise MisconfigurationException(
                f"`ShrinkAndPerturb` could not make {type(pl_module).__name__} anew: {error!r:.400}. Pass a function"
                " that returns a fresh module: `initialize=lambda: LitModel(...)`."
            ) from error
        _require_same(pl_module, fresh)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.every_n_steps is not None and logging_step(trainer) == 0:
            self._last = 0  # of an earlier trainer

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = self.task_index
        if self.every_n_steps is not None:
            step = logging_step(trainer)
            now = step - step % self.every_n_steps
        if now > self._last:
            self._last = now
            with self.containment("making the network anew", "its weights stay as they are"):
                self._apply(pl_module)

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing yet: weights change when the next task starts."""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "times": self._times, "last": self._last}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._times, self._last = state_dict["times"], state_dict["last"]

    @torch.no_grad()
    def _apply(self, pl_module: LightningModule) -> None:
        trained = _trained(pl_module)
        fresh = _trained_like(self._fresh(pl_module), trained)
        weights = list(trained.values())
        foreach.mul_(weights, self.shrink)
        foreach.add_(weights, fresh, alpha=self.perturb)
        self._times += 1

    def _fresh(self, pl_module: LightningModule) -> nn.Module:
        """A newly initialized network of the next seed."""
        with isolate_rng():
            # far from the small seeds of runs: one that started with the same would get its own start again
            torch.manual_seed(Random(f"shrink and perturb {self.seed} {self._times}").getrandbits(63))
            if self.initialize is not None:
                return self.initialize()
            return bare_copy(pl_module).apply(_reset)  # children before what holds them


def _trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _trained_like(fresh: nn.Module, trained: dict[str, Tensor]) -> list[Tensor]:
    """The parameters of a fresh module where, and in the type in which, those in training are."""
    found = dict(fresh.named_parameters())
    return [found[name].to(device=weight.device, dtype=weight.dtype) for name, weight in trained.items()]


@torch.no_grad()
def _reset(module: nn.Module) -> None:
    reset = _reset_of(module)
    if reset is not None:
        reset()


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    return next((getattr(module, name) for name in _RESETS if callable(getattr(module, name, None))), None)


def _require_resets(module: nn.Module) -> None:
    missing = [
        f"{name or 'the module itself'} ({type(part).__name__})"
        for name, part in module.named_modules()
        if any(p.requires_grad for p in part.parameters(recurse=False)) and _reset_of(part) is None
    ]
    if missing:
        raise MisconfigurationException(
            f"`ShrinkAndPerturb` cannot make the parameters of {', '.join(missing)} anew: no `reset_parameters`. Write"
            " one, or pass a function that returns a fresh module: `initialize=lambda: LitModel(...)`."
        )


def _require_same(module: nn.Module, fresh: nn.Module) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in fresh.named_parameters()}
    for name, parameter in _trained(module).items():
        if shapes.get(name) != tuple(parameter.shape):
            found = f"{shapes[name]} there" if name in shapes else "not there"
            raise MisconfigurationException(
                f"`ShrinkAndPerturb(initialize=...)` must return a module with the parameters of"
                f" {type(module).__name__}: {name} is {tuple(parameter.shape)} here and {found}."
            )
