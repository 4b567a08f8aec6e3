"""Exponential moving average (EMA) codebook: codes are running means of their rows, and dead ones begin again."""

from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_collapse.functional.vector_quantization import code_expiry, ema_codes
from lightning_collapse.layers.vector_quantizer import Estimator, Quantized, VectorQuantizer
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.distributed import all_reduce_sum, process_rank, world_size
from lightning_collapse.utilities.modules import is_to_be_ignored

GOLDEN, SILVER = 2654435769, 1779033703
"""The golden ratio and the root of two in fractions of ``2 ** 32``: multiples spread evenly, in step with no period."""


class EMAVectorQuantizer(VectorQuantizer):
    r"""A codebook without gradient: each code is the running mean of the rows that chose it.

    .. math:: N_k \leftarrow \gamma N_k + (1 - \gamma) n_k, \quad m_k \leftarrow \gamma m_k + (1 - \gamma) \sum z, \quad
        e_k = m_k / \tilde N_k

    with the rows of all processes, see :func:`~lightning_collapse.functional.ema_codes`; the loss is the commitment.

    ``restart=True`` gives a code whose running count falls below a tenth of the average a row of the global batch, and
    the average as its count, so that it has time to find rows. Threshold and decay follow
    :func:`~lightning_collapse.functional.code_expiry`: the usual threshold expires every code once there are many. The
    rows are spread evenly over the batch, by no random number: the same on every process, and in a resumed run.

    Counts and sums follow once per pass in training mode; at the beginning of the next one codes are made of them. So
    a pass that activation checkpointing runs again finds the codes that it had, and changes nothing (make one pass per
    backward pass). In evaluation codes are those of the last training pass. Collective in training: every process must
    call it equally often; an all-reduce of ``K * (D + 1)`` numbers, with restarts of about twice as many.

    Args:
        codes: How many; this and the next three are as of ``VectorQuantizer``.
        dim: Width ``D``.
        estimator: How the gradient passes the choice.
        commitment: Weight of the loss.
        decay: γ, that of VQ-VAE by default.
        restart: Whether dead codes begin again.

    Attributes:
        codebook: ``nn.Embedding`` whose weight is a buffer: no optimizer moves it, nothing shards it.
        counts: :math:`N`, ``(K,)``, at least ``float32`` whatever the model is cast to. It begins with the mean.
        sums: :math:`m`, ``(K, D)``, likewise.
        updates: How many updates had rows, 0-dimensional.
        restarts: How often each code has begun again, integers ``(K,)``.

    Raises:
        ValueError: If an argument is out of range.

    References:
        van den Oord et al., *Neural Discrete Representation Learning*, NeurIPS 2017, appendix A.1.
        https://arxiv.org/abs/1711.00937. Restarts: Dhariwal et al., *Jukebox*, 2020. https://arxiv.org/abs/2005.00341;
        their threshold and decay are ours.

    Example:
        >>> quantizer = EMAVectorQuantizer(codes=16, dim=4, restart=True)
        >>> for _ in range(3):
        ...     quantized, indices, loss = quantizer(torch.randn(32, 4))
        >>> int(quantizer.updates), int(quantizer.restarts.sum())
        (3, 0)
    """

    counts: Tensor
    sums: Tensor
    updates: Tensor
    restarts: Tensor

    def __init__(
        self,
        codes: int,
        dim: int,
        estimator: Estimator = "straight_through",
        commitment: float = 0.25,
        decay: float = 0.99,
        restart: bool = False,
    ) -> None:
        super().__init__(codes, dim, estimator, commitment, codebook_weight=0.0)
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be from 0 to below 1, got {decay}.")
        self.decay, self.restart = decay, restart
        weight = self.codebook.weight.detach()
        del self.codebook.weight
        self.codebook.register_buffer("weight", weight)
        self.register_buffer("counts", weight.new_zeros(codes))
        self.register_buffer("sums", torch.zeros_like(weight))
        self.register_buffer("updates", torch.tensor(0))
        self.register_buffer("restarts", torch.zeros(codes, dtype=torch.long))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the codes anew and forget all updates."""
        super().reset_parameters()
        for buffer in self._buffers.values():
            if buffer is not None:
                buffer.zero_()

    def forward(self, features: Tensor) -> Quantized:
        """Quantize ``(..., D)``; in training mode counts and sums follow, without rows that hold NaN or infinity."""
        if not self.training or is_to_be_ignored():
            return super().forward(features)
        self._follow()
        result = super().forward(features)
        self._update(features, result.indices)
        return result

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"estimator={self.estimator!r}, commitment={self.commitment}, decay={self.decay}, restart={self.restart}"

    @torch.no_grad()
    def _follow(self) -> None:
        """Make the codes of what there was before this pass."""
        weight = self.codebook.weight
        weight.copy_(torch.where(self.updates > 0, ema_codes(self.counts, self.sums).to(weight.dtype), weight))

    @torch.no_grad()
    def _update(self, features: Tensor, indices: Tensor) -> None:
        dim = self.codebook.embedding_dim
        rows, _, valid = finite_rows(features.detach().reshape(-1, dim), dtype=self.counts.dtype)
        batch = torch.zeros_like(torch.cat([self.sums, self.counts.unsqueeze(1)], dim=1))
        batch.index_add_(0, indices.flatten(), torch.cat([rows, valid.unsqueeze(1)], dim=1))
        total = all_reduce_sum(torch.cat([batch, *([self._spread(rows, valid)] if self.restart else [])], dim=1))
        sums, counts, fresh = total[:, :dim], total[:, dim], total[:, dim + 1 :]
        mean = counts.mean()
        threshold, decay = code_expiry(mean, self.decay) if self.restart else (mean, mean.new_tensor(self.decay))
        begun, decay = self.updates > 0, torch.where(mean > 0, decay, 1.0)
        counts = torch.lerp(counts, torch.where(begun, self.counts, mean), decay)
        sums = torch.lerp(sums, torch.where(begun, self.sums, mean * self.codebook.weight.to(sums.dtype)), decay)
        if self.restart:
            dead = counts < threshold
            order = dead.cumsum(dim=0)
            dead &= order <= mean * len(counts)  # no row for two
            counts = torch.where(dead, mean, counts)
            sums = torch.where(dead.unsqueeze(1), mean * fresh[(order - 1).clamp_min(0)], sums)
            self.restarts += dead
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        self.updates += mean > 0

    def _spread(self, rows: Tensor, valid: Tensor) -> Tensor:
        """As many rows as there are codes, evenly from those of all processes; zero where another process has them."""
        numbers = torch.zeros(world_size(), dtype=torch.long, device=rows.device)
        numbers[process_rank()] = valid.sum().long()
        numbers = all_reduce_sum(numbers)
        steps = torch.arange(len(self.counts), device=rows.device) * GOLDEN + self.updates % (1 << 30) * SILVER
        place = (steps % (1 << 32) * numbers.sum() >> 32) - numbers[: process_rank()].sum()
        if not len(rows):
            return torch.zeros_like(self.sums)
        chosen = valid.argsort(descending=True, stable=True)[place.clamp(0, len(rows) - 1)]
        here = (place >= 0) & (place < numbers[process_rank()])
        return rows[chosen] * here.unsqueeze(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.counts, self.sums
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.counts.dtype.itemsize < 4:  # the model was cast to half precision
            self.counts, self.sums = (state.to(self.counts.device) for state in exact)
        return self
