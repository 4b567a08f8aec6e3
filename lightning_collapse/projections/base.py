"""Update projection: takes out of an optimizer's update what would change old tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_collapse.penalties.support.fisher_pass import Outputs
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.distributed import max_over_processes
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.modules import clean_name, find_modules
from lightning_collapse.utilities.parameters import why_no_number


class UpdateProjection(ABC):
    """What old tasks need of parameters, and updates without it: a plain object, for any training loop.

    The update that an optimizer has made is projected, not the gradient that it is given: momentum, the element-wise
    scaling of Adam and weight decay would lead out of what a gradient was projected on. A training loop calls::

        projection.start(model)                         # before the first step of a task
        before = {name: p.detach().clone() for name, p in projection.parameters.items()}
        optimizer.step()
        projection.project_(projection.parameters, before)
        projection.learn(model, loader)                 # after the last step of a task

    :class:`~lightning_collapse.Projection` does so for you.

    Args:
        n_samples: How many samples of a task :meth:`learn` reads, of all processes together.

    Attributes:
        parameters: Those that it acts on, by name, since :meth:`start`.
        frozen: Names of those among them that keep their values from the second task on.
        learned: How many tasks it knows of.
        joint: Whether all parameters have to move in one step of one optimizer.

    Raises:
        ValueError: If ``n_samples`` is no positive integer.

    Example:
        >>> from lightning_collapse.projections import GPM
        >>> isinstance(GPM(), UpdateProjection)
        True
    """

    joint: ClassVar[bool] = False

    def __init__(self, n_samples: int) -> None:
        require_whole(1, n_samples=n_samples)
        self.n_samples = n_samples
        self.learned = 0
        self.frozen: list[str] = []
        self.parameters: dict[str, Tensor] = {}

    def start(self, model: nn.Module, layers: Sequence[str] | None = None, freeze: bool = True) -> None:
        """Meet the parameters, at the start of every fit.

        Args:
            model: Whose.
            layers: Names of modules, or glob patterns of them, each with all inside it; what lies outside is free. All
                by default.
            freeze: Whether what is inside and cannot be projected keeps its values from the second task on.

        Raises:
            ValueError: If a pattern matches nothing, nothing can be projected, a parameter is kept in less than 32
                bits or sharded so that it cannot be, or a layer has another width than when a task was learned.
        """
        roots = list(find_modules(model, layers).values()) if layers is not None else [model]
        inside = {id(parameter) for root in roots for parameter in root.parameters()}
        if lazy := [name for name, p in model.named_parameters() if id(p) in inside and nn.parameter.is_lazy(p)]:
            raise ValueError(f"`{lazy[0]}` has no shape yet. Run the model on a batch before the fit.")
        named = {
            clean_name(name): parameter
            for name, parameter in model.named_parameters()
            if id(parameter) in inside and parameter.requires_grad and not why_no_number(parameter)
        }
        covered = self._cover(model, named)
        for name, parameter in covered.items():
            if parameter.dtype.itemsize < 4:
                raise ValueError(
                    f"`{name}` is kept in {parameter.dtype}, in which weights leave the directions that they may move"
                    " in by rounding: a third of the way after 1000 small steps. Keep master weights in float32:"
                    " `precision='bf16-mixed'`."
                )
        self.frozen = [name for name in named if name not in covered] if freeze else []
        self.parameters = covered | {name: named[name] for name in self.frozen}

    @abstractmethod
    def _cover(self, model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which of the parameters it can project; raises ``ValueError`` as :meth:`start` does."""

    @abstractmethod
    def learn(self, model: nn.Module, loader: Loader, outputs: Outputs | None = None) -> None:
        """Learn what the task that ends needs: one pass in eval mode that the model does not notice. Collective.

        Args:
            model: Where the task has led it.
            loader: Batches of the task, or a function that returns them; of each process its own.
            outputs: How the model is called on a batch; by default on the first of a pair.

        Raises:
            ValueError: If there are no samples.
        """

    @abstractmethod
    def project_(self, now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        """Take out of an update what old tasks need, in place; nothing waits for the device.

        Args:
            now: Parameters that have moved, by name.
            before: Where they were; overwritten.
        """

    @abstractmethod
    def readings(self) -> dict[str, dict[str, float]]:
        """By layer, the number of directions it protects (``rank``) and the share still free (``capacity_left``)."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it keeps at most, and :meth:`learn` needs, for the parameters it has met."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is remembered: tensors, numbers and dicts."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` returned."""

    def release(self) -> None:
        """Let go of the model, not of what was learned."""
        self.parameters = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "parameters": {}}  # of a copy: not the model


def raise_together(problem: Exception | None, device: torch.device) -> None:
    """Raise on every process what has gone wrong on any, so that none waits for another. Collective."""
    if any(max_over_processes([problem is not None], device)):
        raise problem or RuntimeError("the pass over the data failed in another process")
