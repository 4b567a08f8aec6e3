"""Mean-variance split residual (MV-Split): the mean of the tokens and what differs from it have a gate each."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_collapse.spectral.deterministic import running_sum
from lightning_collapse.spectral.precision import accumulation_dtype, full_precision
from lightning_collapse.utilities.arguments import require_finite, require_positive, require_whole


class MVSplitResidual(nn.Module):
    r"""Residual sum of a transformer block that keeps the common mean of its tokens from growing with depth.

    .. math:: Z = X + \beta \odot (F - m_F) + \alpha \odot (m_F - m_X), \qquad X' = Z / \operatorname{RMS}(Z)

    with :math:`F` what attention or the MLP returns of :math:`X`, and :math:`m` the mean over the tokens of a sequence.
    The mean moves by :math:`\alpha` alone, :math:`m_Z = (1 - \alpha) m_X + \alpha m_F`, and not by the sum of all
    branches: in a deep stack a branch whose tokens agree drowns what tells them apart.

    It replaces the sum *and* the norm behind it: ``x = self.residual(x, self.attention(x))`` in one's own block. Blocks
    of torch and Hugging Face add inside of their ``forward``, where no conversion reaches; and the plain sum is no
    special case, so that a trained network would not stay as it is: the branch begins with a factor of 0.03.

    In a causal model :math:`m` at a token is the mean of the tokens up to it. Then nothing is said of the mean of all
    tokens; the last token is what it would be without ``causal``, the first is :math:`X + \alpha (F - X)`. Little
    effect was seen below about a hundred layers.

    Args:
        dim: Width ``D``.
        causal: Whether a token sees the means of the tokens up to it only.
        alpha: First gate of the mean; the authors' by default.
        beta: First gate of the rest; the authors' by default.
        norm: Whether to divide by the root mean square, without a gain, as the authors' kernel does.
        eps: What is added to the mean square.

    Attributes:
        alpha: Shape ``(D,)``, learned. Give both gates no weight decay.
        beta: Shape ``(D,)``, learned.

    Raises:
        ValueError: If ``dim`` is no positive integer, a gate is not finite, or ``eps`` is not positive.

    References:
        Lu, *Mean Mode Screaming*, 2026. https://arxiv.org/abs/2605.06169, code at
        https://github.com/erwold/mv-split; the causal form is ours.

    Example:
        >>> residual = MVSplitResidual(dim=2, alpha=0.0, beta=1.0, norm=False)
        >>> tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> residual(tokens, branch=torch.tensor([[[10.0, 10.0], [12.0, 10.0]]]))
        tensor([[[0., 2.],
                 [4., 4.]]], grad_fn=<AddBackward0>)
    """

    def __init__(
        self,
        dim: int,
        causal: bool = False,
        alpha: float = 0.0,
        beta: float = 0.03,
        norm: bool = True,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        require_whole(1, dim=dim)
        require_finite(alpha=alpha, beta=beta)
        require_positive(eps=eps)
        self.causal = causal
        self.norm = norm
        self.eps = eps
        self._start = (alpha, beta)
        self.alpha = nn.Parameter(torch.empty(dim))
        self.beta = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the gates to what the arguments say; also what fills a layer built on the ``meta`` device."""
        alpha, beta = self._start
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)

    def forward(
        self, residual: Tensor, branch: Tensor, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """What the next block receives.

        Args:
            residual: The stream ``X``, shape ``(B, T, D)``.
            branch: ``F``, of the same shape.
            segments: Integers ``(B, T)``: tokens of one number, a document or a modality, have means of their own. Sums
                are kept in ``float64`` then, where the device has it, since they are told apart by differences.
            mask: Boolean ``(B, T)``, true for real tokens: padding takes part in no mean.

        Returns:
            Shape ``(B, T, D)``, in the dtype of ``residual``; computed in at least ``float32``.

        Raises:
            ValueError: If a shape is another.
        """
        tokens = self._tokens(residual, branch, mask)
        if segments is not None:
            self._require_shape(segments=segments, like=residual)
            sums = _sums_of_segments(tokens, segments, self.causal)
        else:
            sums = running_sum(tokens, dim=1) if self.causal else tokens.sum(dim=1, keepdim=True)
        return self._combine(residual, branch, sums)

    def extend(
        self, residual: Tensor, branch: Tensor, state: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The causal form for decoding: some tokens more of the same sequences, one or many.

        Args:
            residual: The stream of the new tokens, shape ``(B, T, D)``.
            branch: ``F`` of the new tokens, of the same shape.
            state: What the call before returned; ``None`` at the beginning of the sequences.
            mask: As in :meth:`forward`, of the new tokens.

        Returns:
            What :meth:`forward` returns of these tokens, up to rounding; and the state, two sums and a count, of shape
            ``(B, 2 * D + 1)``, at least ``float32``.

        Raises:
            ValueError: If the layer is not causal or a shape is another.
        """
        if not self.causal:
            raise ValueError("`extend` needs a layer of `causal=True`: else earlier tokens change with later ones.")
        sums = running_sum(self._tokens(residual, branch, mask), dim=1)
        if state is not None:
            sums = sums + state.unsqueeze(1)
        return self._combine(residual, branch, sums), sums[:, -1]

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"dim={len(self.alpha)}, causal={self.causal}, norm={self.norm}, eps={self.eps}"

    def _combine(self, residual: Tensor, branch: Tensor, sums: Tensor) -> Tensor:
        out = _split(residual, branch, sums, self.alpha, self.beta)
        if self.norm:
            out = functional.rms_norm(out, out.shape[-1:], eps=self.eps)
        return out.to(residual.dtype)

    def _tokens(self, residual: Tensor, branch: Tensor, mask: Tensor | None) -> Tensor:
        if residual.ndim != 3 or residual.shape != branch.shape or residual.shape[2] != len(self.alpha):
            raise ValueError(
                f"`residual` and `branch` must have shape (B, T, {len(self.alpha)}), got {tuple(residual.shape)} and"
                f" {tuple(branch.shape)}. Flatten images to tokens."
            )
        tokens = _with_count(residual, branch)
        if mask is None:
            return tokens
        self._require_shape(mask=mask, like=residual)
        return tokens.masked_fill(~mask.unsqueeze(2), 0)  # and no product: padding may hold NaN

    @staticmethod
    def _require_shape(*, like: Tensor, **given: Tensor) -> None:
        for name, tensor in given.items():
            if tensor.shape != like.shape[:2]:
                raise ValueError(f"`{name}` must have shape {tuple(like.shape[:2])}, got {tuple(tensor.shape)}.")


@full_precision
def _with_count(residual: Tensor, branch: Tensor) -> Tensor:
    """Both and a column of ones, ``(B, T, 2 * D + 1)``: whatever is summed of it, its mean is beside it."""
    return torch.cat([residual, branch.to(residual.dtype), torch.ones_like(residual[..., :1])], dim=2)


@full_precision
def _split(residual: Tensor, branch: Tensor, sums: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    mean, mean_of_branch = (sums[..., :-1] / sums[..., -1:].clamp_min(1)).to(residual.dtype).chunk(2, dim=-1)
    return residual + beta * (branch - mean_of_branch) + alpha * (mean_of_branch - mean)


def _sums_of_segments(tokens: Tensor, segments: Tensor, causal: bool) -> Tensor:
    """At every token the sum over its segment, or over what there is of it up to this token."""
    order = segments.argsort(dim=1, stable=True)
    numbers = segments.gather(1, order)
    first = torch.searchsorted(numbers, numbers)
    after = torch.searchsorted(numbers, numbers, right=True)
    if causal:
        after = torch.arange(1, segments.shape[1] + 1, device=segments.device).expand_as(segments)
    exact = torch.promote_types(tokens.dtype, accumulation_dtype(tokens.device))
    sums = functional.pad(running_sum(_pick(tokens.to(exact), order), dim=1), (0, 0, 1, 0))
    return _pick(_pick(sums, after) - _pick(sums, first), order.argsort(dim=1))


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """``rows[b, index[b, t]]``."""
    return rows.gather(1, index.unsqueeze(2).expand(-1, -1, rows.shape[2]))
