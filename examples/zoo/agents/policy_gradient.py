"""Policy gradient in a gridworld whose features die at a large rate, with no entropy to hold them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from examples.zoo.material import Learner, mlp
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .gridworld import GridWorld, efficiency

SIZE, WORLDS, HORIZON, DISCOUNT, STEPS = 5, 24, 8, 0.9, 600


class Rollouts(IterableDataset[tuple[Tensor, ...]]):
    """Plays some steps with the policy as it is."""

    def __init__(self, model: "ActorCritic", seed: int) -> None:
        self.model, self.seed = model, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed)
        world = GridWorld(SIZE, WORLDS, generator)
        while True:
            played = []
            for _ in range(HORIZON):
                cells = world.cells
                with torch.no_grad():
                    chances = self.model(cells)[0].softmax(dim=1).nan_to_num(0.25)
                actions = torch.multinomial(chances, 1, generator=generator).squeeze(1)
                played.append((cells, actions, *world.step(actions)))
            yield tuple(torch.stack(part) for part in zip(*played, strict=True))


class ActorCritic(Learner):
    """A policy and a value on common features."""

    def __init__(self, rate: float, entropy: float) -> None:
        super().__init__(rate)
        self.entropy = entropy
        self.body = nn.Sequential(mlp(SIZE**2, 64, 64), nn.ReLU())
        self.policy, self.value = nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(..., 4)`` and values ``(...)``, from cells one-hot."""
        features = self.body(nn.functional.one_hot(cells, SIZE**2).float())
        return self.policy(features), self.value(features).squeeze(-1)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783)."""
        cells, actions, after, rewards, reached = batch
        logits, values = self(cells)
        with torch.no_grad():
            returns, tail = torch.empty_like(rewards), self(after[-1])[1]
            for t in reversed(range(HORIZON)):
                tail = rewards[t] + DISCOUNT * tail * ~reached[t]
                returns[t] = tail
        log_chances = logits.log_softmax(dim=-1)
        chosen = log_chances.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_chances.exp() * log_chances).sum(dim=-1).mean()
        gain = (chosen * (returns - values).detach()).mean() + self.entropy * entropy
        return 0.5 * nn.functional.mse_loss(values, returns) - gain


def make(seed: int, careful: bool) -> Habitat:
    """Five by five cells."""
    model = ActorCritic(*((3e-3, 0.01) if careful else (0.1, 0.0)))
    world = GridWorld(SIZE, 1, torch.Generator())
    return Habitat(
        model,
        [DataLoader(Rollouts(model, seed), batch_size=None)],
        [CollapseMonitor(), SpectralAlignmentMonitor(), PlasticityMonitor()],
        steps=STEPS,
        every=15,
        embedding=model.body,
        held_out=lambda: efficiency(world, lambda cells: model(cells)[0].argmax(dim=1)),
    )


SPECIMENS = (
    Specimen(
        "policy gradient in haste",
        make,
        "a large rate without entropy: the policy freezes and features die",
        kind="plasticity_loss",
        setting="careful",
        healthy=True,
        sick=False,
        claims=("complete_collapse", "dimensional_collapse", "loss_explosion"),
        family="agent",
    ),
)
