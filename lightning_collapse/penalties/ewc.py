"""Elastic weight consolidation (EWC): a penalty on weights by the diagonal of the Fisher information."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_collapse.penalties.diagonal_fisher import Labels, diagonal_fisher
from lightning_collapse.penalties.support.consolidation import check_loader, choose_estimator, names_of, parts_of
from lightning_collapse.penalties.support.fisher_pass import Outputs
from lightning_collapse.penalties.support.output_gradients import Estimator, Likelihood, check_estimator
from lightning_collapse.penalties.support.quadratic import QuadraticPenalty
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.registry import register_penalty


@register_penalty
class EWC(QuadraticPenalty):
    r"""Elastic weight consolidation [1], one anchor per task, or online [2, 3].

    .. math:: \frac{w}{2} \sum_k \sum_i F_{k,i} (\theta_i - \theta^*_{k,i})^2

    with :math:`F_k` the diagonal of the Fisher information of task :math:`k` at its end :math:`\theta^*_k`: exact, at
    constant memory, however many tasks there are. Online there is one anchor, the latest, and

    .. math:: \frac{w}{2} \sum_i \gamma \tilde F_{k,i} (\theta_i - \theta^*_{k,i})^2, \quad
        \tilde F_k = \gamma \tilde F_{k-1} + F_k

    Huszár [2] is :math:`\gamma = 1`; Schwarz et al. [3] have :math:`\gamma < 1` and make every :math:`F_k` comparable,
    which ``normalize`` does.

    Args:
        weight: ``w``. The default is ours, and a start: it depends on estimator and data by orders of magnitude.
            Importances ``"batched"`` over 32 samples are about as many times smaller, and take 1000 and more. Plain
            gradient descent with momentum μ diverges where ``w F`` exceeds ``2 (1 + μ)`` over the learning rate; then
            take a smaller one, or ``normalize``.
        estimator: How the Fisher information is estimated, see ``diagonal_fisher``; ``None`` is ``"exact"`` for at most
            20 outputs and ``"sample"`` for more, or for sequences.
        n_samples: How many samples of a task it reads; ``None`` for all.
        online: One anchor instead of one per task.
        gamma: γ, for ``online``.
        normalize: ``"max"`` divides ``F_k`` by its largest entry, ``"trace"`` by the mean of its entries.
        likelihood: Of the outputs, see ``diagonal_fisher``.
        outputs: The model's outputs on a batch, ``outputs(model, batch)``; by default the model is called on the
            inputs.
        labels: Labels of a batch, for estimators that read them.

    Raises:
        ValueError: If an argument is out of range.

    References:
        [1] Kirkpatrick et al., *Overcoming catastrophic forgetting in neural networks*, PNAS 2017.
        https://arxiv.org/abs/1612.00796

        [2] Huszár, *On quadratic penalties in elastic weight consolidation*, 2017. https://arxiv.org/abs/1712.03847

        [3] Schwarz et al., *Progress & compress*, ICML 2018. https://arxiv.org/abs/1805.06370

    Example::

        trainer = Trainer(callbacks=[WeightPenalty(EWC(weight=100.0))])
    """

    remembers = (
        "the diagonal of the Fisher information at the end of every task, exactly, in the memory of one; "
        "`online=True` for one that fades"
    )
    source = "Kirkpatrick et al., PNAS 2017, arXiv 1612.00796; Schwarz et al., ICML 2018, arXiv 1805.06370"
    factor = 0.5
    needs_data = True

    def __init__(
        self,
        weight: float = 100.0,
        estimator: Estimator | None = None,
        n_samples: int | None = 500,
        online: bool = False,
        gamma: float = 1.0,
        normalize: Literal["max", "trace"] | None = None,
        likelihood: Likelihood = "categorical",
        outputs: Outputs | None = None,
        labels: Labels | None = None,
    ) -> None:
        super().__init__(weight)
        check_estimator(estimator or "exact", likelihood)
        if not 0 <= gamma <= 1:
            raise ValueError(f"`gamma` must be from 0 to 1, got {gamma}.")
        if gamma != 1 and not online:
            raise ValueError(f"`gamma` is for `online=True`, got gamma={gamma} without it.")
        if normalize not in (None, "max", "trace"):
            raise ValueError(f"`normalize` must be 'max', 'trace' or None, got {normalize!r}.")
        if n_samples is not None:
            require_whole(1, n_samples=n_samples)
        self.estimator = estimator
        self.n_samples = n_samples
        self.online = online
        self.gamma = gamma
        self.normalize = normalize
        self.likelihood = likelihood
        self.outputs = outputs
        self.labels = labels

    @property
    @override
    def strength(self) -> float:
        return super().strength * self.gamma

    @override
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        """Estimate the Fisher information where the model stands, and anchor it there. Collective.

        Raises:
            ValueError: If there are no data.
        """
        loader = check_loader(self, loader)
        parameters = self._parameters_of(model)
        names = names_of(model, parameters)
        estimator = self.estimator
        if estimator is None:
            estimator, loader = choose_estimator(model, loader, self.outputs)
        fisher = diagonal_fisher(
            model,
            loader,
            estimator,
            likelihood=self.likelihood,
            n_samples=self.n_samples,
            outputs=self.outputs,
            labels=self.labels,
            parameters=list(names),
        )
        self.rank_one_shares = fisher.rank_one_shares
        importance = {names[name]: value for name, value in fisher.values.items()}
        if self.normalize is not None:
            everything = torch.cat([value.flatten() for value in importance.values()])
            scale = everything.max() if self.normalize == "max" else everything.mean()
            importance = {name: value / torch.where(scale > 0, scale, 1.0) for name, value in importance.items()}
        importance = parts_of(importance, parameters)
        self._remember(parameters, importance, kept=self.gamma, every_anchor=not self.online)
