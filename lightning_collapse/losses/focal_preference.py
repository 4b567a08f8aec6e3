"""Focal preference optimization (LifeAlign): DPO that leaves pairs alone which the policy already tells apart."""

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lightning_collapse.losses.support.rows import mean_of_rows
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_not_negative, require_positive


@full_precision
def focal_preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    gamma: float = 2.0,
) -> Tensor:
    r"""Focal loss of the probability that the chosen answer is preferred.

    .. math:: -\tfrac{1}{N} \sum_i (1 - p_i)^\gamma \log p_i, \qquad p = \operatorname{sigmoid}\big(\beta\,
        (\log \pi_c - \log \pi_r - \log \pi^{\text{ref}}_c + \log \pi^{\text{ref}}_r)\big)

    Pairs that are told apart already weigh less; ``gamma=0`` is direct preference optimization.

    Collective: every process must call it; one all-reduce of 3 numbers.

    Args:
        chosen: Log-probability of each chosen answer under the policy, summed over tokens, shape ``(N,)``.
        rejected: Of each rejected one.
        reference_chosen: Of each chosen one under the reference, which gets no gradient.
        reference_rejected: Of each rejected one under the reference.
        beta: Inverse temperature.
        gamma: Exponent of the focal factor; 2 in the authors' code.

    Returns:
        Scalar, at least ``float32``, of the global batch: 0 or above; :math:`2^{-\gamma} \log 2` where policy and
        reference agree.

    Raises:
        ValueError: If the four differ in shape, are no vectors or no floating-point numbers, or there is no row over
            all processes.

    References:
        *LifeAlign*, AAAI 2026; the code at https://github.com/real-ljs/LifeAlign. Rafailov et al., *Direct Preference
        Optimization*, NeurIPS 2023, https://arxiv.org/abs/2305.18290.

    Example:
        >>> zero = torch.zeros(1)
        >>> focal_preference_loss(zero, zero, zero, zero)
        tensor(0.1733)
    """
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    for name, tensor in zip(names, (chosen, rejected, reference_chosen, reference_rejected), strict=True):
        if tensor.ndim != 1 or tensor.shape != chosen.shape or not tensor.is_floating_point():
            raise ValueError(
                f"`focal_preference_loss` takes four log-probabilities per pair, of shape (N,) each, got `{name}` of"
                f" shape {tuple(tensor.shape)} and {tensor.dtype} beside `chosen` of shape {tuple(chosen.shape)}. Sum"
                " those of tokens per answer."
            )
    logits = beta * ((chosen - rejected) - (reference_chosen - reference_rejected).detach())
    values = -torch.exp(gamma * logsigmoid(-logits)) * logsigmoid(logits)
    return mean_of_rows("focal_preference_loss", values.unsqueeze(1)).squeeze(0)


class FocalPreference(nn.Module):
    """Module form of ``focal_preference_loss``.

    It takes four log-probabilities per pair and no features, so it stands in a ``training_step`` and in no callback.

    Args:
        beta: Inverse temperature.
        gamma: Exponent of the focal factor.

    Raises:
        ValueError: If ``beta`` is not positive, or ``gamma`` negative.

    Example:
        >>> FocalPreference()(*torch.zeros(4, 2))
        tensor(0.1733)
    """

    def __init__(self, beta: float = 0.1, gamma: float = 2.0) -> None:
        super().__init__()
        require_positive(beta=beta)
        require_not_negative(gamma=gamma)
        self.beta, self.gamma = beta, gamma

    def forward(self, chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
        """The loss of ``(N,)`` pairs, a scalar."""
        return focal_preference_loss(chosen, rejected, reference_chosen, reference_rejected, self.beta, self.gamma)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"beta={self.beta}, gamma={self.gamma}"
