"""Regularization of representations: an anti-collapse loss on a layer of any module, without touching its code."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.loss_terms.auxiliary_loss import AuxiliaryLoss, one_name
from lightning_collapse.callbacks.loss_terms.row_labels import row_labels
from lightning_collapse.losses.base import AntiCollapseLoss, TakesLabels, TooFewRowsError, evaluate, nothing
from lightning_collapse.losses.support.labels import UnknownClassError, all_labels_read
from lightning_collapse.losses.support.state import OneStep, keep, recall, remembered
from lightning_collapse.utilities.features import sample_count
from lightning_collapse.utilities.hooks import ModuleHook
from lightning_collapse.utilities.modules import in_backward, is_channels_first
from lightning_collapse.utilities.optimizers import searches_line


class Regularizer(AuxiliaryLoss):
    """Adds a loss on the output of a layer to what ``training_step`` returns.

    Collects what the layer returns within one ``training_step``, graph included, and adds ``weight * loss`` to the
    returned loss; the update is that of :class:`~lightning_collapse.AntiCollapseMixin`, bit by bit if one other
    operation reads what the layer returns, else up to the order in which their gradients are summed. The model's code
    and ``state_dict`` stay as they are: what the loss remembers, its buffers, is in the state of the callback, so that
    a resumed run goes on as if it had not been interrupted. Vectors ``(N, D)`` are taken as they are, every token of
    ``(N, L, D)`` is a row, maps ``(N, C, *spatial)`` are averaged over space.

    At logging steps it publishes ``regularizer/{name}/value``, which is what was added to the loss,
    ``regularizer/{name}/{term}``, the terms without any weight, and, once there are any,
    ``regularizer/{name}/nonfinite_rows``, how many rows were NaN or infinite since the last point. Of the micro-batches
    of an accumulated step the last one is shown. ``trainer.callback_metrics`` has what is shown of every step, for
    early stopping at the end of any epoch.

    A loss that takes labels gets those of the batch, one per row: of a sample, or of a token ``(N, L)``. A step whose
    batch has none that fit goes without the term.

    Rows that are not finite, in any view, are left out, with their labels. To know them the host waits for the device:
    until the first step or a logging step has shown that there are any, a step that has some goes without the term
    instead. All processes decide alike.

    Calls of the layer without gradient are not views: under ``torch.no_grad``, in validation, inside reentrant
    activation checkpointing, and recomputation during the backward pass. In data-parallel training every process must
    run the layer alike; one that cannot contributes no rows. A step that returns ``None`` stays ``None``. Compiled
    modules are compiled anew when the fit starts, so that they know of the hook.

    Args:
        loss: An ``AntiCollapseLoss``, or any module without trainable parameters that maps feature matrices to a
            scalar: one, or two if its attribute ``views`` is 2.
        layer: Name of the layer, or a glob that matches exactly one: ``"projector"``, ``"*.projector"``.
        weight: Factor of the loss: a number, or a function of the step such as ``LinearWarmup``.
        chunk: 2 if one call of the layer holds both views, the first in the first half of the batch. With 1 the layer
            is called once per view.
        name: Name of the curves; by default that of the loss class without ``Loss``, in lower case.
        labels: For a loss that takes labels, a function from the batch to them. By default the second element of
            ``(x, y)``, or what is under ``"targets"``, ``"labels"`` or ``"y"``; those of a causal language model are
            moved to the tokens that predict them.
        on: The older name of ``layer``, which YAML 1.1 reads as a boolean.

    Raises:
        ValueError: If an argument is of another type, ``chunk`` does not fit the loss, or ``labels`` is given for one
            that takes none.
        MisconfigurationException: At the start of the fit, if the module optimizes by hand, the loss has trainable
            parameters, the layer is not found or the name is taken; at the first training step, if the layer did not
            run as often as the loss has views, or the batch has no labels that fit its rows.

    Example::

        trainer = Trainer(callbacks=[Regularizer(VICReg(), layer="projector")])
    """

    remedy = "Add `self.anti_collapse_loss(...)` of `AntiCollapseMixin` to your loss instead."
    layer: str

    def __init__(
        self,
        loss: nn.Module,
        layer: str | None = None,
        weight: float | Callable[[int], float] = 1.0,
        chunk: Literal[1, 2] = 1,
        name: str | None = None,
        *,
        labels: Callable[[Any], Any] | None = None,
        on: str | None = None,
    ) -> None:
        layer = one_name(layer, on)
        if not isinstance(loss, nn.Module):
            raise ValueError(f"`loss` must be a module, got {loss!r}. Pass an instance, such as `VICReg()`.")
        if not isinstance(layer, str):
            told = "Pass what `named_modules()` calls it."
            raise ValueError(f"`layer` must be the name of a layer, got {layer!r}. {told}")
        self._views: int = getattr(loss, "views", 1)
        if chunk not in (1, self._views):
            raise ValueError(
                f"`chunk` must be 1, or the number of views of the loss: {type(loss).__name__} takes {self._views},"
                f" got chunk={chunk}."
            )
        self._labels: TakesLabels = getattr(loss, "takes_labels", None)
        if labels is not None and not (self._labels and callable(labels)):
            raise ValueError(
                f"`labels` must be a function from the batch, for a loss that takes labels, got {labels!r} for"
                f" {type(loss).__name__}. Drop it, or pass `labels=lambda batch: batch[1]`."
            )
        super().__init__(layer, weight, name or type(loss).__name__.removesuffix("Loss").lower())
        self.loss = loss
        self.chunk = chunk
        self.labels = labels
        self._rows: list[Tensor | None] = []
        self._one_step: OneStep | None = None
        self._before: dict[str, Tensor | None] = {}  # what the loss remembered before the latest step
        self._samples = 0  # of the latest call
        self._no_rows: Tensor | None = None  # set by the first step that went well

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._no_rows = None

    @override
    def hook(self, trainer: Trainer, pl_module: LightningModule) -> list[Callable[[], None]]:
        _, layer = self.find(pl_module, self.layer)
        if any(p.requires_grad for p in self.loss.parameters()):
            raise MisconfigurationException(
                f"The optimizer does not know the trainable parameters of {type(self.loss).__name__}. Make it part of"
                " the model with `self.set_regularizers(...)` of `AntiCollapseMixin`."
            )
        self._one_step = OneStep() if any(map(searches_line, trainer.optimizers)) else None
        self.loss.to(pl_module.device)
        self._channels_first = is_channels_first(layer)
        return [ModuleHook(layer, function=self._collect).remove]

    @override
    def reset(self) -> None:
        self._rows.clear()

    @override
    def captured(self) -> list[Tensor]:
        return [row for row in self._rows if row is not None]

    @override
    def term(self, trainer: Trainer, batch: Any) -> Tensor:
        if self._one_step is not None:
            self._one_step.evaluate(self.loss, trainer.fit_loop.total_batch_idx)
        rows = self._rows
        problem = self._problem(rows)
        present = self.captured()
        if problem is None:
            views = tuple(present[0].chunk(self.chunk)) if self.chunk > 1 else tuple(present)
            problem, labels = self._labels_of(trainer, batch, views[0])
        if problem is None:
            starts = self._no_rows is None
            self._remember(views[0])
            return self._evaluate(trainer, views, labels, starts)
        if self._no_rows is None:
            raise MisconfigurationException(problem)
        self.warn_once("skipped", f"{problem} Steps like this one go without the term.")
        no_rows = self._no_rows.to(trainer.strategy.root_device)  # a checkpoint may have brought it
        zero = nothing(*present, no_rows)
        if not isinstance(self.loss, AntiCollapseLoss):
            self._finite.select([no_rows])
            return zero
        # this process has no rows, but the others may have, and wait for it in their sums
        kind = torch.float32 if self._labels == "targets" else torch.long
        labels = (no_rows.new_empty(0, dtype=kind),) if self._labels else ()
        return zero + self._evaluate(trainer, (no_rows,) * self._views, labels)

    @override
    def state_dict(self) -> dict[str, Any]:
        buffers = remembered(self.loss)
        state = {**super().state_dict(), **({"loss": buffers} if buffers else {})}
        return state if self._no_rows is None else {**state, "no_rows": self._no_rows}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        recall(self.loss, state_dict.get("loss", {}))
        self._no_rows = state_dict.get("no_rows", self._no_rows)

    @override
    def _warn_of_nonfinite(self, first: bool) -> None:
        super()._warn_of_nonfinite(first)
        if first:  # its running statistics may not have begun
            recall(self.loss, self._before)

    def _collect(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open and torch.is_grad_enabled() and not in_backward():
            self._rows.append(self.rows_of(output))
            self._samples = 0 if self._rows[-1] is None else sample_count(output)

    @override
    def published(self, values: dict[str, float]) -> None:
        remark = self.loss.remark(values) if isinstance(self.loss, AntiCollapseLoss) else None
        if remark is not None:
            self.warn_once("remark", f"`regularizer/{self.name}`: {remark}")

    def _evaluate(
        self, trainer: Trainer, views: tuple[Tensor, ...], labels: tuple[Tensor, ...], starts: bool = False
    ) -> Tensor:
        rows, counts = self._finite.select(views, labels)
        state = self._before = {} if counts is None else remembered(self.loss)
        try:
            with all_labels_read() if starts else nullcontext():
                value, terms = evaluate(self.loss, rows)
        except (TooFewRowsError, UnknownClassError) as error:
            if starts and isinstance(error, UnknownClassError):
                raise
            self.warn_once("skipped", f"{error} Steps like this one go without the term.")
            return nothing(*views)
        if counts is None:
            return self.add(trainer, value, terms)
        keep(self.loss, state, counts)
        value, *others = (torch.where(counts, t, torch.zeros_like(t)) for t in (value, *terms.values()))
        return self.add(trainer, value, dict(zip(terms, others, strict=True)))

    def _labels_of(self, trainer: Trainer, batch: Any, view: Tensor) -> tuple[str | None, tuple[Tensor, ...]]:
        """Why there are no labels for the rows of a view, or the labels, if the loss takes them."""
        if not self._labels:
            return None, ()
        try:
            module = trainer.lightning_module
            return None, (row_labels(self.labels, batch, view, self._labels, self.chunk, module),)
        except Exception as error:  # of a function that is the user's
            why = str(error) if isinstance(error, ValueError) else f"`labels` raised {error!r:.200}"
            needs = f"`Regularizer({type(self.loss).__name__}(), layer={self.layer!r})` needs labels"
            return f"{needs}: {why.rstrip('.')}.", ()

    def _remember(self, view: Tensor) -> None:
        """Keep an empty matrix like this one, for steps in which this process has no rows."""
        self._no_rows = view.detach().new_empty(0, view.shape[1]).requires_grad_(view.requires_grad)
        if not view.requires_grad:
            self.warn_once("frozen", f"The output of {self.layer!r} has no gradient: its regularizer trains nothing.")

    def _problem(self, rows: list[Tensor | None]) -> str | None:
        """Why the loss cannot be evaluated on these outputs, and what to do."""
        wanted = self._views // self.chunk
        needs = f"`Regularizer({type(self.loss).__name__}(), layer={self.layer!r})` needs"
        if not rows:
            return (
                f"{needs} the layer to run with gradient in `training_step`, and it did not. Choose another layer; one"
                " inside reentrant activation checkpointing, or used without a call of its own, cannot be seen."
            )
        if any(row is None for row in rows):
            return f"{needs} a floating-point tensor, and the layer returned none{self._unreadable}. Choose another."
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
