"""Feature learning monitor: whether training is rich or lazy, layer by layer, on samples that stay the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, isfinite, nan
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.callbacks.evaluation.evaluation_pass import Inputs
from lightning_collapse.callbacks.evaluation.probe_pass import (
    caller_of,
    first_samples,
    plain,
    run_probe,
    tensors_of,
)
from lightning_collapse.callbacks.monitors.monitor import Detail, Monitor, Name
from lightning_collapse.functional.feature_learning import critical_temperature
from lightning_collapse.monitoring.feature_learning import MEASURES, beginning, since
from lightning_collapse.monitoring.probe_capture import ProbeCapture, Probed
from lightning_collapse.utilities.arguments import check_layers
from lightning_collapse.utilities.batch import batch_size
from lightning_collapse.utilities.distributed import all_reduce_sum, from_first_process, process_rank, world_size
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.module_tree import is_linear
from lightning_collapse.utilities.modules import clean_name, curve_name, find_modules
from lightning_collapse.utilities.parameters import real_parameters
from lightning_collapse.utilities.points import Flag, Point
from lightning_collapse.utilities.registry import Curve
from lightning_collapse.utilities.trainer import refuse_flattened, to_device
from lightning_collapse.utilities.weight_matrices import weight_matrices, whole

SAMPLES, MAX_SAMPLES, MAX_DEFAULT_LAYERS = 64, 256, 6
STEPS_PER_POINT = 250
"""Times the share of the batch that the probe is: a point costs up to two and a half times as much as a step."""
_NO_TENSOR = "{} did not run on the probe, or returned no tensor: only the weights are read."
_OF_HEAD = ("beta_ratio", "mean_norm")
_RICH, _LOTTERY = "Liu et al. 2024, arXiv 2310.08513", "Yang 2026, arXiv 2605.24057 (on the sphere: ours)"


class FeatureLearningMonitor(Monitor):
    """Log how far weights, features and tangent kernels have come from where they began: rich training, or lazy.

    Lazy training leaves them nearly as they were and fits a linear model of them; rich training makes features.
    **Logged metrics**, ``feature_learning/{layer}/...``, to every logger and to ``trainer.callback_metrics``:

    {curves}

    A fixed probe is passed in eval mode before the first update and at every point. Alignments are cosines of what is
    off the diagonal of two U-centred Gram matrices of its samples: the published ones, with diagonal and mean, read 0.9
    and more of unrelated networks (see :mod:`lightning_collapse.functional.feature_learning`). Null of the
    representation is what unrelated random weights on the first inputs read, of the kernel what gradients dealt to
    other samples read, of signs what independent ones of as frequent units read, of the null space what an update in a
    random direction reads. ``null_space_share`` is about the probe's inputs (others span more), of
    layers with 256 inputs at most, or as few rows.

    The tangent kernel is that of one random direction of the output of the layer that runs last, with respect to one
    layer's weight; exact, or for wide layers that see many positions by a projection which is always the same.

    ``beta_ratio`` and ``mean_norm`` are drawn of heads with a temperature. Of heads without labels prototypes part
    above 1 and end as one below (balancing shifts that point); with labels the ratio is a scale, and no transition.

    The model is called by its ``training_step``, with equal random numbers every time, and nothing is logged, drawn or
    changed. Under manual optimization it is called by ``forward``. Of the beginning weights (a million entries of each
    at most), signs and Gram matrices are kept, in checkpoints as well; their size is said when training starts. Where
    parameters are sharded there is no tangent kernel.

    Args:
        layers: Names of submodules, or glob patterns of them; all trainable linear layers and convolutions inside
            count. ``None`` takes six, spread over the depth. Tangent kernel and null space are of linear layers only.
        probe: A batch like those of the training, 256 samples at most; ``None`` takes the first 64 samples of the first
            training batch of the first process.
        temperatures: Of heads, by the name of the layer that holds the prototypes. Linear layers with a number
            ``temperature``, ``log_scale`` or ``logit_scale`` of their own are found.
        every_n_steps: Optimizer steps between two points. ``None`` takes the smallest multiple of
            ``Trainer(log_every_n_steps)`` at which passes cost about 1 % of the training.
        inputs: How the model is called on a batch: ``lambda module, batch: module.net(batch[0])``.
        detail: ``"low"`` keeps ``n``, ``flag`` and ``nonfinite_fraction`` from loggers; rules read them all the same.

    Raises:
        ValueError: On an argument of the wrong kind; when the fit starts, as ``MisconfigurationException``, if no layer
            can be trained, a pattern matches nothing, the model cannot be called on ``probe``, or for
            ``strategy="fsdp"``, whose flattened weights belong to no layer.

    References:
        Liu et al., *How connectivity structure shapes rich and lazy learning in neural circuits*, ICLR 2024.
        https://arxiv.org/abs/2310.08513

    Example::

        trainer = Trainer(callbacks=[FeatureLearningMonitor()])
    """

    family = "feature_learning"
    declares = (
        Curve("weight_change", "distance from the first weight, over its norm", "0 to infinity", "near 0: lazy", _RICH),
        Curve("representation_alignment", "features of the probe, then and now", "-1 to 1", "near 1: lazy", _RICH),
        Curve("kernel_alignment", "gradients of the probe's samples, then and now", "-1 to 1", "near 1: lazy", _RICH),
        Curve("sign_similarity", "share of activities with the sign they had", "0 to 1", "near 1: lazy", _RICH),
        Curve("null_space_share", "part of the weight's change that no input of the probe sees", "0 to 1", "near null"),
        Curve("beta_ratio", "critical temperature of a head, over its own", "0 to infinity", "below 1", _LOTTERY),
        Curve("mean_norm", "length of the mean direction of a head's inputs", "0 to 1", "near 1", _LOTTERY),
    )
    identity = ("layers", "every_n_steps")

    def __init__(
        self,
        layers: Sequence[str] | None = None,
        probe: Any = None,
        temperatures: Mapping[str, float] | None = None,
        every_n_steps: int | None = None,
        inputs: Inputs | None = None,
        detail: Detail = "high",
    ) -> None:
        super().__init__(every_n_steps, detail)
        check_layers(layers, "the default layers")
        if inputs is not None and not callable(inputs):
            raise ValueError(f"`inputs` takes a function of the module and a batch, got {inputs!r}.")
        if probe is not None and not any(tensor.ndim for tensor in tensors_of(probe)):
            raise ValueError(f"`probe` takes a batch with tensors in it, got {probe!r}.")
        if probe is not None and batch_size(probe) > MAX_SAMPLES:
            raise ValueError(
                f"`probe` may have {MAX_SAMPLES} samples, got {batch_size(probe)}. Pass the first of them."
            )
        heads = {} if temperatures is None else temperatures
        if not isinstance(heads, Mapping) or not all(isinstance(t, int | float) and t > 0 for t in heads.values()):
            raise ValueError(f"`temperatures` takes positive numbers by names of layers, got {temperatures!r}.")
        self.layers, self.probe, self.temperatures, self.inputs = layers, probe, temperatures, inputs
        self._forget()

    def _forget(self) -> None:
        self._module: LightningModule | None = None
        self._call: Inputs | None = None
        self._weights: dict[str, Callable[[], Tensor]] = {}
        self._layers: dict[str, nn.Module] = {}
        self._others: list[nn.Module] = []
        self._heads: dict[str, Callable[[], Tensor | float]] = {}
        self._probe: Any = None
        self._kept: dict[str, dict[str, Tensor]] | None = None
        self._multiple = 0

    @override
    def state(self) -> dict[str, Any]:
        if self._kept is None:
            return {}
        return {"probe": plain(self._probe), "kept": plain(self._kept), "multiple": self._multiple}

    @override
    def restore(self, state: Mapping[str, Any]) -> None:
        if state and self._module is not None:
            device = self._module.device
            self._probe = move_data_to_device(state["probe"], device)
            self._kept = move_data_to_device(state["kept"], device)
            self._multiple = state["multiple"]

    @override
    def cadence(self, trainer: Trainer) -> int:
        return super().cadence(trainer) * (1 if self.every_n_steps is not None else max(self._multiple, 1))

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_flattened(trainer, type(self).__name__)
        self._forget()
        self._module, self._call = pl_module, caller_of(pl_module, self.inputs)
        self._choose(pl_module)
        self._choose_heads(pl_module)
        if self._call is None:
            self.warn_once(
                "under manual optimization the model is called by `forward`, and has none: only weights are read. Say"
                " how it is called: `inputs=lambda module, batch: module.net(batch[0])`."
            )
        if self.probe is not None:
            self._probe = to_device(trainer, first_samples(self.probe, MAX_SAMPLES))
            self._check_probe(trainer, pl_module)

    @override
    def stop(self) -> None:
        self._forget()

    @override
    def before_batch(self, trainer: Trainer, batch: Any, batches_left: int) -> None:
        if self._kept is not None or self._module is None:
            return
        self._kept = {}  # what fails is not tried again
        probe = first_samples(batch, SAMPLES) if self._probe is None else self._probe
        if world_size() > 1:
            probe = move_data_to_device(from_first_process(move_data_to_device(probe, "cpu")), self._module.device)
        self._probe = probe
        training, every = from_first_process(batch_size(batch)), super().cadence(trainer)
        training *= trainer.accumulate_grad_batches * every
        self._multiple = max(ceil(STEPS_PER_POINT * batch_size(probe) / max(training, 1)), 1)
        probed: dict[str, Probed] = {}
        with self.contained("the first pass over the probe", "only weights are read"):
            probed = self._pass(trainer)
        kept: dict[str, dict[str, Tensor]] = {}
        with self.contained("keeping the beginning", "there are no points"):
            for name, read in self._weights.items():
                kept[name] = beginning(read(), probed.get(name), is_linear(self._layers[name]))
        # the same on every process, whatever their devices
        self._kept = move_data_to_device(from_first_process(move_data_to_device(kept, "cpu")), self._module.device)
        for name in self._weights:
            if self._call is not None and name not in probed:
                self.warn_of_layer(name, _NO_TENSOR)
        size = sum(x.numel() * x.element_size() for x in tensors_of([self._kept, probe])) / 2**20
        rank_zero_info(
            f"`FeatureLearningMonitor` keeps {size:.1f} MiB of the beginning, in checkpoints too, and reads"
            f" {len(self._weights)} layers every {self.cadence(trainer)} steps. Choose with `layers=[...]` and"
            " `every_n_steps`."
        )

    @override
    def read(self, trainer: Trainer, pl_module: LightningModule) -> dict[Name, Tensor]:
        """Every reading with its null, from the first process."""
        names = [(name, measure) for name in self._weights for measure in MEASURES]
        names += [(name, measure) for name in self._heads for measure in _OF_HEAD]
        found: dict[Name, Tensor] = {}
        with self.contained("reading the probe", "points may be missing"):
            probed = self._pass(trainer)
            for name, read in self._weights.items():
                kept, linear = (self._kept or {}).get(name), is_linear(self._layers[name])
                weight = read()
                if kept is not None:
                    readings = since(kept, weight, probed.get(name), linear)
                    found |= {(name, measure): pair for measure, pair in readings.items()}
            for name, temperature in self._heads.items():
                if name in probed:
                    found |= {(name, measure): pair for measure, pair in _of_head(probed[name], temperature()).items()}
        missing = torch.full((2,), nan, device=pl_module.device)
        table = torch.stack([found.get(name, missing).to(missing) for name in names])
        if world_size() > 1:
            table = all_reduce_sum(table if process_rank() == 0 else torch.zeros_like(table))
        return dict(zip(names, table, strict=True))

    @override
    def points(self, step: int, numbers: Mapping[Name, Any]) -> list[Point]:
        samples = batch_size(self._probe)
        kept = self._kept or {}
        made = []
        for (name, measure), (value, null) in numbers.items():
            flag = Flag.OK if isfinite(value) else Flag.FEW_ROWS if samples < 4 else Flag.NONFINITE
            if isfinite(value) or measure in _OF_HEAD or _can_be(measure, kept.get(name, {})):
                made.append(Point(self.family, name, measure, step, value, samples, null, flag))
        return made

    def _pass(self, trainer: Trainer) -> dict[str, Probed]:
        """What the layers do on the probe now; nothing where the model cannot be called."""
        if self._module is None or self._call is None or self._probe is None:
            return {}
        capture = ProbeCapture(self._layers, batch_size(self._probe), self._others)
        try:
            run_probe(trainer, self._module, self._call, self._probe, capture.backward)
            return capture.pop()
        finally:
            capture.remove()

    def _check_probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._call is None or any(map(nn.parameter.is_lazy, pl_module.parameters())):
            return
        try:
            run_probe(trainer, pl_module, self._call, self._probe)
        except Exception as error:
            raise MisconfigurationException(
                "`FeatureLearningMonitor(probe=...)`: the model cannot be called on it"
                f" ({type(error).__name__}: {error}). Pass a batch like those of the training, or say how the model is"
                " called: `inputs=lambda module, batch: module.net(batch[0])`."
            ) from error

    def _choose(self, pl_module: LightningModule) -> None:
        """Which layers, and how their weights are read."""
        trained = real_parameters(pl_module).kept.values()
        trainable = {id(p) for p in trained if p.requires_grad}
        found: dict[int, list[Callable[[], Tensor]]] = {}
        names = {id(module): clean_name(name) for name, module in reversed(list(pl_module.named_modules()))}
        modules = {}
        for matrix in weight_matrices(pl_module):
            layer = matrix.module
            one = is_linear(layer) or isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            if one and any(id(p) in trainable and p.ndim > 1 for p in layer.parameters()):
                found.setdefault(id(layer), []).append(matrix.read)
                modules[id(layer)] = layer
        self._others = list(modules.values())
        if self.layers is not None:
            try:
                chosen = find_modules(pl_module, self.layers).values()
            except ValueError as error:
                call = f"`FeatureLearningMonitor(layers={list(self.layers)!r})`"
                raise MisconfigurationException(f"{call}: {error}") from error
            inside = {id(module) for one in chosen for module in one.modules()}
            found = {key: reads for key, reads in found.items() if key in inside}
        if not found:
            raise MisconfigurationException(
                f"`FeatureLearningMonitor(layers={self.layers!r})`: no linear layer or convolution of"
                f" {type(pl_module).__name__} can be trained there. Name one whose weight has `requires_grad=True`."
            )
        keys = list(found)
        if self.layers is None and len(keys) > MAX_DEFAULT_LAYERS:
            last = len(keys) - 1
            keys = [keys[round(i * last / (MAX_DEFAULT_LAYERS - 1))] for i in range(MAX_DEFAULT_LAYERS)]
        for key in keys:
            name = curve_name(names[key])
            self._layers[name], self._weights[name] = modules[key], _reader(found[key])

    def _choose_heads(self, pl_module: LightningModule) -> None:
        for name, layer in pl_module.named_modules():
            if is_linear(layer) and (temperature := _temperature_of(layer)) is not None:
                self._heads[curve_name(clean_name(name))] = temperature
                self._layers.setdefault(curve_name(clean_name(name)), layer)
        for name, value in (self.temperatures or {}).items():
            try:
                [(found, layer)] = find_modules(pl_module, [name]).items()
            except ValueError as error:
                call = f"`FeatureLearningMonitor(temperatures={dict(self.temperatures or {})!r})`"
                raise MisconfigurationException(f"{call}: {error}") from error
            self._heads[curve_name(found)] = lambda value=value: value  # type: ignore[misc]
            self._layers.setdefault(curve_name(found), layer)


def _reader(reads: Sequence[Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Query, key and value that are packed are one layer."""
    return lambda: torch.cat([read() for read in reads])


def _can_be(measure: str, kept: Mapping[str, Tensor]) -> bool:
    """Whether a reading that is missing could have been there: then it is a NaN, and not nothing."""
    needs = {"weight_change": "weight", "kernel_alignment": "kernel", "null_space_share": "kernel"}
    return needs.get(measure, "gram") in kept and measure != "null_space_share"


def _temperature_of(layer: nn.Module) -> Callable[[], Tensor] | None:
    for name in ("temperature", "log_scale", "logit_scale"):
        value = getattr(layer, name, None)
        if isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1):

            def read(name: str = name) -> Tensor:
                number = getattr(layer, name)
                number = whole(number) if isinstance(number, Tensor) else torch.tensor(number)
                return number.squeeze() if name == "temperature" else (-number.squeeze()).exp()

            return read
    return None


def _of_head(probed: Probed, temperature: Tensor | float) -> dict[str, Tensor]:
    rows = evenly(probed.inputs.flatten(0, 1), 1024)
    found = critical_temperature(rows)
    ratio = torch.stack([found.temperature, found.null]) / temperature
    return {"beta_ratio": ratio, "mean_norm": torch.stack([found.mean_norm, torch.full_like(found.mean_norm, nan)])}
