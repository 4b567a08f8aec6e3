"""Token similarity: how far the tokens of one sequence are from being one vector (rank collapse, over-smoothing)."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision

DOCUMENTS = 64
"""Documents that are told apart in one packed row; tokens of further ones do not count."""
LARGEST_RATIO = 1e6
"""What the ratio of mean to centered part is capped at: of equal tokens only rounding is left of the latter."""


class TokenMoments(NamedTuple):
    r"""What the similarity of tokens is read from; one entry per sequence, ``S`` of them.

    Attributes:
        n: Tokens, shape ``(S,)``.
        mean: Their mean :math:`\bar x`, shape ``(S, D)``.
        scatter: :math:`\sum_t \|x_t - \bar x\|^2`, shape ``(S,)``.
        squares: :math:`\sum_t \|x_t\|^2`, shape ``(S,)``.
        units: :math:`\sum_t x_t / \|x_t\|`, shape ``(S, D)``.
        loudest: :math:`\max_t \|x_t\|^2`, shape ``(S,)``.
    """

    n: Tensor
    mean: Tensor
    scatter: Tensor
    squares: Tensor
    units: Tensor
    loudest: Tensor

    def merge(self, other: TokenMoments) -> TokenMoments:
        """Of sequences that continue in another part, what both parts come to; the same for any split."""
        count = self.n + other.n
        share, apart = other.n / count.clamp_min(1), other.mean - self.mean
        return TokenMoments(
            count,
            self.mean + share.unsqueeze(-1) * apart,
            self.scatter + other.scatter + self.n * share * apart.square().sum(dim=-1),
            self.squares + other.squares,
            self.units + other.units,
            torch.maximum(self.loudest, other.loudest),
        )


class TokenGroups(NamedTuple):
    """Which sequence each token of a batch is of, and whether it counts.

    Attributes:
        real: Boolean, shape ``(B, T)``.
        documents: Sequences in each row.
        place: Sequence of each token, ``int64`` of shape ``(B, T)``; ``None`` where every row is one.
    """

    real: Tensor
    documents: int = 1
    place: Tensor | None = None

    @classmethod
    def of(cls, real: Tensor, segments: Tensor | None) -> TokenGroups:
        """By the number of the document of every token; those beyond :data:`DOCUMENTS` and below 0 do not count."""
        if segments is None:
            return cls(real)
        documents, rows = min(DOCUMENTS, real.shape[1]), torch.arange(len(real), device=real.device).unsqueeze(1)
        real = real & (segments >= 0) & (segments < documents)
        return cls(real, documents, documents * rows + segments.clamp(0, documents - 1))

    def clear(self, values: Tensor) -> Tensor:
        """Values ``(B, T, ...)`` with zeros in place of tokens that do not count."""
        return torch.where(self.real.view(*self.real.shape, *[1] * (values.ndim - 2)), values, 0.0)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over sequences of ``(B, T, ...)``, cleared: ``(S, ...)``."""
        if self.place is None:
            return values.sum(dim=1)
        sums = values.new_zeros(self.documents * len(values), *values.shape[2:])
        return sums.index_add_(0, self.place.flatten(), values.flatten(0, 1))

    def largest(self, values: Tensor) -> Tensor:
        """Maxima over sequences of ``(B, T)``, cleared and not negative: ``(S,)``."""
        if not values.shape[1]:
            return values.new_zeros(self.documents * len(values))
        if self.place is None:
            return values.amax(dim=1)
        zeros = values.new_zeros(self.documents * len(values))
        return zeros.scatter_reduce(0, self.place.flatten(), values.flatten(), "amax")

    def spread(self, of_sequences: Tensor) -> Tensor:
        """What belongs to a sequence, ``(S, D)``, beside each of its tokens: fit for ``(B, T, D)``."""
        return of_sequences.unsqueeze(1) if self.place is None else of_sequences[self.place]


