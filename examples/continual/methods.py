"""Ways not to forget, each with four weights to choose from: penalties, replay, projection, what changes weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_collapse import (
    FPF,
    ConsolidateUpdate,
    Distillation,
    DynamicEMA,
    Projection,
    PrototypeMemory,
    Replay,
    ShrinkAndPerturb,
    TaskAware,
    WeightPenalty,
)
from lightning_collapse.functional.prototypes import prototype_logits
from lightning_collapse.optimizers import CLASSP
from lightning_collapse.penalties import (
    EWC,
    KFACEWC,
    L2SP,
    MAS,
    L2Init,
    RankOneEWC,
    RWalk,
    SynapticIntelligence,
)
from lightning_collapse.projections import GPM, OGD, SGP, HebbianSubspace
from lightning_collapse.replay import ReplayBuffer

KEPT, MOST_CLASSES = 100, 10
FISHERS = (1.0, 10.0, 100.0, 1000.0)
RANK_ONE = (0.15, 1.5, 15.0, 150.0)
OfWeight = Callable[[float], Sequence[Callback]]


class Method(NamedTuple):
    """A way not to forget."""

    weights: Sequence[float]
    callbacks: OfWeight
    optimizer: Callable[[float], Callable[..., Optimizer]] | None = None
    outputs: Callable[[Sequence[Callback], Any, Any], Tensor] | None = None  # where classes are not those of logits


class Exemplars(TaskAware):
    """Fills a buffer for herding when a task ends."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        super().__init__()
        self.buffer = buffer

    @torch.no_grad()
    def end_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Offer all rows with their hidden features."""
        loader: Any = trainer.train_dataloader
        images, labels = loader.dataset.tensors
        network: Any = pl_module.net
        hidden = network[:2](images)
        self.buffer.add([images, labels], features=nn.functional.normalize(hidden, dim=1))


class OneForAllTasks:
    """Makes an optimizer once: one that counts over tasks, and would begin anew."""

    def __init__(self, make: Callable[..., Optimizer]) -> None:
        self.make = make
        self.made: Optimizer | None = None

    def __call__(self, parameters: Any) -> Optimizer:
        """The same one every time."""
        self.made = self.made or self.make(parameters)
        return self.made


def _penalty(penalty: Any, *weights: float, **arguments: Any) -> Method:
    return Method(weights, lambda weight: [WeightPenalty(penalty(weight=weight, **arguments))])


def _replay(policy: Any, rows: float) -> Sequence[Callback]:
    """The weight is how many rows are rehearsed with every batch."""
    buffer = ReplayBuffer(KEPT, policy)
    replay = Replay(buffer, batch_size=int(rows))
    return [Exemplars(buffer), replay] if policy == "herding" else [replay]


def _beside_replay(
    make: Callable[[ReplayBuffer, float], Sequence[Callback]], weights: Sequence[float], rehearse: bool = True
) -> Method:
    """A buffer that is rehearsed, as many rows as a batch has, or only filled; and what else uses it, or does not."""

    def build(weight: float) -> Sequence[Callback]:
        buffer = ReplayBuffer(KEPT, "class_balanced")
        return [*make(buffer, weight), Replay(buffer, batch_size=None if rehearse else 0)]

    return Method(weights, build)


def _tuned(times: int, buffer: ReplayBuffer, lr: float) -> Sequence[Callback]:
    return [FPF(lambda: buffer.loader(32), fraction=0.5, iterations=100 // times, lr=lr, times=times)]


def _prototypes(_: float) -> Sequence[Callback]:
    memory = PrototypeMemory("net.1", labels=lambda batch: batch[1] + MOST_CLASSES * memory.task_index)
    return [memory]


def _nearest_of_all_tasks(callbacks: Sequence[Callback], module: Any, batch: Any) -> Tensor:
    """A class has a prototype of every task: the nearest of them counts."""
    [memory] = [callback for callback in callbacks if isinstance(callback, PrototypeMemory)]
    logits: Tensor = module(batch[0])
    if memory.prototypes is None:
        return logits
    scores = prototype_logits(nn.functional.normalize(module.net[:2](batch[0]), dim=1), memory.prototypes)
    missing = -scores.shape[1] % MOST_CLASSES
    padded = nn.functional.pad(scores, (0, missing), value=-torch.inf)
    return padded.reshape(len(logits), -1, MOST_CLASSES).amax(dim=1)[:, : logits.shape[1]]


def _classp(threshold: float) -> Callable[..., Optimizer]:
    return partial(CLASSP, lr=0.05, threshold=threshold, power=2)


METHODS = {
    "nothing": Method((0.0,), lambda _: []),
    "EWC": _penalty(EWC, 10.0, 100.0, 1000.0, 10000.0),
    "EWC, online": _penalty(EWC, 10.0, 100.0, 1000.0, 10000.0, online=True),
    "rank-1 EWC": _penalty(RankOneEWC, *RANK_ONE),
    "KFAC-EWC": _penalty(KFACEWC, *FISHERS),
    "synaptic intelligence": _penalty(SynapticIntelligence, 0.1, 1.0, 10.0, 100.0),
    "RWalk": _penalty(RWalk, 0.1, 1.0, 10.0, 100.0),
    "MAS": _penalty(MAS, 0.001, 0.01, 0.1, 1.0),
    "L2-init": _penalty(L2Init, 1e-5, 1e-4, 1e-3, 1e-2),
    "L2-SP": _penalty(L2SP, 1e-4, 1e-3, 1e-2, 1e-1),
    "LwF": Method((0.3, 1.0, 3.0, 10.0), lambda weight: [Distillation(weight=weight)]),
    "shrink and perturb": Method((0.4, 0.6, 0.8, 0.9), lambda shrink: [ShrinkAndPerturb(shrink=shrink)]),
    "CLASSP": Method((1e-5, 1e-4, 1e-3, 1e-2), lambda _: [], _classp),
    "CLASSP, sums go on": Method((1e-5, 1e-4, 1e-3, 1e-2), lambda _: [], lambda t: OneForAllTasks(_classp(t))),
    "replay, reservoir": Method((8, 16, 32, 64), partial(_replay, "reservoir")),
    "replay, class-balanced": Method((8, 16, 32, 64), partial(_replay, "class_balanced")),
    "replay, herding": Method((8, 16, 32, 64), partial(_replay, "herding")),
    "replay, LwF on it too": _beside_replay(
        lambda buffer, weight: [Distillation(weight=weight, replay=buffer)], (0.3, 1.0, 3.0, 10.0)
    ),
    "replay and EWC": _beside_replay(lambda _, weight: [WeightPenalty(EWC(weight=weight))], FISHERS),
    "LwF on replay": _beside_replay(
        lambda buffer, weight: [Distillation(weight=weight, replay=buffer)], (0.3, 1.0, 3.0, 10.0), rehearse=False
    ),
    "EWC, LwF on replay": _beside_replay(
        lambda buffer, weight: [WeightPenalty(EWC(weight=weight)), Distillation(replay=buffer)],
        FISHERS,
        rehearse=False,
    ),
    "rank-1 EWC, LwF on replay": _beside_replay(
        lambda buffer, weight: [WeightPenalty(RankOneEWC(weight=weight)), Distillation(replay=buffer)],
        RANK_ONE,
        rehearse=False,
    ),
    "FPF": _beside_replay(partial(_tuned, 1), (0.01, 0.03, 0.1, 0.3), rehearse=False),
    "k-FPF": _beside_replay(partial(_tuned, 4), (0.01, 0.03, 0.1, 0.3), rehearse=False),
    "GPM": Method((0.9, 0.95, 0.97, 0.99), lambda threshold: [Projection(GPM(threshold))]),
    "SGP": Method((0.9, 0.95, 0.97, 0.99), lambda threshold: [Projection(SGP(threshold))]),
    "Hebbian subspace": Method((5, 10, 20, 30), lambda number: [Projection(HebbianSubspace(int(number)))]),
    "OGD": Method((10, 25, 50, 100), lambda samples: [Projection(OGD(int(samples)))]),
    "dynamic EMA": Method((0.0,), lambda _: [DynamicEMA()]),
    "dynamic EMA, as released": Method((0.0,), lambda _: [DynamicEMA("released")]),
    "consolidated update": Method((0.0, 0.1, 0.3, 1.0), lambda gamma: [ConsolidateUpdate(gamma=gamma)]),
    "nearest prototype": Method((0.0,), _prototypes, outputs=_nearest_of_all_tasks),
}
"""By name; of those with one weight there is nothing to choose."""
