"""Dynamic exponential moving average (LCIA): weights averaged over steps and tasks, as fast as gradients say."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.functional.task_weights.dynamic_ema import FORMS, Form, dynamic_ema_decay
from lightning_collapse.reporting.loss_term_curves import publish_terms, terms_are_due
from lightning_collapse.utilities.arguments import require_one_of
from lightning_collapse.utilities.modules import clean_name
from lightning_collapse.utilities.parameters import real_parameters
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.registry import register_curve
from lightning_collapse.utilities.trainer import loss_scale, refuse_sharded


class DynamicEMA(TaskAware):
    r"""Averages weights with a factor per tensor and step, validates the average and ends tasks with it.

    .. math:: \theta^*_t = \beta_t \theta^*_{t-1} + (1 - \beta_t) \theta_t

    with :func:`~lightning_collapse.functional.task_weights.dynamic_ema_decay`. Weights and gradients are read right
    before each optimizer step, where they belong together, so an average is one step behind; gradients are those of all
    micro-batches and processes, without the factor of 16-bit training, before clipping. Training itself is not
    touched: averages take the place of the weights in validation, in the end of the fit, before anything else that acts
    when a task ends, and where a :class:`~lightning_collapse.TaskBoundary` ends one; there it starts anew from them, so
    put it first among the callbacks. Checkpoints hold the weights in training, and in the state of this callback the
    averages. Buffers stay those of training.

    Nothing waits for the device between logging steps. Kept, and in the state, are of every tensor that was trained the
    average, the latest gradient and the latest weights, in ``float32`` at least.

    **Logged metrics**, every ``log_every_n_steps`` steps: ``continual/ema_decay``, the mean of β over tensors, and
    ``continual/ema_fallback``, the share of them that got 0.99 because the formula gave nothing between 0 and 1.

    Args:
        form: ``"paper"``, or ``"released"`` as the authors' code has it.

    Raises:
        ValueError: If ``form`` is another.
        MisconfigurationException: When the fit starts, if parameters are sharded, or an optimizer is schedule-free.

    References:
        Qiao et al., *Large continual instruction assistant*, ICML 2025. https://arxiv.org/abs/2410.10868

    Example::

        fit_tasks(lambda: Trainer(max_epochs=5, callbacks=[DynamicEMA(), metrics]), model, tasks)
    """

    changes_weights = True

    def __init__(self, form: Form = "paper") -> None:
        super().__init__()
        require_one_of(FORMS, form=form)
        self.form = form
        self._named: dict[str, Tensor] = {}
        self._kept: dict[str, list[Tensor]] = {}  # average, latest gradient and latest weights
        self._aside: dict[str, Tensor] = {}  # weights in training, while averages are in their place
        self._factors: list[tuple[Tensor, Tensor]] = []

    @property
    def averages(self) -> dict[str, Tensor]:
        """Copies of the running averages by name; none before the first step, and once they are in place."""
        return {name: kept[0].clone() for name, kept in self._kept.items()}

    @override
    def _without_fit(self) -> dict[str, Any]:
        return super()._without_fit() | {"_named": {}, "_aside": {}}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        refuse_sharded(trainer, pl_module, "DynamicEMA", "takes norms of whole tensors")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        real = real_parameters(pl_module).kept
        self._named = {clean_name(name): p for name, p in real.items() if not p.is_complex()}
        for name, kept in list(self._kept.items()):  # of a task that is taken up again
            at = self._named.get(name)
            if at is None or at.shape != kept[0].shape or not self._trained:
                del self._kept[name]
            else:
                self._kept[name] = [tensor.to(at.device, copy=True) for tensor in kept]

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        with self.containment("averaging weights", "averages miss steps"):
            self._update(optimizer, loss_scale(trainer, optimizer))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        factors, self._factors = self._factors, []
        if factors and terms_are_due(trainer):
            with self.containment("publishing its curves", "they may have gaps"):
                decay, fallback = (torch.cat(parts).float().mean() for parts in zip(*factors, strict=True))
                curves = {("continual", "", "ema_decay"): decay, ("continual", "", "ema_fallback"): fallback}
                publish_terms(trainer, pl_module, curves)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._aside:
            self._aside = {name: self._named[name].detach().clone() for name in self._kept if name in self._named}
            self._put_in()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_back()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end_task(trainer, pl_module)  # before all that acts when the task ends
        super().on_train_end(trainer, pl_module)

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in()
        self._kept = {}

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._put_back()
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._named = {}
        super().teardown(trainer, pl_module, stage)

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {name: [tensor.to("cpu", copy=True) for tensor in tensors] for name, tensors in self._kept.items()}
        return {**super().state_dict(), "kept": kept}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._kept = {name: list(tensors) for name, tensors in state_dict["kept"].items()}

    @torch.no_grad()
    def _update(self, optimizer: Optimizer, scale: Tensor | None) -> None:
        ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        owned = {name: p for name, p in self._named.items() if id(p) in ids and p.grad is not None}
        if not owned:
            return
        weights = [_wide(parameter) for parameter in owned.values()]
        gradients = [_wide(parameter.grad) for parameter in owned.values()]
        if scale is not None:
            gradients = foreach.div(gradients, scale)
        for name, weight in zip(owned, weights, strict=True):
            if name not in self._kept:  # the first factor is a fallback, and moves nothing
                self._kept[name] = [weight.clone(), torch.full_like(weight, torch.nan), weight.clone()]
        averages, past, before = (list(kept) for kept in zip(*map(self._kept.__getitem__, owned), strict=True))
        # in place, in copies that are written anew: room for others would take longer than the arithmetic
        foreach.sub_(past, gradients)
        foreach.sub_(before, weights)
        change, step = _lengths(past), _lengths(before)
        foreach.copy_(before, weights)
        foreach.sub_(before, averages)
        gradient, gap = torch.stack(foreach.norm(gradients, 1)), _lengths(before)
        decay, fallback = dynamic_ema_decay(gradient, change, step, gap, self.form)
        rates = (1 - decay).unbind()
        foreach.lerp_(averages, weights, [rate.to(a.dtype) for rate, a in zip(rates, averages, strict=True)])
        foreach.copy_(past, gradients)
        foreach.copy_(before, weights)
        self._factors.append((decay, fallback))

    def _put_in(self) -> None:
        averages = self.averages
        with self.containment("putting averages in place", "weights stay as they are trained"):
            if not all(average.isfinite().all() for average in averages.values()):
                raise ValueError("they are not finite, as weights were not at some step")
            self._copy(averages)

    def _put_back(self) -> None:
        aside, self._aside = self._aside, {}
        self._copy(aside)

    @torch.no_grad()
    def _copy(self, tensors: dict[str, Tensor]) -> None:
        for name in tensors.keys() & self._named.keys():
            self._named[name].copy_(tensors[name])


def _lengths(tensors: list[Tensor]) -> Tensor:
    """Sums of absolute values, which on a CPU take the place of the tensors: norms are slower there."""
    if not tensors[0].is_cpu:
        return torch.stack(foreach.norm(tensors, 1))
    foreach.abs_(tensors)
    return torch.stack([tensor.sum() for tensor in tensors])


def _wide(tensor: Any) -> Tensor:
    dense: Tensor = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return dense.to(torch.promote_types(dense.dtype, torch.float32))


for _name, _collapsed in (("ema_decay", "near 1: averages hardly move"), ("ema_fallback", "1: no factor is usable")):
    _source = "Qiao et al., ICML 2025, arXiv 2410.10868"
    register_curve(
        "continual", _name, reads="weights and gradients", range="0 to 1", collapsed=_collapsed, source=_source
    )
