"""Dynamic bad-pair mining (DBPM): positive pairs whose losses have long been odd count less."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.arguments import require_not_negative, require_one_of, require_whole
from lightning_collapse.utilities.distributed import all_reduce_sum

Convention = Literal["normalized", "released"]
CONVENTIONS = get_args(Convention)


class PairWeights(nn.Module):
    r"""Weights of positive pairs by what their losses have been: multiply, then take the mean.

    Of every sample it remembers the mean of its losses, in which epoch :math:`e = 1, 2, \dots` weighs :math:`e`. Pairs
    whose mean is ``low`` standard deviations below that of all samples (as of shared noise), or ``high`` above it (as
    of views that share nothing), get

    .. math:: w_i = \exp\big(-\tfrac{(\ell_i - m)^2}{2 s^2}\big)

    for the loss :math:`\ell_i` of today, with the mean :math:`m` and standard deviation :math:`s` of the means; all
    others, and those of the first epochs, 1. ``convention="released"`` is the authors' code. There the weight is the
    *density* :math:`w_i / (s \sqrt{2 \pi})`, which is above 1 near the mean where :math:`s` is below 0.4, and means
    are :math:`\tfrac{1}{E_{now}} \sum_e \tfrac{e}{E}\, \ell_e`, smaller than losses by a factor of
    :math:`(E_{now} + 1) / 2 E`, so that most losses are far above :math:`m`.

    Call :meth:`end_epoch` after every epoch. State is in the ``state_dict``: four numbers for each sample.

    Args:
        samples: How many samples the training set has.
        warmup: Epochs in which all weights are 1; the authors have 50 of 80.
        low: Standard deviations below the mean; the authors' value.
        high: Standard deviations above the mean; the authors' value.
        epochs: How many there will be, ``E``; for ``"released"`` alone.
        convention: Whether weights are at most 1, or the authors'.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Lan, Yan, Hong & Feng, *Towards Enhancing Time Series Contrastive Learning: A Dynamic Bad Pair Mining Approach*,
        ICLR 2024. https://arxiv.org/abs/2302.03357, code at
        https://github.com/lanxiang1017/DynamicBadPairMining_ICLR24.

    Example:
        >>> weights, index = PairWeights(samples=20, warmup=1), torch.arange(20)
        >>> losses = torch.ones(20).index_fill(0, torch.tensor([3]), 9.0)
        >>> first = weights(losses, index)
        >>> weights.end_epoch()
        >>> first[3], [round(weight, 4) for weight in weights(losses, index)[2:5].tolist()]
        (tensor(1.), [1.0, 0.0001, 1.0])
    """

    memory: Tensor
    pending: Tensor
    population: Tensor
    ended: Tensor

    def __init__(
        self,
        samples: int,
        warmup: int,
        low: float = 2.0,
        high: float = 3.0,
        epochs: int | None = None,
        convention: Convention = "normalized",
    ) -> None:
        super().__init__()
        require_whole(1, samples=samples)
        require_whole(0, warmup=warmup)
        require_not_negative(low=low, high=high)
        require_one_of(CONVENTIONS, convention=convention)
        if convention == "released":
            if epochs is None:
                raise ValueError("`epochs` must be given with `convention='released'`, got None: means depend on it.")
            require_whole(1, epochs=epochs)
        self.warmup, self.low, self.high = warmup, low, high
        self.epochs = epochs
        self.convention: Convention = convention
        self.register_buffer("memory", torch.zeros(2, samples))  # sums of weighted losses, and of weights
        self.register_buffer("pending", torch.zeros(2, samples))  # sums of this epoch's losses, and how many
        self.register_buffer("population", torch.zeros(2))
        self.register_buffer("ended", torch.zeros(1))

    @torch.no_grad()
    def forward(self, losses: Tensor, index: Tensor) -> Tensor:
        """Weights of the pairs of a batch; in training mode their losses are remembered.

        Args:
            losses: Of each positive pair, shape ``(N,)``.
            index: Which sample of the training set each is, integers of shape ``(N,)``. What is no such index, or has
                a loss that is not finite, gets 1 and is not remembered.

        Returns:
            Shape ``(N,)``, at least ``float32``, without gradient.

        Raises:
            ValueError: If shapes or types do not fit.
        """
        if losses.ndim != 1 or losses.shape != index.shape or not losses.is_floating_point():
            raise ValueError(
                f"`losses` must be floating point of shape (N,), one per pair, and `index` of that shape, got"
                f" {losses.dtype} {tuple(losses.shape)} and {tuple(index.shape)}. Take no mean before."
            )
        if index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"`index` must be integers, got {index.dtype}. Have the data set return its index.")
        losses, index = losses.to(torch.promote_types(losses.dtype, torch.float32)), index.long()
        known = (index >= 0) & (index < self.memory.shape[1]) & losses.isfinite()
        index = torch.where(known, index, 0)
        if self.training:
            seen = torch.stack([torch.where(known, losses, 0.0), known.to(losses)])
            self.pending.index_add_(1, index, seen.to(self.pending))
        mean, spread = self.population.to(losses)
        own = self._means()[index].to(losses)
        odd = (own <= mean - self.low * spread) | (own >= mean + self.high * spread)
        weights = (-((losses - mean) / spread).square() / 2).exp()
        if self.convention == "released":
            weights = weights / (spread * math.sqrt(2 * math.pi))
        remembered = (self.memory[1] > 0)[index]
        return torch.where(known & odd & remembered & (spread > 0) & (self.ended >= self.warmup), weights, 1.0)

    @torch.no_grad()
    def end_epoch(self) -> None:
        """Take the losses of an epoch over; collective, one all-reduce of two numbers for each sample."""
        total, count = all_reduce_sum(self.pending)
        self.pending.zero_()
        self.ended += 1
        self.memory += self.ended * torch.stack([total / count.clamp_min(1), (count > 0).to(count)])
        remembered = self.memory[1] > 0
        number, means = remembered.sum().clamp_min(1), self._means()
        mean = torch.where(remembered, means, 0.0).sum() / number
        variance = torch.where(remembered, means - mean, 0.0).square().sum() / number
        self.population.copy_(torch.stack([mean, variance.sqrt()]))

    def _means(self) -> Tensor:
        if self.convention == "released":
            return self.memory[0] / (self.ended.clamp_min(1) * (self.epochs or 1))
        return self.memory[0] / self.memory[1].clamp_min(1)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return (
            f"samples={self.memory.shape[1]}, warmup={self.warmup}, low={self.low}, high={self.high},"
            f" epochs={self.epochs}, convention={self.convention!r}"
        )
