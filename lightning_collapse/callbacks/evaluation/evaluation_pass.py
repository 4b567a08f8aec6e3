"""Evaluation pass: class statistics of clean data in eval mode, in the middle of a fit that must not notice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_collapse.callbacks.evaluation.preserved_fit import batches_on_device, preserved_fit
from lightning_collapse.functional.neural_collapse.nc4 import agreement_of_classifier
from lightning_collapse.monitoring.feature_hooks import Captured, FeatureHooks
from lightning_collapse.spectral.seen_classes import SeenClasses, SeenClassMoments
from lightning_collapse.utilities.distributed import all_reduce_sum, max_over_processes
from lightning_collapse.utilities.features import padding_mask
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.modules import Tap
from lightning_collapse.utilities.targets import call_on
from lightning_collapse.utilities.weight_matrices import whole

PER_DECADE = 8
"""Epochs with a pass in every factor of ten; the notebook of Papyan et al. has about 27, ours are cheaper."""

Inputs = Callable[[LightningModule, Any], Any]


class EvaluationReading(NamedTuple):
    """What a pass brought, of all processes.

    Attributes:
        seen: Statistics of the classifier's inputs.
        agreement: On how many rows classifier and nearest class mean agree, and of how many, ``(2,)``.
    """

    seen: SeenClasses
    agreement: Tensor


class EvaluationPass:
    """Class statistics of a classifier's inputs over a whole loader, twice: the second time for NC4.

    Every submodule is in eval mode meanwhile, whatever its own ``train`` method would do, the trainer says that it
    validates, and no gradient is kept; flags, stage, random states and the generators of a ``DataLoader`` are put back.
    What the loader or the model raises is a warning. Where parameters are sharded see
    :func:`~lightning_collapse.callbacks.evaluation.preserved_fit.batches_on_device`.

    Args:
        tap: The classifier's input.
        loader: Batches, or a function that returns them.
        inputs: How the model is called on a batch; see
            :func:`~lightning_collapse.utilities.targets.call_on`.
        labels_of: Labels of a batch, or ``None``.
        match: Labels of the rows that were captured, or ``None``.
        warn: What to do with a warning.
    """

    def __init__(
        self,
        tap: Tap,
        loader: Loader,
        inputs: Inputs | None,
        labels_of: Callable[[Any], Tensor | None],
        match: Callable[[Captured, Tensor], Tensor | None],
        warn: Callable[[str], None],
    ) -> None:
        self.tap = tap
        self.loader = loader
        self.inputs = inputs or call_on
        self.labels_of, self.match, self.warn = labels_of, match, warn
        self._taps = FeatureHooks([tap], limit=sys.maxsize)

    def remove(self) -> None:
        """Stop listening."""
        self._taps.remove()

    def run(self, trainer: Trainer, pl_module: LightningModule, moments: SeenClassMoments) -> EvaluationReading | None:
        """Fill ``moments`` and compare with their means; ``None`` if that failed on any process. Collective."""
        with preserved_fit(trainer, pl_module):
            if not self.each(trainer, pl_module, moments.update):
                return None
            found = moments.reduce()
            classifier: Any = self.tap.module
            weight, bias = whole(classifier.weight), getattr(classifier, "bias", None)
            bias = None if bias is None else whole(bias)
            agreement = found.moments.shift.new_zeros(2)

            def compare(rows: Tensor, labels: Tensor) -> None:
                named = (labels >= 0) & (labels < len(weight))
                rows = rows.to(agreement).masked_fill(~named.unsqueeze(1), torch.nan)  # such a row does not count
                means = found.moments.means, found.moments.count, found.classes
                agreement.add_(torch.stack(agreement_of_classifier(rows, weight, bias, *means)))

            if not self.each(trainer, pl_module, compare):
                agreement.zero_()
            return EvaluationReading(found, all_reduce_sum(agreement))

    def each(self, trainer: Trainer, pl_module: LightningModule, take: Callable[[Tensor, Tensor], None]) -> bool:
        """Give ``take`` the rows and labels of every batch, and say whether all processes could."""
        problem = ""
        try:
            for batch, counts in batches_on_device(self.loader, trainer, pl_module):
                rows, labels = self._capture(trainer, pl_module, batch)
                if counts and rows is not None and labels is not None:
                    take(rows, labels)
        except Exception as error:  # of the user's loader or model: what is only watched goes on
            problem = f"{type(error).__name__}: {error}"
        finally:
            self._taps.armed = False
            self._taps.pop()
        [failed] = max_over_processes([bool(problem)], pl_module.device)
        if failed:
            self.warn(
                f"a pass over `loader` failed, and what it was for is left out: {problem or 'in another process'}."
                " How the model is called on a batch can be said with `inputs=lambda module, batch: ...`."
            )
        return not failed

    def _capture(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> tuple[Tensor | None, Tensor | None]:
        labels = self.labels_of(batch)
        self._taps.armed, self._taps.mask = labels is not None, padding_mask(batch)
        with trainer.precision_plugin.forward_context():
            self.inputs(pl_module, batch)
        self._taps.armed = False
        captured = self._taps.pop().get(self.tap.name)
        if labels is None or captured is None:
            return None, None
        return captured.rows, self.match(captured, labels)


def is_pass_due(trainer: Trainer, epochs: Collection[int] | None) -> bool:
    """Whether the epoch that ends now ends in a pass."""
    epoch = trainer.current_epoch + 1
    if epochs is not None:
        return epoch in epochs
    last = epoch == trainer.max_epochs or 0 < trainer.max_steps <= trainer.global_step
    return last or is_log_spaced(epoch)


def is_log_spaced(epoch: int) -> bool:
    """Whether a number is among 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32, 42, 56, 75, 100, 133 and so on.

    The powers of :math:`10^{1/8}`, rounded.
    """
    power, found = 0, 0
    while found < epoch:
        found, power = round(10 ** (power / PER_DECADE)), power + 1
    return found == epoch


def has_forward(pl_module: LightningModule) -> bool:
    """Whether a module can be called: by its class, or by a function it was given."""
    return type(pl_module).forward is not LightningModule.forward or "forward" in vars(pl_module)


def check_forward(
    pl_module: LightningModule, call: Any, who: str = "The pass over `loader`", argument: str = "inputs"
) -> None:
    """Refuse a module that cannot be called.

    Raises:
        MisconfigurationException: If it has no ``forward``, and ``call``, what the user passed as ``argument``, is
            ``None``.
    """
    if call is None and not has_forward(pl_module):
        raise MisconfigurationException(
            f"{who} calls the module, and {type(pl_module).__name__} has no `forward`. Write one, or say how it is"
            f" called on a batch: `{argument}=lambda module, batch: module.net(batch[0])`."
        )


def check_pass(loader: Any, epochs: Any, inputs: Any) -> None:
    """Refuse what no pass can be made with.

    Raises:
        ValueError: If an argument is of the wrong kind, or there is no loader for the others.
    """
    if isinstance(loader, str | Mapping) or not (loader is None or isinstance(loader, Iterable) or callable(loader)):
        raise ValueError(
            f"`loader` takes an iterable of batches, or a function without arguments that returns one, got {loader!r}."
        )
    if epochs is not None and (
        isinstance(epochs, str)
        or not isinstance(epochs, Collection)
        or not epochs
        or not all(isinstance(epoch, int) and epoch >= 1 for epoch in epochs)
    ):
        raise ValueError(
            f"`epochs` takes whole numbers of at least 1, after how many epochs to pass over the loader, or None for a"
            f" logarithmic spacing, got {epochs!r}."
        )
    if inputs is not None and not callable(inputs):
        raise ValueError(f"`inputs` takes a function of the module and a batch, got {inputs!r}.")
    for name, value in (("epochs", epochs), ("inputs", inputs)):
        if value is not None and loader is None:
            raise ValueError(f"`{name}` is about the pass over `loader`, and there is none, got {value!r}. Pass both.")
