"""Variational Bayesian last layers (VBLL): a head that knows how unsure it is, in one pass and without samples."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.spectral.product import product
from lightning_collapse.utilities.arguments import require_one_of, require_positive, require_whole

Covariance = Literal["diagonal", "dense"]


class _VariationalLinear(nn.Module):
    r"""Outputs :math:`w_k^\top \phi` with :math:`w_k \sim \mathcal N(\mu_k, S_k)`, and noise of variance Σ_k beside."""

    def __init__(
        self, dim: int, outputs: int, covariance: Covariance, prior_scale: float, wishart_scale: float
    ) -> None:
        super().__init__()
        require_whole(1, dim=dim)
        require_one_of(get_args(Covariance), covariance=covariance)
        require_positive(prior_scale=prior_scale, wishart_scale=wishart_scale)
        self.dim, self.outputs, self.covariance = dim, outputs, covariance
        self.prior_variance, self.wishart_scale = prior_scale, wishart_scale
        self.mean = nn.Parameter(torch.empty(outputs, dim))
        self.log_diagonal = nn.Parameter(torch.empty(outputs, dim))
        self.below = nn.Parameter(torch.empty(outputs, dim, dim)) if covariance == "dense" else None
        self.log_noise = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw means and standard deviations, as the authors' code does."""
        self.mean.normal_(0, (2 / self.dim) ** 0.5)
        self.log_diagonal.normal_(-math.log(self.dim), 1.0)
        self.log_noise.normal_(-1.0, 1.0)
        if self.below is not None:
            self.below.normal_(0, 0.01 / self.dim)

    def forward(self, features: Tensor) -> Tensor:
        """Mean outputs ``(..., K)`` of features ``(..., D)``, in the dtype of the layer: those of a linear layer."""
        return nn.functional.linear(features.to(self.mean.dtype), self.mean)

    @full_precision
    def variance(self, features: Tensor) -> Tensor:
        r"""Variance of the outputs, :math:`\phi^\top S_k \phi + \Sigma_k`, ``(..., K)``, at least ``float32``."""
        of_rows = self._of_weights(features.reshape(-1, self.dim)).view(*features.shape[:-1], self.outputs)
        return of_rows + (2 * self.log_noise.to(features.dtype)).exp()

    def divergence(self) -> Tensor:
        r"""Divergence of all weights from their prior, minus the log-prior of the noise but for a constant; a scalar.

        .. math:: \sum_k \tfrac12 \Big(\tfrac{\|\mu_k\|^2 + \operatorname{tr} S_k}{s} + D \log s - \log \det S_k
            - D\Big) - \sum_k \Big(\nu \log \tfrac{1}{\Sigma_k} - \tfrac{b}{2 \Sigma_k}\Big)

        with ``K`` outputs and :math:`\nu = (K + 2) / 2`. The released code leaves ``- D`` out.
        """
        mean, logs, log_noise = _wide(self.mean), _wide(self.log_diagonal), _wide(self.log_noise)
        trace = (2 * logs).exp().sum()
        if self.below is not None:
            trace = trace + _wide(self.below).tril(-1).square().sum()
        s, (outputs, dim) = self.prior_variance, mean.shape
        constant = outputs * dim * (math.log(s) - 1)
        divergence = ((mean.square().sum() + trace) / s + constant - 2 * logs.sum()) / 2
        prior = -(outputs + 2) * log_noise.sum() - self.wishart_scale / 2 * (-2 * log_noise).exp().sum()
        return divergence - prior

    def _means(self, rows: Tensor) -> Tensor:
        return product(rows, self.mean.to(rows.dtype).T)

    def _of_weights(self, rows: Tensor) -> Tensor:
        """Variance that the weights give each output, from ``(N, D)`` to ``(N, K)``."""
        deviations = self.log_diagonal.to(rows.dtype).exp()
        if self.below is None:
            return product(rows.square(), deviations.square().T)
        factor = self.below.to(rows.dtype).tril(-1) + deviations.diag_embed()
        turned = product(rows, factor.transpose(0, 1).flatten(1))
        return turned.view(-1, self.outputs, self.dim).square().sum(dim=-1)

    def extra_repr(self) -> str:
        """Show the hyperparameters in ``print(model)``."""
        return f"dim={self.dim}, outputs={self.outputs}, covariance={self.covariance!r}"


def _wide(parameter: Tensor) -> Tensor:
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


