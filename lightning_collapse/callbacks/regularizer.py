"""An anti-collapse loss on a layer of any module, without a change to its code."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.losses.base import AntiCollapseLoss, TooFewRowsError, evaluate, nothing
from lightning_collapse.losses.memory import recall, remembered
from lightning_collapse.losses.schedule import Weight, require_weight, weighted
from lightning_collapse.reporting.terms import publish_terms, term_curves, terms_are_due
from lightning_collapse.utilities.features import as_rows, sample_count
from lightning_collapse.utilities.modules import find_modules, in_backward, is_channels_first, let_hooks_be_seen
from lightning_collapse.utilities.trainer import logging_step
from lightning_collapse.utilities.training_step import wrap_training_step


class Regularizer(Callback):
    """Adds a loss on the output of a layer to what ``training_step`` returns.

    Collects what the layer returns within one ``training_step``, graph included, and adds ``weight * loss`` to the
    returned loss; the update is that of :class:`~lightning_collapse.AntiCollapseMixin`, bit by bit if one other
    operation reads what the layer returns, else up to the order in which their gradients are summed. The model's code
    and ``state_dict`` stay as they are: what the loss remembers, its buffers, is in the state of the callback, so that
    a resumed run goes on as if it had not been interrupted. Vectors ``(N, D)`` are taken as they are, every token of
    ``(N, L, D)`` is a row, maps ``(N, C, *spatial)`` are averaged over space.

    At logging steps it publishes ``regularizer/{name}``, which is what was added to the loss, and
    ``regularizer/{name}/{term}``, the terms without any weight. Of the micro-batches of an accumulated step the last
    one is shown.

    Calls of the layer without gradient are not views: under ``torch.no_grad``, in validation, inside reentrant
    activation checkpointing, and recomputation during the backward pass. In data-parallel training every process must
    run the layer alike; one that cannot contributes no rows. A step that returns ``None`` stays ``None``. Compiled
    modules are compiled anew when the fit starts, so that they know of the hook.

    Args:
        loss: An :class:`~lightning_collapse.losses.AntiCollapseLoss`, or any module without trainable parameters that
            maps feature matrices to a scalar: one, or two if its attribute ``views`` is 2.
        on: Name of the layer, or a glob that matches exactly one: ``"projector"``, ``"*.projector"``.
        weight: Factor of the loss: a number, or a function of the step such as
            :class:`~lightning_collapse.losses.LinearWarmup`.
        chunk: 2 if one call of the layer holds both views, the first in the first half of the batch. With 1 the layer
            is called once per view.
        name: Name of the curves; by default that of the loss class without ``Loss``, in lower case.

    Raises:
        ValueError: If an argument is of another type, ``chunk`` does not fit the loss, or the loss takes labels.
        MisconfigurationException: At the start of the fit, if the module optimizes by hand, the loss has trainable
            parameters, the layer is not found or the name is taken; at the first training step, if the layer did not
            run as often as the loss has views.

    Example::

        trainer = Trainer(callbacks=[Regularizer(VICReg(), on="projector")])
    """

    def __init__(
        self,
        loss: nn.Module,
        on: str,
        weight: float | Callable[[int], float] = 1.0,
        chunk: Literal[1, 2] = 1,
        name: str | None = None,
    ) -> None:
        if not isinstance(loss, nn.Module):
            raise ValueError(f"`loss` must be a module, got {loss!r}. Pass an instance, such as `VICReg()`.")
        if not isinstance(on, str):
            raise ValueError(f"`on` must be the name of a layer, got {on!r}. Pass what `named_modules()` calls it.")
        require_weight(weight)
        self._views: int = getattr(loss, "views", 1)
        if chunk not in (1, self._views):
            raise ValueError(
                f"`chunk` must be 1, or the number of views of the loss: {type(loss).__name__} takes {self._views},"
                f" got chunk={chunk}."
            )
        if getattr(loss, "takes_labels", False):
            raise ValueError(
                f"{type(loss).__name__} takes labels, and a layer returns none. Call `self.anti_collapse_loss(features,"
                " labels)` of `AntiCollapseMixin` in `training_step`."
            )
        self.loss = loss
        self.on = on
        self.weight: Weight = weight
        self.chunk = chunk
        self.name = name or type(loss).__name__.removesuffix("Loss").lower()
        self._detachers: list[Callable[[], None]] = []
        self._rows: list[Tensor | None] = []
        self._samples = 0  # of the latest call
        self._open = False
        self._channels_first = False
        self._no_rows: Tensor | None = None  # set by the first step that went well
        self._curves: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._no_rows = None  # of another fit; a checkpoint is loaded after this

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in `setup`: `configure_model`, compilation and sharding come later
        self._detach()
        self._check(trainer, pl_module)
        layer = self._find(pl_module)
        let_hooks_be_seen(pl_module)
        self.loss.to(pl_module.device)
        self._channels_first = is_channels_first(layer)

        def around(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # validation and testing may call `training_step` too
            training = trainer.training and torch.is_grad_enabled()
            return self._run(trainer, step, *args, **kwargs) if training else step(*args, **kwargs)

        self._detachers = [wrap_training_step(pl_module, around), layer.register_forward_hook(self._collect).remove]

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._curves:
            publish_terms(trainer, pl_module, self._curves)
            self._curves = {}

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name, on=self.on)

    @override
    def state_dict(self) -> dict[str, Any]:
        memory = remembered(self.loss)
        state: dict[str, Any] = {"loss": memory} if memory else {}
        return state if self._no_rows is None else {**state, "no_rows": self._no_rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        recall(self.loss, state_dict.get("loss", {}))
        self._no_rows = state_dict.get("no_rows", self._no_rows)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()  # `teardown` is not called when the trainer fails

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._detach()

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"`Regularizer` adds to the loss that `training_step` returns, but {type(pl_module).__name__} optimizes"
                " by hand. Add `self.anti_collapse_loss(...)` of `AntiCollapseMixin` to your loss instead."
            )
        if any(p.requires_grad for p in self.loss.parameters()):
            raise MisconfigurationException(
                f"The optimizer does not know the trainable parameters of {type(self.loss).__name__}. Make it part of"
                " the model with `self.set_regularizers(...)` of `AntiCollapseMixin`."
            )
        twins = [c for c in trainer.callbacks if isinstance(c, Regularizer) and c.name == self.name and c is not self]
        if twins:
            raise MisconfigurationException(
                f"Two `Regularizer`s are called {self.name!r}, on {self.on!r} and {twins[0].on!r}. Tell their curves"
                " apart with `Regularizer(..., name=...)`."
            )

    def _find(self, pl_module: LightningModule) -> nn.Module:
        try:
            found = find_modules(pl_module, [self.on])
        except ValueError as error:
            raise MisconfigurationException(f"`Regularizer(on={self.on!r})`: {error}") from None
        if len(found) != 1:
            raise MisconfigurationException(
                f"`Regularizer(on={self.on!r})` must name one layer, but matches {len(found)}: {', '.join(found)}."
            )
        [layer] = found.values()
        return layer

    def _detach(self) -> None:
        for detach in self._detachers:
            detach()
        self._detachers = []
        self._rows.clear()
        self._curves = {}
        self._open = False

    def _collect(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open and torch.is_grad_enabled() and not in_backward():
            self._samples = sample_count(output)
            rows = as_rows(output, self._channels_first)
            # a copy: an operation in place further on, such as `ReLU(inplace=True)`, must not change it
            self._rows.append(None if rows is None else rows.clone())

    def _run(self, trainer: Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._rows.clear()
        self._open = True
        try:
            output = step(*args, **kwargs)
            rows = list(self._rows)
        finally:
            self._open = False
            self._rows.clear()  # keeps no graph alive
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return output
        loss = loss + self._term(trainer, rows)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _term(self, trainer: Trainer, rows: list[Tensor | None]) -> Tensor:
        """What to add to the loss of this step."""
        problem = self._problem(rows)
        present = [row for row in rows if row is not None]
        if problem is None:
            views = present[0].chunk(self.chunk) if self.chunk > 1 else tuple(present)
            self._remember(views[0])
            return self._evaluate(trainer, views)
        if self._no_rows is None:
            raise MisconfigurationException(problem)
        self._warn_once("skipped", f"{problem} Steps like this one go without the term.")
        no_rows = self._no_rows.to(trainer.strategy.root_device)  # a checkpoint may have brought it
        zero = nothing(*present, no_rows)
        if not isinstance(self.loss, AntiCollapseLoss):
            return zero
        # this process has no rows, but the others may have, and wait for it in their sums
        return zero + self._evaluate(trainer, (no_rows,) * self._views)

    def _evaluate(self, trainer: Trainer, views: tuple[Tensor, ...]) -> Tensor:
        try:
            value, terms = evaluate(self.loss, views)
        except TooFewRowsError as error:
            self._warn_once("skipped", f"{error} Steps like this one go without the term.")
            return nothing(*views)
        total = weighted(self.weight, value, logging_step(trainer))
        if terms_are_due(trainer):
            self._curves = term_curves(self.name, total, terms)
        return total

    def _remember(self, view: Tensor) -> None:
        """Keep an empty matrix like this one, for steps in which this process has no rows."""
        self._no_rows = view.detach().new_empty(0, view.shape[1]).requires_grad_(view.requires_grad)
        if not view.requires_grad:
            self._warn_once("frozen", f"The output of {self.on!r} has no gradient: its regularizer trains nothing.")

    def _problem(self, rows: list[Tensor | None]) -> str | None:
        """Why the loss cannot be evaluated on these outputs, and what to do."""
        wanted = self._views // self.chunk
        needs = f"`Regularizer({type(self.loss).__name__}(), on={self.on!r})` needs"
        if not rows:
            return (
                f"{needs} the layer to run with gradient in `training_step`, and it did not. Choose another layer; one"
                " inside reentrant activation checkpointing, or used without a call of its own, cannot be seen."
            )
        if any(row is None for row in rows):
            return f"{needs} a floating-point tensor, and the layer returned none. Choose another layer."
        if len(rows) != wanted:
            one_call = self._views == 2 and len(rows) == 1
            remedy = "If one call holds both views pass `chunk=2`; else choose" if one_call else "Choose"
            return (
                f"{needs} {wanted} call(s) of the layer per `training_step`, and there were {len(rows)}. {remedy}"
                f" another layer, or a loss of {len(rows) * self.chunk} view(s)."
            )
        shapes = [tuple(row.shape) for row in rows if row is not None]
        if self._samples % self.chunk:  # tokens of an odd number of samples may be even, and a view end inside one
            return f"{needs} an even number of samples with `chunk={self.chunk}`, got {self._samples}."
        if len(set(shapes)) > 1:
            return f"{needs} views of one shape, got {' and '.join(map(str, shapes))}."
        return None

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)  # on whichever process it happens
