"""Anti-collapse loss, the base class: named terms, their coefficients, and the values they take at both ends."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from lightning_collapse.utilities.arguments import require_finite

TakesLabels = Literal["classes", "targets"] | None
"""What the labels of a loss are."""


class TooFewRowsError(ValueError):
    """The batch, over all processes, has fewer rows than the loss needs; raised on all of them alike.

    Example:
        >>> import torch
        >>> from lightning_collapse.losses import variance_loss
        >>> try:
        ...     variance_loss(torch.ones(1, 3))
        ... except TooFewRowsError as error:
        ...     print(str(error).partition(",")[0])
        `variance_loss` needs at least 2 rows over all processes
    """


class AntiCollapseLoss(nn.Module):
    """A loss on representations: a weighted sum of named terms.

    A subclass sets ``views`` and ``coefficients`` and writes :meth:`terms`. Losses are plain modules: they work in any
    training loop, hold no parameter, and give the single-process value and gradient on the concatenated batch when
    they are evaluated in data-parallel training (collective: every process must call them).

    Attributes:
        views: How many feature matrices it takes: 1, or 2 for a pair of augmented views.
        takes_labels: What its last argument holds of each row, shape ``(N,)``: ``"classes"``, integers, or
            ``"targets"``, numbers; ``None`` if it takes no labels. Row ``i`` of both views is of label ``i``. One that
            has parameters is for :class:`~lightning_collapse.AntiCollapseMixin`.
        source: Authors, year, identifier, and which form it is, for the tables.
        constants: Names of buffers that the arguments decide. All others are what the loss remembers: the state of
            :class:`~lightning_collapse.Regularizer` and the checkpoints of
            :class:`~lightning_collapse.AntiCollapseMixin` hold them.
        coefficients: Factor of each term in the sum; a ``ValueError`` if one is not finite.

    Example:
        >>> import torch
        >>> class Length(AntiCollapseLoss):
        ...     views, coefficients = 1, {"length": 1.0}
        ...     def terms(self, features):
        ...         return {"length": features.norm(dim=1).mean()}
        >>> Length()(torch.tensor([[3.0, 4.0]]))
        tensor(5.)
    """

    views: ClassVar[Literal[1, 2]] = 1
    takes_labels: ClassVar[TakesLabels] = None
    source: ClassVar[str] = ""
    constants: ClassVar[tuple[str, ...]] = ()

    _coefficients: dict[str, float]

    @property
    def coefficients(self) -> dict[str, float]:
        """Factor of each term in the sum."""
        return self._coefficients

    @coefficients.setter
    def coefficients(self, coefficients: dict[str, float]) -> None:
        require_finite(**coefficients)
        self._coefficients = coefficients

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """The unweighted terms by name, each a scalar of at least ``float32``.

        Args:
            views: As many as :attr:`views` says, each of shape ``(N, D)``, then the labels if it takes them.
        """
        raise NotImplementedError

    def forward(self, *views: Tensor) -> Tensor:
        """Weighted sum of the terms, a scalar of at least ``float32``; ``views`` of shape ``(N, D)`` each.

        Raises:
            ValueError: If there are more or fewer arguments than :attr:`views` and ``takes_labels`` say, or if one
                is no tensor.
        """
        if len(views) != self.views + bool(self.takes_labels):
            wanted = f"{self.views} feature matrices" + (" and their labels" if self.takes_labels else "")
            raise ValueError(f"`{type(self).__name__}` takes {wanted}, got {len(views)}.")
        if other := [type(view).__name__ for view in views if not isinstance(view, Tensor)]:
            told = "Pass each as a tensor, such as `torch.stack(...)` of rows or `torch.cat(..., dim=1)` of columns."
            raise ValueError(f"`{type(self).__name__}` takes tensors, got {', '.join(other)}. {told}")
        return self.combine(self.terms(*views))

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of what :meth:`terms` returned."""
        first, *rest = (coefficient * terms[name] for name, coefficient in self.coefficients.items())
        return sum(rest, start=first)

    def remark(self, values: Mapping[str, float]) -> str | None:
        """What there is to say, once, of terms that were read for the curves; called at logging steps.

        Args:
            values: The unweighted terms by name, on the host, the same on every process.

        Returns:
            A warning, or ``None`` for nothing.
        """
        return None

    @property
    def value_at_perfection(self) -> float:
        """What the loss reads on an ideal representation: views that agree, whitened, with enough rows."""
        return 0.0

    @property
    def value_at_collapse(self) -> float:
        """What the loss reads when all rows of all views are equal."""
        raise NotImplementedError

    def at_perfection(self, rows: int, dim: int) -> float:
        """:attr:`value_at_perfection`, which for some losses depends on the shape of the global batch."""
        return self.value_at_perfection

    def at_collapse(self, rows: int, dim: int) -> float:
        """:attr:`value_at_collapse`, which for some losses depends on the shape of the global batch."""
        return self.value_at_collapse


def evaluate(loss: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of any loss module, and its unweighted terms if it is an :class:`AntiCollapseLoss`.

    Args:
        loss: A module that maps feature matrices to a scalar.
        views: Feature matrices of shape ``(N, D)``, then the labels if the loss takes them.

    Returns:
        The scalar and the terms by name, empty for a module that has none.
    """
    if not isinstance(loss, AntiCollapseLoss):
        value: Tensor = loss(*views)
        return value, {}
    terms = loss.terms(*views)
    return loss.combine(terms), terms


def nothing(*views: Tensor) -> Tensor:
    """A zero that depends on all ``views``, so that data-parallel training still sees their parameters take part."""
    first, *rest = (view[:0].float().sum() for view in views)
    return sum(rest, start=first)
