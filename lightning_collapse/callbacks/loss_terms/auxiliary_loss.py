"""Auxiliary loss: what every callback shares that adds a term to the loss of ``training_step``, without its code."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.loss_terms.finite_rows import FiniteRows
from lightning_collapse.losses.base import nothing
from lightning_collapse.losses.schedule import Weight, require_weight, weighted
from lightning_collapse.reporting.containments import try_again
from lightning_collapse.reporting.loss_term_curves import (
    Curve,
    offer_terms,
    publish_terms,
    term_curves,
    terms_are_due,
)
from lightning_collapse.utilities.containment import Containment
from lightning_collapse.utilities.features import as_rows
from lightning_collapse.utilities.modules import find_modules, let_hooks_be_seen
from lightning_collapse.utilities.trainer import logging_step, without_module
from lightning_collapse.utilities.training_step import wrap_training_step


class AuxiliaryLoss(Callback, ABC):
    """Captures layers within one ``training_step`` and adds a term to the loss it returns.

    A subclass hooks layers in :meth:`hook`, keeps what they return while :attr:`_open` is true, and makes a term of it
    in :meth:`term`; the rest is here. What the first training step raises ends the fit; from then on a step in which
    anything fails goes without the term, with one warning.

    Args:
        layer: Name of the layer to capture.
        weight: Factor of the term.
        name: Name of its curves.
    """

    remedy: ClassVar[str] = ""
    """What to do instead in a module that optimizes by hand."""

    def __init__(self, layer: str | None, weight: Weight, name: str) -> None:
        super().__init__()
        require_weight(weight)
        self.layer = layer
        self.weight = weight
        self.name = name
        self._open = False
        self._tried = False
        self._detachers: list[Callable[[], None]] = []
        self._curves: dict[Curve, Tensor] = {}
        self._channels_first = False
        self._unreadable = ""
        self._warned: set[str] = set()
        self.containment = Containment(f"{type(self).__name__}(name={name!r})")
        self._finite = FiniteRows()

    @property
    def on(self) -> str | None:
        """The older name of :attr:`layer`, which YAML 1.1 reads as a boolean."""
        return self.layer

    @abstractmethod
    def hook(self, trainer: Trainer, pl_module: LightningModule) -> list[Callable[[], None]]:
        """Hook layers; returns functions that take the hooks off. May raise."""

    @abstractmethod
    def reset(self) -> None:
        """Let go of what was captured: nothing may keep a graph alive."""

    @abstractmethod
    def captured(self) -> list[Tensor]:
        """What was captured, for a term that is nothing but depends on it."""

    @abstractmethod
    def term(self, trainer: Trainer, batch: Any) -> Tensor | None:
        """What to add to the loss, from what was captured in the step on ``batch``; ``None`` for nothing."""

    def published(self, values: dict[str, float]) -> None:
        """Look at what the curves show at a logging step, terms by name, which is on the host anyway."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._finite = FiniteRows()  # of another fit; a checkpoint is loaded after this

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        # not in `setup`: `configure_model`, compilation and sharding come later
        self._detach()
        self._check(trainer, pl_module)
        self._tried = False
        let_hooks_be_seen(pl_module)
        self._detachers = self.hook(trainer, pl_module)

        def around(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            # validation and testing may call `training_step` too
            training = trainer.training and torch.is_grad_enabled()
            return self._run(trainer, step, *args, **kwargs) if training else step(*args, **kwargs)

        self._detachers.append(wrap_training_step(pl_module, around))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._curves:
            return
        due, first = terms_are_due(trainer), self._finite.expected is None
        with self.containment("publishing its curves", "they may have gaps"):
            if (due or first) and self._finite.look():
                self._warn_of_nonfinite(first)
            if due:
                quiet = () if self._finite.expected else ("nonfinite_rows",)
                numbers = publish_terms(trainer, pl_module, self._curves, unless_zero=quiet)
                self._finite.restart()
                self.published({term: number for (_, _, term), number in numbers.items()})
            else:
                offer_terms(trainer, self._curves)
        self._curves = {}

    def __getstate__(self) -> dict[str, Any]:
        return without_module(self) | {"_detachers": [], "_curves": {}}  # which hold on to the module of a running fit

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name, on=self.layer)  # the older name, in older checkpoints too

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "nonfinite_rows": True} if self._finite.expected else state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._finite.expected = state_dict.get("nonfinite_rows")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._detach()  # `teardown` is not called when the trainer fails
        try_again(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._detach()
        try_again(trainer)

    def add(self, trainer: Trainer, value: Tensor, terms: dict[str, Tensor]) -> Tensor:
        """The value with its weight, which the curves will show beside the terms."""
        total = weighted(self.weight, value, logging_step(trainer))
        self._curves = term_curves(self.name, total, {**terms, "nonfinite_rows": self._finite.left_out})
        return total

    def rows_of(self, output: Any) -> Tensor | None:
        """What a layer returned as rows; ``None`` where that cannot be had, and ``_unreadable`` says why."""
        try:
            rows = as_rows(output, self._channels_first)
        except Exception as error:
            self._unreadable = f", {error!r:.200}"
            return None
        # a copy: an operation in place further on, such as `ReLU(inplace=True)`, must not change it
        return None if rows is None else rows.clone()

    def find(self, pl_module: LightningModule, name: str) -> tuple[str, nn.Module]:
        """The one layer of a name or glob, and its clean name.

        Raises:
            MisconfigurationException: If there is none, or more than one.
        """
        asked = f"`{type(self).__name__}(layer={self.layer!r})`"
        try:
            found = find_modules(pl_module, [name])
        except ValueError as error:
            raise MisconfigurationException(f"{asked}: {error}") from None
        if len(found) != 1:
            raise MisconfigurationException(
                f"{asked} must name one layer, but matches {len(found)}: {', '.join(found)}."
            )
        [layer] = found.items()
        return layer

    def warn_once(self, kind: str, message: str) -> None:
        """Say something once per callback, on whichever process it happens."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        who = type(self).__name__
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"`{who}` adds to the loss that `training_step` returns, but {type(pl_module).__name__} optimizes by"
                f" hand. {self.remedy}"
            )
        twins = [c for c in trainer.callbacks if isinstance(c, AuxiliaryLoss) and c.name == self.name and c is not self]
        if twins:
            raise MisconfigurationException(
                f"Two `{who}`s are called {self.name!r}, on {self.layer!r} and {twins[0].layer!r}. Tell their curves"
                f" apart with `{who}(..., name=...)`."
            )

    def _warn_of_nonfinite(self, first: bool) -> None:
        """Rows were not finite; ``first`` in the first step."""
        self.warn_once(
            "nonfinite",
            f"`{type(self).__name__}(layer={self.layer!r})`: rows of the layer are NaN or infinite. They are left out"
            f" and counted in `regularizer/{self.name}/nonfinite_rows`.",
        )

    def _detach(self) -> None:
        for detach in self._detachers:
            detach()
        self._detachers = []
        self._curves = {}
        self._open = False
        self.reset()

    def _run(self, trainer: Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.reset()
        self._open = True
        try:
            output = step(*args, **kwargs)
            self._open = False
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, Tensor):
                return output
            term = self._term(trainer, args[0] if args else None)
        finally:
            self._open = False
            self.reset()
        if term is None:
            return output
        loss = loss + term
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _term(self, trainer: Trainer, batch: Any) -> Tensor | None:
        if not self._tried:
            term = self.term(trainer, batch)
            self._tried = True
            return term
        with self.containment("its term", "steps in which it fails go without it"):
            return self.term(trainer, batch)
        rows = self.captured()
        return nothing(*rows) if rows else None


def one_name(layer: str | None, on: str | None) -> str | None:
    """What a layer is given by under either name of the argument.

    Raises:
        ValueError: If it is given under both.
    """
    if layer is not None and on is not None:
        raise ValueError(f"`on` is the older name of `layer`, and both are given: {layer!r} and {on!r}. Drop `on`.")
    return on if layer is None else layer
