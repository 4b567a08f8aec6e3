"""Nested dropout: only the first features are kept, a random number of them, so that features are ordered by use."""

import math
from itertools import accumulate

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.arguments import require_positive, require_whole
from lightning_collapse.utilities.hashing import GOLDEN, hashed
from lightning_collapse.utilities.modules import in_backward


class NestedDropout(nn.Module):
    r"""In training keeps the first ``k`` features of all rows, and sets the others to zero; ``k`` is drawn per call.

    .. math:: P(k) \propto e^{-((k - \mu) / \sigma)^2}, \qquad k = 1, \dots, D

    What is needed most moves to the front, and a network can be cut to any width afterwards: :meth:`evaluate` tries
    one, and a curve of the score over ``k`` shows how many features count. What is kept is not scaled up. The paper
    draws ``k`` from a geometric distribution; this one is that of a public implementation.

    ``k`` depends on the seed and on how many calls there have been, which the state holds: it is the same on all
    processes, goes on after a resume, takes no random number of the training, and nothing waits for the device.
    Activation checkpointing repeats the latest ``k``, so it must not surround two calls of one layer in a step.

    Args:
        dim: Number of features ``D``, in the last dimension.
        sigma: σ, how many features are kept mostly.
        mu: μ.
        seed: Of the draws.

    Attributes:
        calls: Number of calls in training, 0-dimensional.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Rippel, Gelbart & Adams, *Learning Ordered Representations with Nested Dropout*, ICML 2014.
        https://arxiv.org/abs/1402.0915

    Example:
        >>> layer, features = NestedDropout(dim=4, sigma=2.0), torch.ones(2, 4)
        >>> layer(features).sum(dim=1).unique().numel()
        1
        >>> layer.eval().evaluate(3)(features)[0].tolist()
        [1.0, 1.0, 1.0, 0.0]
    """

    thresholds: Tensor
    calls: Tensor

    def __init__(self, dim: int, sigma: float, mu: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        require_whole(1, dim=dim)
        require_positive(sigma=sigma)
        self.dim, self.sigma, self.mu, self.seed = dim, sigma, mu, seed
        self.kept: int | None = None
        self.register_buffer("thresholds", torch.empty(dim, dtype=torch.int64), persistent=False)
        self.register_buffer("calls", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin the draws anew; also what fills a layer that was built on the ``meta`` device."""
        squares = [((k - self.mu) / self.sigma) ** 2 for k in range(1, self.dim + 1)]
        sums = list(accumulate(math.exp(min(squares) - square) for square in squares))
        # integers, which no cast of the model rounds
        self.thresholds.copy_(torch.tensor([int(part / sums[-1] * 2**53) for part in sums]))
        self.calls.zero_()

    def evaluate(self, k: int | None = None) -> "NestedDropout":
        """Keep the first ``k`` features in evaluation from now on, or all; returns the layer itself.

        Raises:
            ValueError: If ``k`` is not between 1 and ``D``.
        """
        if k is not None and not 1 <= k <= self.dim:
            raise ValueError(f"`k` must be from 1 to {self.dim}, or None for all features, got {k}.")
        self.kept = k
        return self

    def draw(self) -> Tensor:
        """The ``k`` of the next call in training, 0-dimensional, on the device of the layer."""
        bits = hashed(hashed(self.calls * GOLDEN + self.seed)) & (2**53 - 1)
        return 1 + (bits >= self.thresholds[:-1]).sum()

    def forward(self, features: Tensor) -> Tensor:
        """Features ``(..., D)``, the last ones set to zero."""
        if not self.training:
            return features if self.kept is None else self._first(features, self.kept)
        again = in_backward()  # activation checkpointing
        if again:
            self.calls -= 1
        kept = self.draw()
        self.calls += 1
        return self._first(features, kept)

    def _first(self, features: Tensor, kept: Tensor | int) -> Tensor:
        return torch.where(torch.arange(self.dim, device=features.device) < kept, features, 0.0)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"dim={self.dim}, sigma={self.sigma}, mu={self.mu}"
