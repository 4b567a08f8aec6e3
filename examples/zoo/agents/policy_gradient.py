"""Policy gradient in a gridworld whose features die at a large rate, with no entropy to hold them."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.zoo.material import Learner, mlp
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import CollapseMonitor, PlasticityMonitor, SpectralAlignmentMonitor

from .gridworld import GridWorld, efficiency
from .rollouts import HORIZON, SIZE, Rollouts

DISCOUNT, STEPS = 0.9, 600


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
        total: Tensor = 0.5 * nn.functional.mse_loss(values, returns) - gain
        return total


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
