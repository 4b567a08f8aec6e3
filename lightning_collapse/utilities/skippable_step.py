"""Skipping an optimizer step: parameters, moments and step counters stay as they are, bit by bit."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer

Decision = Tensor | bool | None
"""Whether to skip: 0-dimensional ``float32`` of exactly 0 or 1 on the device of the parameters, or known already."""
_FUSED = {inspect.unwrap(kind.step) for kind in (Adam, Adagrad, SGD)}  # AdamW's is that of Adam


class SkippableStep:
    """Asks right before each update of an optimizer whether it shall be made, and leaves it out if not.

    A fused optimizer of torch is told on the device, by ``optimizer.found_inf``, and nothing waits for it; where a
    gradient scaler has set that, the larger of both counts and the scale does not change. For all others, and for a
    parameter's first update, before there are moments that could be kept, the flag is read, which waits for the device;
    the gradients are then taken away for the time of the step, since every optimizer of ``torch.optim`` but ``LBFGS``
    passes over parameters that have none, and are put back after it. A gradient of zero would not do: AdamW moves the
    parameters all the same.

    Works below Lightning too. It is asked inside :meth:`torch.optim.Optimizer.step`, after the closure, if there is
    one.

    Args:
        optimizer: Any but those that run their closure several times in a step.
        decide: Asked once in each step; ``None`` and ``False`` make the update.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> step = SkippableStep(optimizer, lambda: not weight.grad.isfinite().all())
        >>> weight.grad = torch.tensor([1.0, torch.nan])
        >>> optimizer.step()
        >>> weight.detach(), len(optimizer.state)
        (tensor([1., 1.]), 0)
        >>> step.remove()
    """

    def __init__(self, optimizer: Optimizer, decide: Callable[[], Decision]) -> None:
        self.optimizer = optimizer
        self.decide = decide
        self._taken: list[tuple[Tensor, Tensor]] = []
        self._told = False
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    def remove(self) -> None:
        """Leave the optimizer as it was found; may be called more than once."""
        for handle in self._handles:
            handle.remove()
        self._restore()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step may step the optimizer
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._restore()  # what a step that has raised an exception left
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._apply(self.decide())
            return None

        decided: list[Decision] = []

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def settle() -> None:
            decided.extend([] if decided else [self.decide()])  # of one step one, however often its closure is run
            self._apply(decided[0])

        def closure_and_decision() -> Any:
            loss = closure()
            settle()
            return loss

        return (args[:1], {**kwargs, "closure": closure_and_decision})

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()

    @torch.no_grad()
    def _apply(self, skips: Decision) -> None:
        if isinstance(skips, Tensor) and self._takes_found_inf():
            found: Tensor | None = getattr(self.optimizer, "found_inf", None)
            # the kernels compare with 1, and a scaler adds up what it finds on several devices
            flag = skips if found is None else torch.maximum(found, skips.to(found)).clamp(max=1)
            self._told = found is None  # else the scaler takes it away
            self.optimizer.found_inf = flag
        elif skips:  # of a tensor: waits for the device
            self._taken = [(p, p.grad) for p in self._parameters() if p.grad is not None]
            for parameter, _ in self._taken:
                parameter.grad = None

    def _restore(self) -> None:
        taken, self._taken = self._taken, []
        for parameter, gradient in taken:
            parameter.grad = gradient
        if self._told:
            self._told = False
            vars(self.optimizer).pop("found_inf", None)

    def _takes_found_inf(self) -> bool:
        """Whether it is fused, and has moments of every parameter that it is about to update.

        The first update makes them: a skipped one would leave the momentum of SGD uninitialized.
        """
        groups = self.optimizer.param_groups
        if inspect.unwrap(type(self.optimizer).step) not in _FUSED or not all(group.get("fused") for group in groups):
            return False
        state = self.optimizer.state
        for group in groups:
            key = "step" if "momentum" not in group else "momentum_buffer" if group["momentum"] else ""
            if key and any(state.get(p, {}).get(key) is None for p in group["params"] if p.grad is not None):
                return False
        return True

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.optimizer.param_groups:
            yield from group["params"]