@full_precision
def token_moments(tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> TokenMoments:
    r"""Statistics of every sequence of a batch, from which its tokens' similarity is read.

    Deviations are taken from a first estimate of the mean and corrected by their own mean, so that a mean of a thousand
    times the spread, or one token that is a thousand times as long as the others, costs no digits.

    Args:
        tokens: Shape ``(B, T, D)``. Tokens with NaN or infinity do not count.
        mask: Boolean, shape ``(B, T)``: tokens to count; all by default.
        segments: Number of each token's document, from 0 to 63, shape ``(B, T)``, where rows are packed with several;
            tokens of others do not count.

    Returns:
        ``S = B`` sequences, or ``B min(T, 64)`` with ``segments``, those that are not there with a count of 0; at
        least ``float32``.

    Raises:
        ValueError: If ``tokens`` has other than three dimensions.

    Example:
        >>> moments = token_moments(torch.tensor([[[1000.0, 0.0], [1002.0, 0.0]]]))
        >>> moments.mean, moments.scatter
        (tensor([[1001.,    0.]]), tensor([2.]))
    """
    if tokens.ndim != 3:
        raise ValueError(f"`tokens` must have shape (B, T, D), got {tuple(tokens.shape)}.")
    lengths = torch.linalg.vector_norm(tokens, dim=-1)
    groups = TokenGroups.of(lengths.isfinite() if mask is None else lengths.isfinite() & mask.bool(), segments)
    tokens, lengths = groups.clear(tokens), groups.clear(lengths)
    count = groups.sum(groups.real.to(tokens.dtype))
    least, squares = count.clamp_min(1).unsqueeze(-1), lengths.square()
    anchor = groups.sum(tokens) / least
    apart = (tokens - groups.spread(anchor)).mul_(groups.real.unsqueeze(-1))
    drift = groups.sum(apart) / least
    scatter = groups.sum(torch.linalg.vector_norm(apart, dim=-1).square()) - count * drift.square().sum(dim=-1)
    units = groups.sum(tokens.div_(lengths.clamp_min(torch.finfo(tokens.dtype).tiny).unsqueeze(-1)))
    return TokenMoments(
        count, anchor + drift, scatter.clamp_min(0), groups.sum(squares), units, groups.largest(squares)
    )


def relative_residual(tokens: Tensor | TokenMoments, mask: Tensor | None = None) -> Tensor:
    r"""Share of a sequence that is not its mean token; 0 where all tokens are one vector (rank collapse).

    .. math:: \frac{\|X - 1 \bar x^\top\|_F}{\|X\|_F} = \frac{\|PX\|_F}{\|X\|_F}, \quad P = I - 11^\top / T

    The mean is the exact minimizer in this norm. Independent tokens of zero mean read :math:`\sqrt{1 - 1/T}`.

    Args:
        tokens: Shape ``(B, T, D)``, or what :func:`token_moments` returns.
        mask: Boolean, shape ``(B, T)``: tokens to count.

    Returns:
        Shape ``(S,)``, between 0 and 1; NaN for sequences of fewer than two tokens, or of zeros.

    References:
        Dong et al., *Attention is not all you need*, ICML 2021, https://arxiv.org/abs/2103.03404, in another norm.

    Example:
        >>> relative_residual(torch.tensor([[[3.0], [3.0]], [[1.0], [-1.0]]]))
        tensor([0., 1.])
    """
    moments = _moments(tokens, mask)
    return _known(moments, (moments.scatter / moments.squares).sqrt())


def token_cosine(tokens: Tensor | TokenMoments, mask: Tensor | None = None) -> Tensor:
    r"""Mean cosine of two different tokens of a sequence, in linear time; 1 where all point one way.

    .. math:: \frac{\|\sum_t x_t / \|x_t\|\|^2 - T}{T (T - 1)}

    The token cosine similarity (TCS) of mean-mode diagnosis, of all tokens and not of 256. Isotropic tokens read 0 with
    a standard deviation of :func:`token_cosine_null_std`; a common direction of all tokens raises it, too.

    Args:
        tokens: Shape ``(B, T, D)``, or what :func:`token_moments` returns.
        mask: Boolean, shape ``(B, T)``: tokens to count.

    Returns:
        Shape ``(S,)``, between -1 / (T - 1) and 1; NaN for sequences of fewer than two tokens.

    References:
        Lu, *Mean mode screaming*, 2026, https://arxiv.org/abs/2605.06169; the form in linear time is ours.

    Example:
        >>> token_cosine(torch.tensor([[[3.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]))
        tensor([1., 0.])
    """
    moments = _moments(tokens, mask)
    pairs = moments.n * (moments.n - 1)
    return _known(moments, (moments.units.square().sum(dim=-1) - moments.n) / pairs)


def token_cosine_null_std(count: int, dim: int) -> float:
    r"""Standard deviation of :func:`token_cosine` of isotropic tokens, whose mean is 0: :math:`\sqrt{2 / (T(T-1)d)}`.

    Args:
        count: Tokens, at least 2.
        dim: Their width.

    Example:
        >>> round(token_cosine_null_std(64, 128), 5)
        0.00197
    """
    return sqrt(2 / (count * (count - 1) * dim))


def mean_mode_ratio(tokens: Tensor | TokenMoments, mask: Tensor | None = None) -> Tensor:
    r"""Mean-mode ratio :math:`\rho`: length of the mean parts of a batch's sequences over that of the centered ones.

    .. math:: \rho = \frac{\sum_b \|J X_b\|_F}{\sum_b \|P X_b\|_F}, \quad J = 11^\top / T, \; P = I - J

    Norms and not squares, and a ratio of sums, as in the authors' code. Independent tokens of zero mean read
    :math:`1 / \sqrt{T - 1}`.

    Args:
        tokens: Shape ``(B, T, D)``, or what :func:`token_moments` returns.
        mask: Boolean, shape ``(B, T)``: tokens to count.

    Returns:
        0-dimensional, from 0 to a million, where it is capped; NaN where no sequence has two tokens.

    References:
        Lu, *Mean mode screaming*, 2026, https://arxiv.org/abs/2605.06169.

    Example:
        >>> mean_mode_ratio(torch.tensor([[[3.0], [1.0]], [[1.0], [-1.0]]]))
        tensor(1.)
    """
    mean, centered = (part.nansum() for part in mode_norms(_moments(tokens, mask)))
    return capped_ratio(mean, centered)


def capped_ratio(mean: Tensor, centered: Tensor) -> Tensor:
    """Of sums of norms of the mean and the centered parts, at most a million."""
    return mean / torch.maximum(centered, mean / LARGEST_RATIO)


def mode_norms(moments: TokenMoments) -> tuple[Tensor, Tensor]:
    """Norms of the mean and the centered part of every sequence, each ``(S,)``; NaN below two tokens."""
    mean = moments.n.sqrt() * torch.linalg.vector_norm(moments.mean, dim=-1)
    return _known(moments, mean), _known(moments, moments.scatter.sqrt())


def contraction_ratio(after: TokenMoments, before: TokenMoments) -> Tensor:
    r"""By how much a block, or a branch of it, brings tokens together: :math:`\|P X_{out}\|_F / \|P X_{in}\|_F`.

    Attention without skips contracts a small residual ``s`` by :math:`O(s^2)`, which is why it dies out doubly
    exponentially with depth; with a skip the stream stays near 1 or above.

    Args:
        after: Of the output.
        before: Of the input, the same sequences.

    Returns:
        Shape ``(S,)``, 0 or more; NaN where the input had no residual.

    References:
        Dong et al., *Attention is not all you need*, ICML 2021, https://arxiv.org/abs/2103.03404.

    Example:
        >>> x = torch.tensor([[[3.0], [1.0]]])
        >>> contraction_ratio(token_moments(x / 4 + 5), token_moments(x))
        tensor([0.2500])
    """
    ratio = torch.where(before.scatter > 0, after.scatter / before.scatter, torch.nan).sqrt()
    return _known(before, _known(after, ratio))


def loudest_token_share(tokens: Tensor | TokenMoments, mask: Tensor | None = None) -> Tensor:
    r"""Share of a sequence's squared length that its longest token has: :math:`\max_t \|x_t\|^2 / \sum_t \|x_t\|^2`.

    Near 1 of a massive token, such as an attention sink, the Frobenius norms of the sequence speak of that token alone,
    and :func:`token_cosine`, which weighs all alike, is what to read.

    Args:
        tokens: Shape ``(B, T, D)``, or what :func:`token_moments` returns.
        mask: Boolean, shape ``(B, T)``: tokens to count.

    Returns:
        Shape ``(S,)``, from ``1 / T`` (all equally long) to 1; NaN for sequences of fewer than two tokens, or of zeros.

    References:
        Sun et al., *Massive activations in large language models*, COLM 2024, https://arxiv.org/abs/2402.17762, found
        such tokens; the share is ours.

    Example:
        >>> loudest_token_share(torch.tensor([[[3.0], [-1.0]], [[1.0], [1.0]]]))
        tensor([0.9000, 0.5000])
    """
    moments = _moments(tokens, mask)
    return _known(moments, moments.loudest / moments.squares)


def _moments(tokens: Tensor | TokenMoments, mask: Tensor | None) -> TokenMoments:
    return tokens if isinstance(tokens, TokenMoments) else token_moments(tokens, mask)


def _known(moments: TokenMoments, readings: Tensor) -> Tensor:
    return torch.where(moments.n > 1, readings, torch.nan)
