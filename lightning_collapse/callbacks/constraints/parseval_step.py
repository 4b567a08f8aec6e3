"""Parseval networks: after each optimizer step a small one of the weights toward orthonormal rows or columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.constraints.constraint import Constraint
from lightning_collapse.callbacks.constraints.layer_weights import layer_weights
from lightning_collapse.functional.regularization.orthogonality import parseval_step
from lightning_collapse.penalties.support.shards import Layout
from lightning_collapse.utilities.arguments import check_layers, require_positive
from lightning_collapse.utilities.hashing import GOLDEN, hashed
from lightning_collapse.utilities.sharding import local
from lightning_collapse.utilities.weight_matrices import whole


class ParsevalStep(Constraint):
    r"""Moves weights toward orthonormal rows or columns, after each optimizer step.

    .. math:: W \leftarrow (1 + \beta) W - \beta W W^T W

    for every linear and convolutional layer, kernels flattened to ``(O, I k k)``; see
    :func:`~lightning_collapse.functional.regularization.parseval_step`. Singular values above and below 1 come nearer
    to it: a layer with all of them at 1 keeps lengths, and its Lipschitz constant is 1 [1]. The authors take some rows
    alone in each step, and make the weights of residual sums convex, which is not done here. Biases stay.

    Works with all that :class:`~lightning_collapse.Constraint` works with; weights that ``fully_shard`` has cut are
    gathered one at a time. Nothing waits for the device. Rows are drawn by a counter, which is in the state: the same
    on every process, and the random state of the training is left alone.

    Args:
        beta: β, below 1. Published are 1e-4 to 3e-4.
        layers: Names of modules, or glob patterns of them, each with all inside it; by default every linear and
            convolutional layer.
        rows: Share of the rows, drawn anew for each step, that are moved toward orthonormal among themselves; all by
            default. It saves products and brings the others nearer in other steps.

    Raises:
        ValueError: If ``beta`` or ``rows`` is not between 0 and 1, or ``layers`` is no list of names.
        MisconfigurationException: When the fit starts, if a pattern matches nothing, there is no weight, or one is in
            half precision, which rounds a step as small as this one away, or has a singular value above
            ``(1 + 2 / beta) ** 0.5``; as :class:`~lightning_collapse.Constraint` besides.

    References:
        [1] Cissé, Bojanowski, Grave, Dauphin & Usunier, *Parseval networks: improving robustness to adversarial
        examples*, ICML 2017. https://arxiv.org/abs/1704.08847

    Example::

        trainer = Trainer(callbacks=[ParsevalStep(beta=3e-4)])
    """

    def __init__(self, beta: float = 3e-4, layers: Sequence[str] | None = None, rows: float = 1.0) -> None:
        super().__init__()
        require_positive(beta=beta, rows=rows)
        if beta >= 1:
            raise ValueError(f"`beta` must be below 1, from where on steps overshoot and weights diverge, got {beta}.")
        if rows > 1:
            raise ValueError(f"`rows` must be a share between 0 and 1, got {rows}. The default, 1, takes all rows.")
        check_layers(layers, "all linear and convolutional layers")
        self.beta = beta
        self.layers = layers
        self.rows = rows
        self._turned: dict[str, bool] = {}
        self._draws = 0

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(beta=self.beta, layers=self.layers)

    @override
    def choose(self, pl_module: LightningModule) -> Mapping[str, Tensor]:
        found = layer_weights(pl_module, self.layers, "ParsevalStep")
        for name, (weight, turned) in found.items():
            if weight.dtype.itemsize < 4:
                raise MisconfigurationException(
                    f"`ParsevalStep`: `{name}` is kept in {weight.dtype}, in which a step of {self.beta} is lost to"
                    " rounding. Train with `precision='bf16-mixed'`, which keeps weights in float32."
                )
            self._check_length(name, whole(weight).float().transpose(0, 1) if turned else whole(weight).float())
        self._turned = {name: turned for name, (_, turned) in found.items()}
        return {name: weight for name, (weight, _) in found.items()}

    @override
    def apply(self, name: str, weight: Tensor) -> None:
        full = whole(weight)
        outputs_first = full.transpose(0, 1) if self._turned[name] else full
        matrix = outputs_first.flatten(1)
        count = max(1, round(self.rows * len(matrix)))
        if count < len(matrix):
            chosen = self._drawn(len(matrix), weight.device)[:count]
            moved = matrix.index_copy(0, chosen, parseval_step(matrix[chosen], self.beta))
        else:
            moved = parseval_step(matrix, self.beta)
        moved = moved.reshape(outputs_first.shape)
        moved = moved.transpose(0, 1) if self._turned[name] else moved
        local(weight).copy_(Layout.of(weight).own(moved.contiguous()))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"draws": self._draws}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._draws = state_dict["draws"]

    @torch.no_grad()
    def _check_length(self, name: str, outputs_first: Tensor) -> None:
        """Refuse singular values that a step makes larger, and larger with each."""
        largest = torch.linalg.matrix_norm(outputs_first.flatten(1), 2).item()  # once, when the fit starts
        most = (1 + 2 / self.beta) ** 0.5
        if largest > most:
            raise MisconfigurationException(
                f"`ParsevalStep`: `{name}` has a singular value of {largest:.3g}, and steps of beta={self.beta} lead"
                f" away from 1 above {most:.3g}. Take a smaller `beta`, or scale the weight down."
            )

    def _drawn(self, count: int, device: torch.device) -> Tensor:
        """All rows in an order that a counter draws."""
        self._draws += 1
        places = torch.arange(1, count + 1, device=device) + (self._draws << 32)
        return hashed(hashed(places * GOLDEN)).argsort()
