"""DirectPred and DirectCopy: a predictor that is set from the correlation of its inputs, and not trained."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Self

from lightning_collapse.spectral.eigenvalues import eigenvalues, eigenvectors
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.rows import finite_rows
from lightning_collapse.utilities.arguments import require_not_negative, require_one_of, require_whole
from lightning_collapse.utilities.distributed import all_reduce_sum

Method = Literal["direct_pred", "direct_copy"]
Convention = Literal["code", "paper"]


class DirectPredictor(nn.Module):
    r"""Linear predictor of a siamese network without negative pairs, set in closed form.

    With the running correlation :math:`F \leftarrow \rho F + (1 - \rho) \tfrac{1}{N} \sum_i h_i h_i^\top` of the
    features, not centered, and its eigenvalues :math:`s` and eigenvectors :math:`U`:

    - ``"direct_pred"`` [1]: :math:`W = U \operatorname{diag}(p)\, U^\top`. ``convention="code"``, what the authors
      released and ran: :math:`p = \max(\sqrt{s / s_{\max}} + \epsilon,\, 10^{-4})`; ``"paper"``, equation 19:
      :math:`p = \sqrt s + \epsilon\, s_{\max}`.
    - ``"direct_copy"`` [2], without eigenvectors: ``"code"`` :math:`W = F + \epsilon I`, for features whose correlation
      has a largest eigenvalue near 1; ``"paper"`` :math:`W = F / \|F\|_2 + \epsilon I`.

    A predictor that is trained lets weak directions die; this one lifts them, so the spectrum of the features evens
    out. The target must carry no gradient, and the loss is to compare directions (cosine).

    Call :meth:`update` once per training step. The weight is a buffer: no optimizer and no weight decay moves it, and
    it is saved with the model. Statistics are those of the rows of all processes.

    Args:
        dim: Width ``D`` of the features.
        method: Which of the two.
        convention: Which published form.
        decay: ρ, the share of the old correlation that is kept at an update; of the authors' command for DirectPred by
            default.
        eps: ε; of the same command by default. [2] uses larger ones with ``"direct_copy"``.

    Attributes:
        weight: :math:`W`, symmetric, ``(D, D)``; the identity before the first update.
        correlation: :math:`F`, ``(D, D)``, at least ``float32`` whatever the model is cast to.
        updates: How many updates had rows, 0-dimensional.

    Raises:
        ValueError: If an argument is out of range.

    References:
        [1] Tian, Chen & Ganguli, *Understanding Self-Supervised Learning Dynamics without Contrastive Pairs*, ICML
        2021. https://arxiv.org/abs/2102.06810, code at https://github.com/facebookresearch/luckmatters.
        [2] Wang, Chen, Du & Tian, *Towards Demystifying Representation Learning with Non-contrastive
        Self-supervision*, 2021. https://arxiv.org/abs/2110.04947

    Example:
        >>> predictor = DirectPredictor(dim=2, eps=0.0)
        >>> predictor.update(torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
        >>> predictor.weight
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])
    """

    weight: Tensor
    correlation: Tensor
    updates: Tensor

    def __init__(
        self,
        dim: int,
        method: Method = "direct_pred",
        convention: Convention = "code",
        decay: float = 0.3,
        eps: float = 0.01,
    ) -> None:
        super().__init__()
        require_whole(1, dim=dim)
        require_one_of(get_args(Method), method=method)
        require_one_of(get_args(Convention), convention=convention)
        require_not_negative(eps=eps)
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be from 0 to below 1, got {decay}.")
        self.method: Method = method
        self.convention: Convention = convention
        self.decay = decay
        self.eps = eps
        self.register_buffer("weight", torch.empty(dim, dim))
        self.register_buffer("correlation", torch.empty(dim, dim))
        self.register_buffer("updates", torch.tensor(0))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget all updates; also what fills a layer that was built on the ``meta`` device."""
        self.weight.copy_(torch.eye(len(self.weight)))
        self.correlation.zero_()
        self.updates.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Predictions ``(..., D)`` for features ``(..., D)``; does not change the statistics."""
        # a copy, so that an update between the forward and the backward pass leaves this graph as it was
        return functional.linear(features, self.weight.to(features.dtype, copy=True))

    @torch.no_grad()
    def update(self, *views: Tensor, refresh: bool = True) -> None:
        """Take a batch into the running correlation and set the weight from it.

        Rows with NaN or infinity are left out; an update without rows changes nothing.

        Collective: every process must call it; one all-reduce of ``D * D + 1`` numbers. ``"direct_pred"``, and
        ``"direct_copy"`` in the paper's form, decompose a ``D x D`` matrix on the device, and wait for it.

        Args:
            views: Inputs of the predictor, all views together, each of shape ``(N, D)``; ``N`` may differ.
            refresh: Set the weight too. The authors do so at every step; seldom is cheaper.

        Raises:
            ValueError: If there is no view, or one is not a matrix of floating-point numbers with ``D`` columns.
        """
        dim = len(self.weight)
        for view in views:
            if view.ndim != 2 or view.shape[1] != dim or not view.is_floating_point():
                raise ValueError(
                    f"Views must be floating point of shape (N, {dim}), got {view.dtype} of shape {tuple(view.shape)}."
                    " Flatten tokens to rows or pool maps first."
                )
        if not views:
            raise ValueError("`DirectPredictor.update` needs at least one view, got none.")
        total, count = _second_moment(*views)
        packed = all_reduce_sum(torch.cat([count.reshape(1), total.flatten()]))
        some = packed[0] > 0
        batch = (packed[1:] / packed[0].clamp_min(1)).view(dim, dim).to(self.correlation.dtype)
        mixed = torch.lerp(batch, self.correlation, self.decay)
        self.correlation.copy_(torch.where(some, torch.where(self.updates > 0, mixed, batch), self.correlation))
        self.updates += some
        if refresh:
            weight = _weight_of(self.correlation, self.method, self.convention, self.eps).to(self.weight.dtype)
            usable = (self.updates > 0) & weight.isfinite().all()
            self.weight.copy_(torch.where(usable, weight, self.weight))

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return (
            f"dim={len(self.weight)}, method={self.method!r}, convention={self.convention!r}, decay={self.decay},"
            f" eps={self.eps}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.correlation
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.correlation.dtype.itemsize < 4:  # the model was cast to half precision
            self.correlation = exact.to(self.correlation.device)
        return self


@full_precision
def _second_moment(*views: Tensor) -> tuple[Tensor, Tensor]:
    rows, _, counts = finite_rows(torch.cat(views))
    return rows.T @ rows, counts.sum()


@full_precision
def _weight_of(correlation: Tensor, method: Method, convention: Convention, eps: float) -> Tensor:
    if method == "direct_copy":
        tiny = torch.finfo(correlation.dtype).tiny
        norm = eigenvalues(correlation)[0].clamp_min(tiny) if convention == "paper" else 1.0
        identity = torch.eye(len(correlation), dtype=correlation.dtype, device=correlation.device)
        return correlation / norm + eps * identity
    values, vectors = eigenvectors(correlation)
    if convention == "code":
        relative = values / values[0].clamp_min(torch.finfo(values.dtype).tiny)
        gains = (relative.sqrt() + eps).clamp_min(1e-4)
    else:
        gains = values.sqrt() + eps * values[0]
    return (vectors * gains) @ vectors.T
