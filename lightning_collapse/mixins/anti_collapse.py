"""Regularization of representations as a mixin: anti-collapse terms, written out in ``training_step``."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_collapse.losses.base import AntiCollapseLoss, TooFewRowsError, evaluate, nothing
from lightning_collapse.losses.schedule import Weight, require_weight, weighted
from lightning_collapse.losses.support.labels import UnknownClassError, all_labels_read
from lightning_collapse.losses.support.state import OneStep, recall, remembered
from lightning_collapse.mixins.bases import check_order
from lightning_collapse.reporting.loss_term_curves import (
    Curve,
    offer_terms,
    publish_terms,
    term_curves,
    terms_are_due,
)
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.optimizers import searches_line
from lightning_collapse.utilities.trainer import logging_step

STATE = "anti_collapse_memory"


class AntiCollapseMixin:
    """Adds weighted, logged regularizers to a ``LightningModule``; put it before ``LightningModule`` in the bases.

    It adds nothing to the ``state_dict``: checkpoints of the plain module load into the mixed one and back. What the
    losses remember, their buffers, is under a key of its own in the checkpoint, so that a resumed run goes on as if it
    had not been interrupted; a module with hooks ``on_save_checkpoint`` and ``on_load_checkpoint`` of its own calls
    ``super()`` in them. Works with automatic and manual optimization, any precision, data-parallel training (where
    every process must call it alike), ``torch.compile``, and without a trainer.

    At logging steps it publishes, for every regularizer, ``regularizer/{name}/value``, which is what was added to the
    loss, and ``regularizer/{name}/{term}``, its terms without any weight. Of the micro-batches of an accumulated step
    the last one is shown. To reach a module without changing its code use :class:`~lightning_collapse.Regularizer`.

    Without a trainer, as with Fabric, nobody tells the step: weights that change go by how often their regularizer was
    evaluated in training mode. So every micro-batch counts, and a resumed loop starts at 0 again, unless the weight
    looks at a counter of the loop: ``lambda _: warmup(self.steps_done)``.

    Attributes:
        regularizers: ``{name: (weight, module)}``, set by :meth:`set_regularizers`.

    Example::

        class LitEncoder(AntiCollapseMixin, LightningModule):
            def __init__(self):
                super().__init__()
                self.encoder = nn.Linear(16, 8)
                self.set_regularizers({"vicreg": VICReg()})

            def training_step(self, batch, batch_idx):
                first, second = (self.encoder(view) for view in batch)
                return self.anti_collapse_loss(first, second)
    """

    regularizers: dict[str, tuple[Weight, nn.Module]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_order(cls, AntiCollapseMixin)

    def set_regularizers(self, regularizers: Mapping[str, nn.Module | tuple[Weight, nn.Module]]) -> None:
        """Choose the terms; call it in ``__init__``, after ``super().__init__()``.

        Losses without trainable parameters stay out of the module tree, so they add no key to the ``state_dict``. One
        that has some becomes part of the model, since its parameters must be optimized, moved and saved.

        Args:
            regularizers: A loss by name, or a pair of a weight and a loss. A weight is a number or a function of the
                step such as :class:`~lightning_collapse.losses.LinearWarmup`. Any module that maps feature matrices to
                a scalar will do; it takes one matrix, or as many as its attribute ``views`` says, and then the labels
                if its attribute ``takes_labels`` is set.

        Raises:
            ValueError: If it is no mapping, an entry is neither, a weight is not finite, or the name of a loss that has
                parameters cannot be that of a module.
        """
        if not isinstance(regularizers, Mapping):
            raise ValueError(
                f"`regularizers` must be losses by name, got {type(regularizers).__name__}. Write"
                " `set_regularizers({'vicreg': VICReg()})`."
            )
        chosen: dict[str, tuple[Weight, nn.Module]] = {}
        for name, entry in regularizers.items():
            weight, loss = entry if isinstance(entry, tuple) and len(entry) == 2 else (1.0, entry)
            if not isinstance(loss, nn.Module):
                raise ValueError(
                    f"`regularizers[{name!r}]` must be a module or (weight, module), got {entry!r}. Pass an instance:"
                    f" `{{{name!r}: (0.1, VICReg())}}`."
                )
            require_weight(weight)
            chosen[name] = (weight, loss)
        trained = nn.ModuleDict()
        for name, (_, loss) in chosen.items():
            if any(p.requires_grad for p in loss.parameters()):
                try:
                    trained[name] = loss
                except KeyError as error:
                    raise ValueError(
                        f"`regularizers[{name!r}]` has parameters, and a part of the model cannot be called {name!r}:"
                        f" {error.args[0]}. Choose another name."
                    ) from None
        self.regularizers = chosen
        vars(self).get("_modules", {}).pop("trained_regularizers", None)  # of an earlier choice, by a base class
        if len(trained):
            self.trained_regularizers = trained

    def anti_collapse_loss(
        self, *views: Tensor, names: Sequence[str] | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Weighted sum of the regularizers; add it to the loss.

        Collective: every process must call it. Call it once per step and name, the last call is what the curves show.
        While the module is in evaluation mode, as in ``validation_step``, so are they, and remember nothing.

        Args:
            views: Feature matrices of shape ``(N, D)``: one, or the two views of the same samples. One more behind
                them is the labels, ``anti_collapse_loss(logits, labels)``, if a regularizer takes some, or if it holds
                integers, as no view does.
            names: Which regularizers; all by default. For regularizers that look at different features.
            labels: Of the rows, shape ``(N,)``, by name: classes or targets. Only regularizers that take labels see
                them.

        Returns:
            Scalar, at least ``float32``. A regularizer that meets fewer than two rows, over all processes, is left out
            with one warning.

        Raises:
            MisconfigurationException: If there are no regularizers, or if one takes another number of views, or labels
                that are not there.
            ValueError: The first time, if a label names a class that there is not; later the regularizer is left out,
                with one warning.
        """
        views, given = _split_labels(views, labels, self._named(names))
        added: list[Tensor] = []
        curves: dict[Curve, Tensor] = {}
        for name, (weight, loss) in self._chosen(names, len(views), bool(given)).items():
            _follow(loss, views[0])
            awake = _awake(loss, self)
            _hold(self, name, loss)
            starts = name not in self.__dict__.setdefault("_evaluated", set())
            try:
                with all_labels_read() if starts else nullcontext():
                    value, terms = evaluate(loss, (*views, *given) if _takes_labels(loss) else views)
                self._evaluated.add(name)
            except (TooFewRowsError, UnknownClassError) as error:
                if starts and isinstance(error, UnknownClassError):
                    raise
                _warn_once(self, name, f"The regularizer {name!r} was left out of a step: {error}")
                continue
            finally:
                for module in awake:
                    module.training = True
            added.append(_weighted(self, name, weight, value) if callable(weight) else weighted(weight, value, step=0))
            curves |= term_curves(name, added[-1], terms)
        _publish(self, curves)
        if not added:
            return nothing(*views)
        return sum(added[1:], start=added[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the losses remember, if any does."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        states = {name: remembered(loss) for name, (_, loss) in getattr(self, "regularizers", {}).items()}
        states = {name: state for name, state in states.items() if state}
        if states:
            checkpoint[STATE] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give it back to the losses of the same names."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        states = checkpoint.get(STATE, {})
        for name, (_, loss) in getattr(self, "regularizers", {}).items():
            recall(loss, states.get(name, {}))

    def _named(self, names: Sequence[str] | None) -> dict[str, tuple[Weight, nn.Module]]:
        regularizers: dict[str, tuple[Weight, nn.Module]] | None = getattr(self, "regularizers", None)
        if regularizers is None:
            raise MisconfigurationException(
                f"`{type(self).__name__}` has no regularizers. Call `self.set_regularizers({{'vicreg': VICReg()}})` in"
                " its `__init__`."
            )
        if isinstance(names, str) or not set(names or ()) <= set(regularizers):
            raise MisconfigurationException(f"`names` must be a list out of {sorted(regularizers)}, got {names!r}.")
        return regularizers if names is None else {name: regularizers[name] for name in names}

    def _chosen(self, names: Sequence[str] | None, n_views: int, labelled: bool) -> dict[str, tuple[Weight, nn.Module]]:
        chosen = self._named(names)
        for name, (_, loss) in chosen.items():
            wanted = getattr(loss, "views", 1)
            if wanted != n_views:
                raise MisconfigurationException(
                    f"The regularizer {name!r} ({type(loss).__name__}) takes {wanted} view(s), got {n_views}. Pass"
                    f" `anti_collapse_loss` as many feature matrices, and say with `names=[...]` which regularizers"
                    " they are for."
                )
            if _takes_labels(loss) and not labelled:
                raise MisconfigurationException(
                    f"The regularizer {name!r} ({type(loss).__name__}) takes labels. Pass the {_what(loss)} of each row"
                    " behind the features: `anti_collapse_loss(features, labels)`."
                )
        return chosen


def _split_labels(
    views: tuple[Tensor, ...], labels: Tensor | None, chosen: Mapping[str, tuple[Weight, nn.Module]]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Feature matrices, and the labels by name or behind them if there are any."""
    if labels is not None:
        return views, (labels,)
    declared = any(_takes_labels(loss) and len(views) == getattr(loss, "views", 1) + 1 for _, loss in chosen.values())
    # a view may be none: the attention map of a layer that made none, of which the loss will tell
    integers = len(views) > 1 and isinstance(views[-1], Tensor) and not views[-1].is_floating_point()
    return (views[:-1], views[-1:]) if declared or integers else (views, ())


def _takes_labels(loss: nn.Module) -> bool:
    return bool(getattr(loss, "takes_labels", None))


def _what(loss: nn.Module) -> str:
    return "target" if getattr(loss, "takes_labels", None) == "targets" else "integer class"


# Dynamo can trace neither a trainer nor a warning, and would compile a schedule's weight anew at every step.


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _weighted(pl_module: Any, name: str, weight: Weight, value: Tensor) -> Tensor:
    trainer = _trainer_of(pl_module)
    return weighted(weight, value, logging_step(trainer) if trainer else _own_step(pl_module, name))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _publish(pl_module: Any, curves: dict[Curve, Tensor]) -> None:
    trainer = _trainer_of(pl_module)
    if trainer is None or not trainer.training:
        return
    contained = vars(pl_module).setdefault("_collapse_containment", Containment("AntiCollapseMixin"))
    with contained("publishing its curves", "they may have gaps"):
        if terms_are_due(trainer):
            _remark(pl_module, publish_terms(trainer, pl_module, curves))
        else:
            offer_terms(trainer, curves)


def _remark(pl_module: Any, numbers: dict[Curve, float]) -> None:
    """Let every loss look at what its curves show."""
    for name in {owner for _, owner, _ in numbers}:
        _, loss = pl_module.regularizers[name]
        values = {term: number for (_, owner, term), number in numbers.items() if owner == name}
        remark = loss.remark(values) if isinstance(loss, AntiCollapseLoss) else None
        if remark is not None:
            _warn_once(pl_module, f"{name}: remark", f"`regularizer/{name}`: {remark}")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _hold(pl_module: Any, name: str, loss: nn.Module) -> None:
    """Have all evaluations of one optimizer step see one loss."""
    trainer = _trainer_of(pl_module)
    if trainer is not None and trainer.training and any(map(searches_line, trainer.optimizers)):
        steps = vars(pl_module).setdefault("_regularizers_one_step", {})
        steps.setdefault(name, OneStep()).evaluate(loss, (id(trainer), trainer.fit_loop.total_batch_idx))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _warn_once(pl_module: Any, kind: str, message: str) -> None:
    warned = vars(pl_module).setdefault("_warned_regularizers", set())
    if kind not in warned:
        warned.add(kind)
        rank_zero_warn(message)


def _awake(loss: nn.Module, pl_module: Any) -> list[nn.Module]:
    """Put a loss that is not in the module tree to rest with the module, and say what to wake afterwards.

    Otherwise what it remembers would be changed by validation.
    """
    awake = [] if getattr(pl_module, "training", True) else [module for module in loss.modules() if module.training]
    for module in awake:
        module.training = False
    return awake


def _follow(loss: nn.Module, view: Tensor) -> None:
    """Move a loss that is not in the module tree to where the features are."""
    if isinstance(view, Tensor) and any(s.device != view.device for s in (*loss.parameters(), *loss.buffers())):
        _move(loss, view.device)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _move(loss: nn.Module, device: torch.device) -> None:
    loss.to(device)


def _own_step(pl_module: Any, name: str) -> int:
    """How often a regularizer was evaluated before in training mode: the step where there is no trainer."""
    steps: dict[str, int] = vars(pl_module).setdefault("_regularizer_steps", {})
    step = steps.get(name, 0)
    if getattr(pl_module, "training", True):
        steps[name] = step + 1
    return step


def _trainer_of(pl_module: Any) -> Trainer | None:
    try:
        trainer = pl_module.trainer
    except (AttributeError, RuntimeError):  # a plain module, or one without a trainer
        return None
    return trainer if hasattr(trainer, "fit_loop") else None  # with Fabric the attribute is something else
