"""What every anti-collapse loss is: named terms, their coefficients, and the values they take at both ends."""

from typing import ClassVar, Literal

from torch import Tensor, nn


class TooFewRowsError(ValueError):
    """The batch has fewer rows, over all processes, than the loss needs; raised on all processes alike."""


class AntiCollapseLoss(nn.Module):
    """A loss on representations: a weighted sum of named terms.

    A subclass sets ``views`` and ``coefficients`` and writes :meth:`terms`. Losses are plain modules: they work in any
    training loop, hold no parameter, and give the single-process value and gradient on the concatenated batch when
    they are evaluated in data-parallel training (collective: every process must call them).

    Attributes:
        views: How many feature matrices it takes: 1, or 2 for a pair of augmented views.
        coefficients: Factor of each term in the sum.
    """

    views: ClassVar[Literal[1, 2]] = 1
    coefficients: dict[str, float]

    def terms(self, *views: Tensor) -> dict[str, Tensor]:
        """The unweighted terms by name, each a scalar of at least ``float32``.

        Args:
            views: As many as :attr:`views` says, each of shape ``(N, D)``.
        """
        raise NotImplementedError

    def forward(self, *views: Tensor) -> Tensor:
        """Weighted sum of the terms, a scalar of at least ``float32``; ``views`` of shape ``(N, D)`` each.

        Raises:
            ValueError: If there are more or fewer than :attr:`views` of them.
        """
        if len(views) != self.views:
            raise ValueError(f"`{type(self).__name__}` takes {self.views} feature matrices, got {len(views)}.")
        return self.combine(self.terms(*views))

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of what :meth:`terms` returned."""
        first, *rest = (coefficient * terms[name] for name, coefficient in self.coefficients.items())
        return sum(rest, start=first)

    @property
    def value_at_perfection(self) -> float:
        """What the loss reads on an ideal representation: views that agree, whitened, with enough rows."""
        return 0.0

    @property
    def value_at_collapse(self) -> float:
        """What the loss reads when all rows of all views are equal."""
        raise NotImplementedError

    def perfection(self, samples: int, dim: int) -> float:
        """:attr:`value_at_perfection` for ``samples`` rows, over all processes, of ``dim`` features."""
        return self.value_at_perfection

    def collapse(self, samples: int, dim: int) -> float:
        """:attr:`value_at_collapse` for ``samples`` rows, over all processes, of ``dim`` features."""
        return self.value_at_collapse


def require_positive(**values: float) -> None:
    """Raise a ``ValueError`` that names the first argument that is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")


def evaluate(loss: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of any loss module, and its unweighted terms if it is an :class:`AntiCollapseLoss`.

    Args:
        loss: A module that maps feature matrices to a scalar.
        views: Feature matrices of shape ``(N, D)``.

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
