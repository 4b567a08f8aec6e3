"""Prototype memory: class means of a layer, kept from task to task, in place of samples of old tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from random import Random
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.continual.task_aware import TaskAware
from lightning_collapse.callbacks.evaluation.evaluation_pass import EvaluationPass, check_forward
from lightning_collapse.callbacks.evaluation.preserved_fit import preserved_fit
from lightning_collapse.callbacks.evaluation.task_batches import TaskBatches, check_training_data
from lightning_collapse.functional.prototypes.hardness import sample_prototypes
from lightning_collapse.functional.prototypes.scores import unit_rows
from lightning_collapse.metrics.class_prototypes import ClassPrototypes
from lightning_collapse.monitoring.batch_labels import BatchLabels
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.utilities.distributed import max_over_processes, process_rank
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.modules import Tap, find_taps, let_hooks_be_seen


class PrototypeMemory(TaskAware):
    """Keeps a mean of every class that a task has taught, and draws pseudo-features of old classes from them.

    When a task ends, its data pass through the module once more, in eval mode; classes that it holds get the mean of
    what the layer returns, all others keep theirs. The means are of all processes; its state holds them, so that a
    resumed run draws what the interrupted one would have drawn.

    Args:
        layer: Whose output is the feature of a head, by name or by a glob that matches one; ``"head:input"`` for what
            a module receives.
        loader: Batches of the task, or a function that returns them; ``None`` for those of the training.
        labels: From a batch to its classes; ``None`` where they usually are.
        inputs: How the module is called on a batch, ``lambda module, batch: module(batch[0])``.
        normalize: Divide features, and prototypes, by their length, as Happy does.
        seed: Of all that is drawn; no other random state is touched.

    Attributes:
        prototypes: Shape ``(C, D)``, ``float32``, NaN for a class of no task; ``None`` before the first task has ended.
        radius: Spread of the features within a class when the first task ended, see
            :class:`~lightning_collapse.metrics.ClassPrototypes`; 0-dimensional.

    Raises:
        ValueError: If an argument is of another type.
        MisconfigurationException: At the start of the fit, if no one layer is so called, the module has no ``forward``,
            or the training data cannot be read twice.

    Example::

        memory = PrototypeMemory("body")
        for task in tasks:
            Trainer(callbacks=[memory]).fit(model, task)  # whose step asks `memory.sample(64)`
    """

    def __init__(
        self,
        layer: str,
        loader: Loader | None = None,
        labels: Callable[[Any], Tensor] | None = None,
        inputs: Callable[[LightningModule, Any], Any] | None = None,
        normalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(layer, str):
            raise ValueError(f"`layer` must be a name, as `named_modules()` has it, got {layer!r}.")
        if labels is not None and not callable(labels):
            raise ValueError(f"`labels` takes a function from a batch to its classes, got {labels!r}.")
        if inputs is not None and not callable(inputs):
            raise ValueError(f"`inputs` takes a function of the module and a batch, got {inputs!r}.")
        self.layer, self.loader, self.labels, self.inputs = layer, loader, labels, inputs
        self.normalize, self.seed = normalize, seed
        self.prototypes: Tensor | None = None
        self.radius = torch.tensor(0.0)
        self._draws = 0
        self._dtype = torch.float32

    def sample(self, n: int, temperature: float = 0.1) -> tuple[Tensor, Tensor] | None:
        """Pseudo-features and their classes, :func:`~lightning_collapse.functional.prototypes.sample_prototypes`.

        Every process draws others. Waits for nothing.

        Args:
            n: How many, for each process.
            temperature: Of the hardness.

        Returns:
            Shape ``(n, D)``, in the dtype of the module, and ``int64`` ``(n,)``; ``None`` before the first task has
            ended.
        """
        if self.prototypes is None:
            return None
        generator = torch.Generator(self.prototypes.device)
        generator.manual_seed(Random(f"{self.seed} {process_rank()} {self._draws}").getrandbits(63))
        self._draws += 1
        features, labels = sample_prototypes(self.prototypes, self.radius, n, generator, temperature)
        return features.to(self._dtype), labels

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._tap(pl_module)
        check_forward(pl_module, self.inputs, "`PrototypeMemory`")
        if self.prototypes is not None:
            self.prototypes, self.radius = self.prototypes.to(pl_module.device), self.radius.to(pl_module.device)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._dtype = pl_module.dtype if isinstance(pl_module.dtype, torch.dtype) else torch.float32
        if self.loader is None:
            check_training_data(trainer, "`PrototypeMemory`")

    @override
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        make = partial(ClassPrototypes, normalize=self.normalize, dtype=accumulation_dtype(device))
        seen: list[ClassPrototypes] = []

        def take(rows: Tensor, labels: Tensor) -> None:
            if not seen:
                seen.append(make(rows.shape[1]).to(device))
            seen[0].update(rows, labels)

        warn, batches = cache(rank_zero_warn), TaskBatches(trainer, self.loader)  # once, and not for every batch
        find = BatchLabels(self.labels, pl_module, warn)
        reader = EvaluationPass(self._tap(pl_module), batches, self.inputs, find, find.matching, warn)
        try:
            with preserved_fit(trainer, pl_module):
                passed = reader.each(trainer, pl_module, take)
        finally:
            reader.remove()
        [dim] = max_over_processes([seen[0].dim if seen else 0], device)
        found = None
        if passed and dim:  # a process without rows takes part in the sums
            found = (seen[0] if seen else make(int(dim)).to(device)).compute()
        if found is None or bool(found["radius"].isnan()):  # waits for the device, once per task
            rank_zero_warn(
                f"`PrototypeMemory`: task {self.task_index} leaves no prototypes, since no row had a class. Those of"
                " earlier tasks stay."
            )
            return
        self._keep(found["prototypes"].reshape(-1, int(dim)).float(), found["radius"].float())

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(layer=self.layer, normalize=self.normalize, seed=self.seed)

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {"prototypes": self.prototypes, "radius": self.radius, "draws": self._draws}
        return {**super().state_dict(), **kept}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.prototypes, self.radius, self._draws = (state_dict[name] for name in ("prototypes", "radius", "draws"))

    def _tap(self, pl_module: LightningModule) -> Tap:
        let_hooks_be_seen(pl_module)
        try:
            tap, *others = find_taps(pl_module, [self.layer])
            if others:
                raise ValueError(f"it matches {len(others) + 1}, as {tap.name} and {others[0].name}.")
        except ValueError as error:
            told = f"`PrototypeMemory(layer={self.layer!r})` must name one layer: {error}"
            raise MisconfigurationException(told) from None
        return tap

    def _keep(self, new: Tensor, radius: Tensor) -> None:
        old, new = self.prototypes, unit_rows(new) if self.normalize else new
        if old is not None and old.shape[1] != new.shape[1]:
            rank_zero_warn(
                f"`PrototypeMemory(layer={self.layer!r})`: the layer has {new.shape[1]} features now, and prototypes of"
                f" earlier tasks have {old.shape[1]}: they are dropped. Keep its width."
            )
            old = None
        if old is None:
            old, self.radius = new, radius
        kept = new.new_full((max(len(old), len(new)), new.shape[1]), torch.nan)
        kept[: len(old)] = old
        kept[: len(new)] = torch.where(new.isnan(), kept[: len(new)], new)
        self.prototypes = kept
