"""Growing classifier: a last layer to which classes are added from task to task (class-incremental learning)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.utilities.arguments import require_one_of, require_whole
from lightning_collapse.utilities.distributed import world_size

Init = Literal["default", "old"]


@torch.no_grad()
def grow_head(head: nn.Linear, classes: int, optimizers: Iterable[Optimizer] = (), init: Init = "default") -> None:
    """Add rows for new classes to the last layer of a classifier, in place; the rows that are there stay, bit by bit.

    The place is *before* a fit, or between two: optimizers, schedulers and data-parallel wrappers are new then and
    know the new parameters, and penalties give the new rows no importance until their task ends. Within a fit the
    optimizers must be told. What they remember of old rows is kept, that of new ones is zero, learning rates and
    schedulers stay. Adam counts steps for all rows together, so that its first step on a new row is
    ``(1 - beta1) / sqrt(1 - beta2)`` times the learning rate, 3.2 at its defaults.

    Args:
        head: The layer, ``(C, D)``.
        classes: Number of classes afterwards, at least ``C``.
        optimizers: That train it in the fit that is running, if one is.
        init: Of new rows: ``"default"`` as ``nn.Linear`` does, or ``"old"``, normal with the mean square of the old
            weights, and the mean of the old biases, so that trained classes do not outshine new ones by their norm
            alone. Both draw from the global generator.

    Raises:
        ValueError: If there would be fewer classes, the layer is sharded or no linear one, or optimizers are given
            while several processes train, whose data-parallel wrapper would not reduce the new parameters.

    Example:
        >>> head = nn.Linear(4, 2)
        >>> before = head.weight.clone()
        >>> grow_head(head, 5)
        >>> head, torch.equal(head.weight[:2], before)
        (Linear(in_features=4, out_features=5, bias=True), True)
    """
    optimizers = list(optimizers)
    _check(head, classes, optimizers, init)
    old = head.out_features
    if classes == old:
        return
    new = nn.Linear(
        head.in_features, classes - old, head.bias is not None, device=head.weight.device, dtype=head.weight.dtype
    )
    if init == "old":
        new.weight.normal_(std=float(head.weight.float().square().mean().sqrt()))
        if head.bias is not None:
            new.bias.fill_(float(head.bias.float().mean()))
    for name, parameter in list(head.named_parameters(recurse=False)):
        rows = torch.cat([parameter, new.get_parameter(name)])
        grown = nn.Parameter(rows, requires_grad=parameter.requires_grad)
        setattr(head, name, grown)
        for optimizer in optimizers:
            _replace(optimizer, parameter, grown)
    head.out_features = classes


class GrowingClassifier(nn.Linear):
    """A linear layer that grows, by ``grow`` or by what a checkpoint holds.

    A checkpoint with more classes makes it grow before it is loaded, so that a model that was built for the first task
    resumes a later one. One with fewer classes fills the first rows; the others stay as they are, with a warning.

    Args:
        in_features: Width ``D`` of the features.
        classes: Number of classes ``C`` at first.
        bias: Whether there is a bias.
        init: Of new rows, see ``grow_head``.

    Raises:
        ValueError: If a size is not positive, or ``init`` is neither.

    Example:
        >>> head = GrowingClassifier(4, classes=2)
        >>> saved = GrowingClassifier(4, classes=3).state_dict()
        >>> head.load_state_dict(saved), head.classes
        (<All keys matched successfully>, 3)
        >>> head.grow(5)
        >>> head(torch.ones(1, 4)).shape
        torch.Size([1, 5])
    """

    def __init__(self, in_features: int, classes: int, bias: bool = True, init: Init = "default") -> None:
        require_whole(1, in_features=in_features, classes=classes)
        require_one_of(("default", "old"), init=init)
        super().__init__(in_features, classes, bias)
        self.init: Init = init

    @property
    def classes(self) -> int:
        """Number of classes now."""
        return self.out_features

    def grow(self, classes: int, optimizers: Iterable[Optimizer] = ()) -> None:
        """Have so many classes in all, see :func:`grow_head`."""
        grow_head(self, classes, optimizers, self.init)

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}weight")
        if isinstance(saved, Tensor) and saved.ndim == 2 and saved.shape[1] == self.in_features:
            if len(saved) > self.classes:
                rank_zero_info(f"`{prefix[:-1]}` grows from {self.classes} classes to {len(saved)} of the checkpoint.")
                self.grow(len(saved))
            elif len(saved) < self.classes:
                rank_zero_warn(
                    f"`{prefix[:-1]}` has {self.classes} classes, and the checkpoint {len(saved)}: it fills the first"
                    " rows, the others stay untrained as they are."
                )
                for name, own in self.named_parameters(recurse=False):
                    part = state_dict.get(f"{prefix}{name}")
                    if isinstance(part, Tensor):
                        state_dict[f"{prefix}{name}"] = torch.cat([part.to(own), own.detach()[len(part) :]])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check(head: nn.Module, classes: int, optimizers: list[Optimizer], init: str) -> None:
    require_one_of(("default", "old"), init=init)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"`head` takes a linear layer, got {type(head).__name__}. Name the last layer of the model.")
    require_whole(1, classes=classes)
    if classes < head.out_features:
        raise ValueError(
            f"`classes` is the number afterwards and must be at least {head.out_features}, those there are, got"
            f" {classes}. A head does not shrink: mask logits of classes that are gone instead."
        )
    if hasattr(head.weight, "full_tensor"):
        raise ValueError("`head` is sharded. Let it grow before `fully_shard`, between two fits.")
    if optimizers and world_size() > 1:
        raise ValueError(
            "`optimizers` are given while several processes train, and their data-parallel wrapper does not know new"
            " parameters. Let the head grow between two fits, without `optimizers`, as `fit_tasks` does."
        )


def _replace(optimizer: Optimizer, old: Tensor, new: Tensor) -> None:
    """The grown parameter in place of the old one, with what is remembered of it; zero where it is new."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = value.new_zeros(new.shape)
            state[key][: len(value)] = value
    optimizer.state[new] = state
