"""Time constants: how many steps the modes of a recurrent state remember."""

from math import log
from typing import Literal

import torch
from torch import Tensor

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import require_one_of


@full_precision
def time_constants(eigenvalues: Tensor, time: Literal["discrete", "continuous"] = "discrete") -> Tensor:
    r"""Steps after which a mode has faded to :math:`1/e`: :math:`-1/\ln|\lambda|`, or :math:`-1/\Re\lambda`.

    Args:
        eigenvalues: Real or complex, any shape: of the matrix that takes a state to the next, or of the generator
            ``A`` of :math:`\dot h = A h`, times the step size where that is not one.
        time: Which of the two.

    Returns:
        Real, the same shape: 0 (nothing stays) to infinity, which is also what modes that never fade have.

    Raises:
        ValueError: If ``time`` is another word.

    References:
        Gu et al., *On the Parameterization and Initialization of Diagonal State
        Space Models*, 2022. https://arxiv.org/abs/2206.11893

    Example:
        >>> time_constants(torch.tensor([0.5, 1.0, 0.0])), time_constants(torch.tensor([-4.0, 1.0]), "continuous")
        (tensor([1.4427,    inf, 0.0000]), tensor([0.2500,    inf]))
    """
    require_one_of(("discrete", "continuous"), time=time)
    real = eigenvalues.real if eigenvalues.is_complex() else eigenvalues
    rate = -eigenvalues.abs().log() if time == "discrete" else -real
    return torch.where(rate > 0, 1 / rate, torch.where(rate.isnan(), torch.nan, torch.inf))


def memory_share(constants: Tensor, length: float) -> Tensor:
    """Share of the modes that remember longer than training sequences are: what they do then was never trained.

    Args:
        constants: Of :func:`time_constants`, shape ``(..., K)``.
        length: Steps of a training sequence.

    Returns:
        Shape ``(...)``, 0 to 1.

    Example:
        >>> memory_share(torch.tensor([3.0, 20.0, torch.inf, 1.0]), 10)
        tensor(0.5000)
    """
    return (constants > length).to(constants).mean(dim=-1)


def forgetting_horizon(constants: Tensor, conditioning: float | Tensor = 1.0, left: float = 0.01) -> Tensor:
    r"""Steps after which a state is sure to hold at most a share of what was in it.

    .. math:: \|W^t\|_2 \le \kappa(V)\,\rho^t \quad\Rightarrow\quad t = \tau_{\max} (\ln \kappa + \ln 1/\epsilon)

    Exact where eigenvectors are orthogonal (:math:`\kappa = 1`), an upper bound elsewhere.

    Args:
        constants: Of :func:`time_constants`, shape ``(..., K)``.
        conditioning: :math:`\kappa`, see :func:`eigenmodes`.
        left: The share :math:`\epsilon`, between 0 and 1.

    Returns:
        Shape ``(...)``, 0 to infinity.

    Raises:
        ValueError: If ``left`` is not between 0 and 1.

    Example:
        >>> forgetting_horizon(time_constants(torch.tensor([0.5, 0.1])), left=0.125)
        tensor(3.)
    """
    if not 0 < left < 1:
        raise ValueError(f"`left` is a share between 0 and 1, got {left}.")
    longest = constants.amax(dim=-1)
    return longest * (torch.as_tensor(conditioning).to(longest).log() + log(1 / left))
