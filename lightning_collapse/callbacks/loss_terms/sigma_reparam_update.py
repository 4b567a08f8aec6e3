"""Power steps of sigma-reparametrized layers, one after each step of the optimizer that moves their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override

from lightning_collapse.callbacks.constraints.constraint import Constraint
from lightning_collapse.layers.sigma_reparam import SigmaReparam


class SigmaReparamUpdate(Constraint):
    """Keeps the spectral norms of :class:`~lightning_collapse.layers.SigmaReparam` layers those of their weights.

    One power step per optimizer step, right after it, with all that :class:`~lightning_collapse.Constraint` works with;
    weights that FSDP2 has sharded are gathered, on every process. Two matrix-vector products per layer, and nothing
    waits for the device. State is the layers' own.

    Raises:
        MisconfigurationException: When the fit starts, if no layer is converted, or the strategy is ``"fsdp"`` or
            DeepSpeed, which keep weights in pieces of their own.

    Example::

        SigmaReparam.convert_(model)
        trainer = Trainer(callbacks=[SigmaReparamUpdate()])
    """

    consequence = "spectral norms stay as they are from now on"

    def __init__(self) -> None:
        super().__init__()
        self._layers: dict[str, SigmaReparam] = {}

    @override
    def choose(self, pl_module: LightningModule) -> Mapping[str, Tensor]:
        self._layers = {name: layer for name, layer in pl_module.named_modules() if isinstance(layer, SigmaReparam)}
        if not self._layers:
            raise MisconfigurationException(
                f"`SigmaReparamUpdate` finds no layer to follow in {type(pl_module).__name__}. Convert the model first:"
                " `SigmaReparam.convert_(model)`, before the fit or in `configure_model`."
            )
        return {name: layer.raw for name, layer in self._layers.items()}

    @override
    def apply(self, name: str, weight: Tensor) -> None:
        self._layers[name].follow(weight)

    def _stop(self) -> None:
        super()._stop()
        self._layers = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": {}}
