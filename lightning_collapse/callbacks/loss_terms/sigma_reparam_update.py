"""Power steps of sigma-reparametrized layers, one after each step of the optimizer that moves their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_collapse.layers.sigma_reparam import SigmaReparam
from lightning_collapse.utilities.containment import Containment


class SigmaReparamUpdate(Callback):
    """Keeps the spectral norms of :class:`~lightning_collapse.layers.SigmaReparam` layers those of their weights.

    One power step per optimizer step, right after it: not per micro-batch, not for an update that a gradient scaler
    leaves out, and, of several optimizers, for the weights of the one that stepped. It works with automatic and manual
    optimization, mixed precision, DDP, ``torch.compile`` and FSDP2, whose weights it gathers, on every process. Two
    matrix-vector products per layer, and nothing waits for the device. State is the layers' own.

    Raises:
        MisconfigurationException: When the fit starts, if no layer is converted, or the strategy is ``"fsdp"`` or
            DeepSpeed, which keep weights in pieces of their own.

    Example::

        SigmaReparam.convert_(model)
        trainer = Trainer(callbacks=[SigmaReparamUpdate()])
    """

    def __init__(self) -> None:
        super().__init__()
        self.contained = Containment("SigmaReparamUpdate")
        self._weights: list[tuple[SigmaReparam, Tensor]] = []
        self._removers: list[Callable[[], None]] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self.contained = Containment("SigmaReparamUpdate")
        if isinstance(trainer.strategy, DeepSpeedStrategy | FSDPStrategy):
            raise MisconfigurationException(
                f"`SigmaReparamUpdate` reads whole weights, and {type(trainer.strategy).__name__} keeps them in pieces"
                " of its own. Train with `strategy='ddp'`, or FSDP2 (`ModelParallelStrategy`)."
            )
        layers = [layer for layer in pl_module.modules() if isinstance(layer, SigmaReparam)]
        if not layers:
            raise MisconfigurationException(
                f"`SigmaReparamUpdate` finds no layer to follow in {type(pl_module).__name__}. Convert the model first:"
                " `SigmaReparam.convert_(model)`, before the fit or in `configure_model`."
            )
        # the parameters that optimizers hold: FSDP2 puts gathered ones in their place for a while
        self._weights = [(layer, layer.raw) for layer in layers]
        for optimizer in trainer.optimizers:
            hook = optimizer.register_step_post_hook(lambda stepped, *_: self._after_step(stepped))
            self._removers.append(hook.remove)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _after_step(self, optimizer: Optimizer) -> None:
        """Follow what this optimizer has stepped. Collective where weights are sharded."""
        with self.contained("following weights", "spectral norms stay as they are from now on", self._stop):
            moved = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
            for layer, weight in self._weights:
                if id(weight) in moved:
                    layer.follow(weight)

    def _stop(self) -> None:
        for remove in self._removers:
            remove()
        self._removers, self._weights = [], []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_removers": [], "_weights": []}  # of a copy: neither hooks nor the model
