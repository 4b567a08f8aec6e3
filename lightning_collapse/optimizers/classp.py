"""Adjustment suppression and sparsity promotion (CLASSP): only large gradients move a weight, less the more have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_collapse.utilities.parameters import as_real
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.sharding import local


class CLASSP(Optimizer):
    r"""Adjustment suppression and sparsity promotion: a generalized AdaGrad with a threshold [1].

    Of every weight :math:`w_i` with gradient :math:`g_i`, where :math:`g_i^2 > \theta` and nowhere else:

    .. math:: A_i \leftarrow A_i + |g_i|^p, \qquad w_i \leftarrow w_i - \frac{\eta\, g_i}{(\epsilon + A_i)^{1/p}}

    Weights that earlier tasks have moved a lot move little from then on, and weights that matter little now are left
    to later tasks. So keep :math:`A`, the state of the optimizer, from one task to the next. The paper trains the first
    task with a threshold and ``apply_decay=False``, which counts without dividing, and the second with
    ``threshold=0.0`` and ``apply_decay=True``; set both in ``param_groups``.

    The published code differs from the paper, which is what is done here: there one gradient above the threshold lets
    the whole tensor move, and the power is lost. Equation 1 sums up to the step before, Algorithm 1 counts the present
    gradient too; so does this, as AdaGrad does: with ``power=2`` and ``threshold=0.0`` it is
    ``torch.optim.Adagrad(params, lr, initial_accumulator_value=eps, eps=0)``.

    Nothing waits for the device. A NaN is not above any threshold. Sums over weights of half precision are ``float32``;
    shards (``DTensor``) are updated where they lie; of a complex weight real and imaginary part are weights each.

    Args:
        params: Parameters, or groups of them, each with any of the following of its own.
        lr: Learning rate η; 0.2 is the code's default, as are the next three.
        threshold: θ, which the square of a gradient must exceed.
        eps: ε, what the sums start from.
        power: The exponent ``p``.
        apply_decay: Whether to divide by the sums; they grow either way.

    Raises:
        ValueError: If ``lr`` or ``threshold`` is negative, or ``eps`` or ``power`` not positive.
        RuntimeError: In :meth:`step`, if a gradient is sparse.

    References:
        [1] Ludwig, *CLASSP: a Biologically-Inspired Approach to Continual Learning through Adjustment Suppression and
        Sparsity Promotion*, 2024. https://arxiv.org/abs/2405.09637

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> optimizer = CLASSP([weight], lr=1.0, threshold=0.5, power=1.0)
        >>> weight.grad = torch.tensor([3.0, 0.5])
        >>> optimizer.step()
        >>> weight.data
        tensor([-1.0000,  0.0000])
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.2,
        threshold: float = 0.5,
        eps: float = 1e-5,
        power: float = 1.0,
        apply_decay: bool = True,
    ) -> None:
        defaults = {"lr": lr, "threshold": threshold, "eps": eps, "power": power, "apply_decay": apply_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, such as those of a new head.

        Raises:
            ValueError: If one of its hyperparameters is out of range.
        """
        for name, least, allowed in (("lr", 0, True), ("threshold", 0, True), ("eps", 0, False), ("power", 0, False)):
            value = param_group.get(name, self.defaults[name])
            if not (least < value < inf or (allowed and value == least)):
                raise ValueError(
                    f"`{name}` must be finite and {'not negative' if allowed else 'positive'}, got {value}."
                )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned; sums keep their precision, which torch would take from the weights.

        Args:
            state_dict: State of an optimizer of as many parameters in as many groups.
        """
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(i) for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for p, state in zip(params, saved, strict=True):
            if state is not None:
                self.state[p]["sum"] = state["sum"].to(device=p.device, dtype=_sum_dtype(p), copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights.

        Args:
            closure: Evaluates the model again and returns the loss, as for any optimizer of torch.

        Returns:
            What ``closure`` returned.

        Raises:
            RuntimeError: If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in moved):
                raise RuntimeError(
                    "`CLASSP` does not take sparse gradients. Build the layer with `sparse=False`, or give its"
                    " parameters to another optimizer."
                )
            if moved:
                self._update(moved, group)
        return loss

    def _update(self, params: list[nn.Parameter], group: dict[str, Any]) -> None:
        sums = [local(self._sum_of(p, group["eps"])) for p in params]
        weights = [as_real(local(p).detach()) for p in params]
        grads = [as_real(local(p.grad).detach()).to(total.dtype) for p, total in zip(params, sums, strict=True)]
        least, power = sqrt(group["threshold"]), group["power"]
        # |g| and not its square, which would underflow
        grads = [torch.where(g.abs() > least, g, 0.0) for g in grads]
        wide = [w if w.dtype == total.dtype else w.to(total.dtype) for w, total in zip(weights, sums, strict=True)]
        if power == 2:
            foreach.addcmul_(sums, grads, grads)
        else:
            grown = foreach.abs(grads)
            foreach.add_(sums, foreach.pow(grown, power) if power != 1 else grown)
        if not group["apply_decay"]:
            foreach.add_(wide, grads, alpha=-group["lr"])
        elif power == 2:
            foreach.addcdiv_(wide, grads, foreach.sqrt(sums), value=-group["lr"])
        else:
            scales = foreach.pow(sums, 1 / power) if power != 1 else sums
            foreach.addcdiv_(wide, grads, scales, value=-group["lr"])
        for weight, new in zip(weights, wide, strict=True):
            if weight is not new:
                weight.copy_(new)

    def _sum_of(self, parameter: nn.Parameter, eps: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["sum"] = torch.full_like(as_real(parameter), eps, dtype=_sum_dtype(parameter))
        total: Tensor = state["sum"]
        return total


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(as_real(parameter).dtype, torch.float32)