class VBLLClassifier(_VariationalLinear):
    r"""Discriminative variational head: logits that are Gaussian, of a variance that grows off the data.

    Drop-in for ``nn.Linear(dim, num_classes)``: called, it returns the mean logits. Train it with
    :class:`~lightning_collapse.losses.VBLL`. It has no bias: append a 1 to the features for one. Keep features bounded
    (a norm before it), since the variance grows with their square. Low-rank covariances, Student-t and generative heads
    of the authors' package are not here.

    Args:
        dim: Width ``D`` of the features.
        num_classes: Number of classes ``C``, at least 2.
        covariance: ``"diagonal"``, or ``"dense"`` by a Cholesky factor of ``C * D * D`` numbers.
        prior_scale: The variance of the prior is ``2 * prior_scale / dim``.
        wishart_scale: ``b``, of the prior of the noise.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Harrison, Willes & Snoek, *Variational Bayesian Last Layers*, ICLR 2024. https://arxiv.org/abs/2404.11599, code
        at https://github.com/VectorInstitute/vbll.

    Example:
        >>> head, features = VBLLClassifier(dim=8, num_classes=3), torch.randn(4, 8)
        >>> head(features).shape, head.predict(features).sum(dim=1).allclose(torch.ones(4))
        (torch.Size([4, 3]), True)
        >>> bool((head.variance(10 * features) > head.variance(features)).all())
        True
    """

    takes_classes = True

    def __init__(
        self,
        dim: int,
        num_classes: int,
        covariance: Covariance = "diagonal",
        prior_scale: float = 1.0,
        wishart_scale: float = 1.0,
    ) -> None:
        require_whole(2, num_classes=num_classes)
        require_whole(1, dim=dim)
        super().__init__(dim, num_classes, covariance, 2 * prior_scale / dim, wishart_scale)

    @full_precision
    def log_likelihood(self, features: Tensor, targets: Tensor) -> Tensor:
        r"""A bound of the expected log-likelihood of each row from below, by Jensen's inequality.

        .. math:: m_y - \log \sum_k e^{m_k + v_k / 2}, \qquad m_k = \mu_k^\top \phi,
            \quad v_k = \phi^\top S_k \phi + \Sigma_k

        Args:
            features: Shape ``(N, D)``.
            targets: Classes, ``(N,)``, from 0 to ``C - 1``.

        Returns:
            Shape ``(N,)``, at least ``float32``.
        """
        logits = self._means(features)
        right = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
        return right - (logits + self.variance(features) / 2).logsumexp(dim=1)

    @torch.no_grad()
    @full_precision
    def predict(self, features: Tensor, samples: int = 20, seed: int = 0) -> Tensor:
        """Class probabilities ``(N, C)``: the mean softmax of sampled logits, from a random state of their own."""
        require_whole(1, samples=samples)
        mean, deviation = self._means(features), self.variance(features).sqrt()
        generator = torch.Generator(features.device).manual_seed(seed)
        total = torch.zeros_like(mean)
        for _ in range(samples):
            total += (mean + deviation * torch.empty_like(mean).normal_(generator=generator)).softmax(dim=-1)
        return total / samples

    def ood_score(self, features: Tensor) -> Tensor:
        """``1 - max p`` of each row, ``(N,)``: the larger, the less the row looks like the data."""
        return 1 - self.predict(features).amax(dim=-1)


class VBLLRegression(_VariationalLinear):
    r"""Variational head for regression: a Gaussian for every output, of a variance that grows off the data.

    Called, it returns the mean outputs; :meth:`variance` is that of the predictive distribution. Train it with
    :class:`~lightning_collapse.losses.VBLL`. Otherwise as :class:`VBLLClassifier`.

    For several outputs the released code multiplies each quadratic form by the trace of all precisions, averages over
    outputs what is a sum, and so counts the variance and the divergence about ``K`` times too heavily. This is the
    closed form; for one output both agree.

    Args:
        dim: Width ``D`` of the features.
        outputs: Number of outputs ``K``.
        covariance: ``"diagonal"``, or ``"dense"`` by a Cholesky factor of ``K * D * D`` numbers.
        prior_scale: The variance of the prior is ``prior_scale / dim``.
        wishart_scale: ``b``, of the prior of the noise.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Harrison, Willes & Snoek, *Variational Bayesian Last Layers*, ICLR 2024. https://arxiv.org/abs/2404.11599

    Example:
        >>> head, features = VBLLRegression(dim=8, outputs=2), torch.randn(4, 8)
        >>> head(features).shape, head.variance(features).shape, head.ood_score(features).shape
        (torch.Size([4, 2]), torch.Size([4, 2]), torch.Size([4]))
    """

    takes_classes = False

    def __init__(
        self,
        dim: int,
        outputs: int = 1,
        covariance: Covariance = "diagonal",
        prior_scale: float = 1.0,
        wishart_scale: float = 1e-2,
    ) -> None:
        require_whole(1, outputs=outputs, dim=dim)
        super().__init__(dim, outputs, covariance, prior_scale / dim, wishart_scale)

    @full_precision
    def log_likelihood(self, features: Tensor, targets: Tensor) -> Tensor:
        r"""Expected log-likelihood of each row, in closed form.

        .. math:: -\tfrac12 \sum_k \Big(\log 2 \pi \Sigma_k + \tfrac{(y_k - m_k)^2 + \phi^\top S_k \phi}{\Sigma_k}\Big)

        Args:
            features: Shape ``(N, D)``.
            targets: Shape ``(N, K)``.

        Returns:
            Shape ``(N,)``, at least ``float32``.
        """
        log_noise = 2 * self.log_noise.to(features.dtype)
        errors = (targets - self._means(features)).square() + self._of_weights(features)
        return -(math.log(2 * math.pi) + log_noise + errors * (-log_noise).exp()).sum(dim=1) / 2

    def ood_score(self, features: Tensor) -> Tensor:
        """Half the logarithm of the predictive variance, its mean over outputs, ``(N,)``."""
        return self.variance(features).log().mean(dim=-1) / 2
