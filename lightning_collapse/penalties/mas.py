"""Memory aware synapses (MAS): a penalty on weights that the outputs on old tasks depend on."""

from __future__ import annotations

from torch import nn
from typing_extensions import override

from lightning_collapse.penalties.mas_importance import mas_importance
from lightning_collapse.penalties.support.consolidation import check_loader, names_of, parts_of
from lightning_collapse.penalties.support.fisher_pass import Outputs
from lightning_collapse.penalties.support.quadratic import QuadraticPenalty
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.registry import register_penalty


@register_penalty
class MAS(QuadraticPenalty):
    r"""Memory aware synapses: importance by the sensitivity of the output [1].

    .. math:: w \sum_i \Omega_i (\theta_i - \theta^*_i)^2, \quad
        \Omega_i = \sum_k \frac{1}{N_k} \sum_n \Big| \frac{\partial \|f(x_n)\|_2^2}{\partial \theta_i} \Big|

    with :math:`\theta^*` the weights at the end of the last task. No factor 1/2, and importances of tasks are summed,
    as in the paper; FACIL and avalanche average them. It reads no labels: any output will do, such as an embedding.

    Args:
        weight: ``w``, 1 in the paper.
        n_samples: How many samples of a task it reads; ``None`` for all.
        outputs: The model's outputs on a batch, ``outputs(model, batch)``; by default the model is called on the
            inputs.

    Raises:
        ValueError: If an argument is out of range.

    References:
        [1] Aljundi et al., *Memory aware synapses: learning what (not) to forget*, ECCV 2018.
        https://arxiv.org/abs/1711.09601

    Example::

        trainer = Trainer(callbacks=[WeightPenalty(MAS(weight=1.0))])
    """

    remembers = "how much the output moves with each weight, without labels"
    source = "Aljundi et al., ECCV 2018, arXiv 1711.09601"
    needs_data = True

    def __init__(self, weight: float = 1.0, n_samples: int | None = None, outputs: Outputs | None = None) -> None:
        super().__init__(weight)
        if n_samples is not None:
            require_whole(1, n_samples=n_samples)
        self.n_samples = n_samples
        self.outputs = outputs

    @override
    def consolidate(self, model: nn.Module, loader: Loader | None = None) -> None:
        """Estimate the sensitivity where the model stands, and anchor it there. Collective.

        Raises:
            ValueError: If there are no data.
        """
        parameters = self._parameters_of(model)
        names = names_of(model, parameters)
        found = mas_importance(
            model,
            check_loader(self, loader),
            n_samples=self.n_samples,
            outputs=self.outputs,
            parameters=list(names),
        )
        importance = {names[name]: value for name, value in found.values.items()}
        self._remember(parameters, parts_of(importance, parameters))
