"""Vector quantization (VQ): each feature vector is replaced by the nearest code of a codebook."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_collapse.functional.vector_quantization import nearest_codes, quantization_loss, rotation_trick
from lightning_collapse.utilities.arguments import require_not_negative, require_one_of, require_whole

Estimator = Literal["straight_through", "rotation"]


class Quantized(NamedTuple):
    """What a quantizer returns.

    Attributes:
        quantized: Codes ``(..., D)`` in the dtype of the features, with a gradient to these.
        indices: Which codes, integers ``(...)``.
        loss: To be added to the loss, 0-dimensional.

    Example:
        >>> quantized, indices, loss = VectorQuantizer(codes=16, dim=4)(torch.randn(2, 3, 4))
        >>> quantized.shape, indices.shape
        (torch.Size([2, 3, 4]), torch.Size([2, 3]))
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """A codebook that the gradient trains, as in VQ-VAE and VQGAN.

    Only codes that are chosen move, and a code that no row is near is never chosen again: with many codes few stay in
    use. What keeps them alive: :class:`~lightning_collapse.layers.EMAVectorQuantizer` with ``restart=True``, and
    :class:`~lightning_collapse.layers.SimVQ`, which this quantizer is converted into.

    Distances are in ``float32`` whatever autocast says. In data-parallel training the loss is the mean of the rows of
    each process, like the loss beside it.

    Args:
        codes: Number ``K`` of codes.
        dim: Width ``D``.
        estimator: How the gradient passes the choice: as it is, or by
            ``functional.rotation_trick``.
        commitment: Of ``functional.quantization_loss``, what moves the features.
        codebook_weight: What moves the codes.

    Attributes:
        codebook: ``nn.Embedding`` of the codes, ``(K, D)``; they begin uniformly up to ``1 / K``, as published.

    Raises:
        ValueError: If an argument is out of range.

    References:
        van den Oord, Vinyals & Kavukcuoglu, *Neural Discrete Representation Learning*, NeurIPS 2017.
        https://arxiv.org/abs/1711.00937

    Example:
        >>> quantizer, features = VectorQuantizer(codes=16, dim=4), torch.randn(2, 3, 4, requires_grad=True)
        >>> quantized, indices, loss = quantizer(features)
        >>> (quantized.square().mean() + loss).backward()
        >>> torch.equal(quantized, quantizer.get_codebook_entry(indices))
        True
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        estimator: Estimator = "straight_through",
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
    ) -> None:
        super().__init__()
        require_whole(2, codes=codes)
        require_whole(1, dim=dim)
        require_one_of(get_args(Estimator), estimator=estimator)
        require_not_negative(commitment=commitment, codebook_weight=codebook_weight)
        self.estimator: Estimator = estimator
        self.commitment, self.codebook_weight = commitment, codebook_weight
        self.codebook = nn.Embedding(codes, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the codes anew; also what fills a layer that was built on the ``meta`` device."""
        self.codebook.weight.uniform_(-1 / self.codebook.num_embeddings, 1 / self.codebook.num_embeddings)

    def forward(self, features: Tensor) -> Quantized:
        """Quantize ``(..., D)``.

        Raises:
            ValueError: If features are not floating point, or of another width.
        """
        dim = self.codebook.embedding_dim
        if not features.is_floating_point() or features.shape[-1:] != (dim,):
            raise ValueError(
                f"Features must be floating point of shape (..., {dim}), got {features.dtype} of shape"
                f" {tuple(features.shape)}. Move the channels of maps last, or project to `dim`."
            )
        with torch.no_grad():
            table = self.codebook.weight
        indices = nearest_codes(features, table)
        codes = self.codebook(indices)
        loss = quantization_loss(features, codes, self.commitment, self.codebook_weight)
        if self.estimator == "rotation":
            quantized = rotation_trick(features, codes)
        else:
            quantized = codes.detach() + (features - features.detach())  # exactly the codes
        return Quantized(quantized.to(features.dtype), indices, loss)

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """Codes ``(..., D)`` of indices ``(...)``: what :meth:`forward` returned for them, as a decoder needs it."""
        codes: Tensor = self.codebook(indices)
        return codes

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"estimator={self.estimator!r}, commitment={self.commitment}, codebook_weight={self.codebook_weight}"
