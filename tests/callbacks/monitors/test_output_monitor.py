"""``OutputMonitor``: which head, which rows, policies, the lens, and what is said of bad input."""

import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import CollapseGuard, OutputMonitor
from lightning_collapse.functional import output_rows
from lightning_collapse.utilities.output_head import output_head
from tests.toys import PointKeeper, fit

VOCABULARY, LENGTH, WIDTH = 11, 6, 16


def sequences(count=16, batch_size=8, seed=0):
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    labels[::2, -3:] = -100
    return DataLoader(TensorDataset(ids, labels), batch_size=batch_size)


class Language(LightningModule):
    """Blocks, a final norm and a head; keeps its logits and its loss."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.scale, self.seen = scale, []

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x) * self.scale)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        loss = cross_entropy(logits.flatten(0, 1), batch[1].flatten())
        self.seen.append((logits.detach().clone(), batch[1], loss.item()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def watch(model, monitor, loader=None, **kwargs):
    torch.manual_seed(0)
    keeper = PointKeeper()
    fit(model, [monitor, keeper], sequences() if loader is None else loader, **kwargs)
    return keeper


def at(keeper, key):
    return {point.step: point.value for point in keeper.curve(key)}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_curves_are_those_of_the_rows_that_count(precision):
    model = Language()
    keeper = watch(model, OutputMonitor(every_n_steps=1), precision=precision)
    for step, (logits, labels, _) in enumerate(model.seen):
        rows = output_rows(logits.double()[labels != -100])
        tolerance = {"rel": 1e-5 if precision in ("32-true", "64-true") else 1e-3}
        assert at(keeper, "output/head/entropy")[step] == pytest.approx(rows.entropy.mean().item(), **tolerance)
        assert at(keeper, "output/head/log_z")[step] == pytest.approx(rows.log_z.mean().item(), **tolerance)
        rms = rows.log_z.square().mean().sqrt().item()
        assert at(keeper, "output/head/log_z_rms")[step] == pytest.approx(rms, **tolerance)
        assert at(keeper, "output/head/max_logit")[step] == pytest.approx(rows.max_logit.max().item(), **tolerance)
        assert at(keeper, "output/head/n")[step] == (labels != -100).sum()
        assert at(keeper, "output/head/length")[step] == pytest.approx((labels != -100).sum().item() / len(labels))
    [point] = [p for p in keeper.curve("output/head/entropy") if p.step == 0]
    assert point.null == pytest.approx(math.log(VOCABULARY))
    assert 0 < point.error < 1


def test_padding_that_the_batch_names_does_not_count():
    class Padded(Language):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["input_ids"], batch["other"]), batch_idx)

    ids = torch.randint(1, VOCABULARY, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:4, 3:] = 0
    loader = DataLoader([{"input_ids": ids, "other": ids, "attention_mask": mask}], batch_size=None)
    keeper = watch(Padded(), OutputMonitor(every_n_steps=1), loader)
    assert at(keeper, "output/head/n") == {0: 36}
    assert at(keeper, "output/head/length") == {0: 4.5}


def test_the_last_state_of_a_lens_says_what_the_loss_does():
    model = Language()
    keeper = watch(model, OutputMonitor(every_n_steps=1, lens=["blocks.*"]))
    for step, (_, _, loss) in enumerate(model.seen):
        assert at(keeper, "lens/norm.input/cross_entropy")[step] == pytest.approx(loss, rel=1e-5)
    for name in ("blocks.0", "blocks.1", "norm.input"):
        assert set(at(keeper, f"lens/{name}/entropy")) == {0, 1}


def test_a_lens_that_does_not_follow_the_model_says_so_and_draws_nothing():
    with pytest.warns(UserWarning, match="the lens of what the final norm receives is off by .* name the final norm"):
        keeper = watch(Language(scale=5.0), OutputMonitor(every_n_steps=1, lens=["blocks.*"]))
    assert not [point for point in keeper.points if point.family == "lens"]
    assert len(keeper.curve("output/head/entropy")) == 2


def test_a_lens_changes_nothing_of_the_training():
    plain, watched = Language(), Language()
    torch.manual_seed(0)
    watched.load_state_dict(plain.state_dict())
    fit(plain, [], sequences())
    fit(watched, [OutputMonitor(every_n_steps=1, lens=["blocks.*"])], sequences())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


class Agent(LightningModule):
    """A policy beside a value; it acts inside its step, by another pass without gradient."""

    def __init__(self, acts=True):
        super().__init__()
        self.body, self.acts = nn.Linear(5, 12), acts
        self.model = nn.ModuleDict({"policy": nn.Linear(12, 4), "value": nn.Linear(12, 1)})
        self.seen = []

    def training_step(self, batch, batch_idx):
        states, actions, returns = batch
        if self.acts:
            with torch.no_grad():
                self.model["policy"](self.body(10 * states).tanh())
        features = self.body(states).tanh()
        logits, values = self.model["policy"](features), self.model["value"](features).squeeze(-1)
        self.advantages = (returns - values).detach()
        chosen = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1)
        self.seen.append((logits.detach().double(), chosen.detach().double(), self.advantages.double()))
        return ((values - returns) ** 2).mean() - (chosen * self.advantages).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def experience(count=64):
    draw = torch.Generator().manual_seed(0)
    states, returns = torch.randn(count, 5, generator=draw), torch.randn(count, generator=draw)
    return DataLoader(TensorDataset(states, torch.randint(4, (count,), generator=draw), returns), batch_size=32)


@pytest.mark.parametrize("advantages", ["advantages", lambda batch: batch[2]])
def test_a_policy_is_found_beside_its_value_and_read_with_its_advantages(advantages):
    agent = Agent()
    assert output_head(agent).name == "model.policy"
    keeper = watch(agent, OutputMonitor(every_n_steps=1, advantages=advantages), experience())
    returns = experience().dataset.tensors[2].split(32)
    for step, (logits, chosen, own) in enumerate(agent.seen):
        gains = own if advantages == "advantages" else returns[step].double()
        covariance = (chosen - chosen.mean()) * (gains - gains.mean())
        entropy = output_rows(logits).entropy.mean().item()
        assert at(keeper, "output/model.policy/n")[step] == 32
        assert at(keeper, "policy/model.policy/entropy")[step] == pytest.approx(entropy, rel=1e-5)
        found = at(keeper, "policy/model.policy/covariance")[step]
        assert found == pytest.approx(covariance.mean().item(), rel=1e-4, abs=1e-7)
        share = (covariance > 0).double().mean().item()
        assert at(keeper, "policy/model.policy/covariance_positive")[step] == pytest.approx(share)
        top = covariance.quantile(0.9998).item()
        assert at(keeper, "policy/model.policy/covariance_top")[step] == pytest.approx(top, rel=1e-4)


def test_one_advantage_may_stand_for_a_sequence():
    class Grouped(Language):
        def training_step(self, batch, batch_idx):
            self.gains = torch.arange(len(batch[0])).double()
            return super().training_step(batch, batch_idx)

    model = Grouped()
    keeper = watch(model, OutputMonitor(every_n_steps=1, advantages="gains"))
    logits, labels, _ = model.seen[0]
    counted = labels != -100
    chosen = output_rows(logits.double(), labels).log_prob[counted]
    gains = torch.arange(8).double().unsqueeze(1).expand(8, LENGTH)[counted]
    expected = ((chosen - chosen.mean()) * (gains - gains.mean())).mean().item()
    assert at(keeper, "policy/head/covariance")[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"advantages": "nowhere"}, "`advantages` failed: AttributeError"),
        ({"advantages": lambda batch: batch[2][:3]}, "there are 3 advantages and 32 rows"),
        ({"labels": lambda batch: 1}, "`labels` must give a tensor, and gave a int"),
        ({"labels": lambda batch: batch[1][:5]}, "returned 32 rows and there are 5 labels"),
        ({"head": "unused"}, "`unused` did not run before a point"),
    ],
)
def test_bad_readers_are_said_once_and_the_rest_is_drawn(arguments, message):
    agent = Agent(acts=False)
    if "head" in arguments:
        agent.unused = nn.Linear(5, 3)
    with pytest.warns(UserWarning, match=message) as said:
        keeper = watch(agent, OutputMonitor(every_n_steps=1, **arguments), experience())
    assert sum("`OutputMonitor`" in str(w.message) for w in said) == 1
    assert len(keeper.curve(f"output/{arguments.get('head', 'model.policy')}/entropy")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 3}, "`head` takes the name of one layer"),
        ({"advantages": 1.0}, "`advantages` takes a function from a batch to a tensor"),
        ({"lens": "blocks"}, "`layers` takes a list of names"),
        ({"norm": "norm"}, "`norm` is 'norm', and without `lens`"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OutputMonitor(**arguments)


def test_a_model_without_a_head_and_a_wrong_name_are_refused_at_the_start():
    class Value(Language):
        def __init__(self):
            super().__init__()
            self.blocks, self.norm, self.head = nn.ModuleList(), nn.Identity(), nn.Linear(WIDTH, 1)

    with pytest.raises(MisconfigurationException, match=r"`OutputMonitor\(head=None\)`: the model has no Linear"):
        fit(Value(), [OutputMonitor()], sequences())
    with pytest.raises(MisconfigurationException, match="'haed' matches no submodule"):
        fit(Language(), [OutputMonitor(head="haed")], sequences())


class Bandit(LightningModule):
    """A softmax over arms: in haste it commits to one, with a bonus for entropy it does not."""

    def __init__(self, bonus):
        super().__init__()
        self.policy, self.bonus = nn.Linear(1, 6, bias=False), bonus
        nn.init.zeros_(self.policy.weight)

    def training_step(self, batch, batch_idx):
        log_p = self.policy(torch.ones(len(batch), 1)).log_softmax(-1)
        actions = log_p.detach().exp().multinomial(1).squeeze(1)
        late = batch_idx > 60 or self.bonus  # what pays is learned late
        gains = (actions == 2).float() * float(late)
        chosen = log_p.gather(1, actions[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        return -(chosen * (gains - gains.mean())).mean() - self.bonus * entropy

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("bonus", [0.0, 0.5])
@pytest.mark.parametrize(
    ("guard", "armed"),
    [
        ({"task": "reinforcement"}, True),
        ({"task": "classification"}, False),
        ({"rules": ["output_entropy_collapse"]}, True),
        ({}, None),
    ],
)
def test_a_collapse_is_said_of_agents_or_where_it_was_asked_for(bonus, guard, armed):
    torch.manual_seed(0)
    watcher = CollapseGuard(action="log", **guard)
    loader = DataLoader(torch.zeros(160 * 64, 1), batch_size=64)
    fit(Bandit(bonus), [OutputMonitor(every_n_steps=1), watcher], loader)
    found = [verdict.kind for verdict in watcher.verdicts]
    silent = armed is False or (armed is None and watcher.task.name != "reinforcement")
    assert found == ([] if bonus or silent else ["output_entropy_collapse"])
    if found:
        [verdict] = watcher.verdicts
        assert 55 <= verdict.since <= verdict.step


def test_a_head_that_only_the_first_batch_shows_is_followed_from_then_on(tmp_path):
    class Unused(Language):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(WIDTH, 7)

    keeper = watch(Unused(), OutputMonitor(every_n_steps=1), sequences(32))
    assert list(at(keeper, "output/head/entropy")) == [1, 2, 3]
    assert not keeper.curve("output/unused/entropy")


class TiedNet(nn.Module):
    """Its head is a function of the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        x = self.embed(ids)
        return nn.functional.linear(self.norm(x + self.block(x)), self.embed.weight)


class Tied(Language):
    def __init__(self):
        super().__init__()
        self.net = TiedNet()
        del self.embed, self.norm, self.blocks, self.head

    def forward(self, ids):
        return self.net(ids)


def test_logits_that_a_function_makes_are_not_mistaken_for_those_of_the_last_layer():
    with pytest.warns(UserWarning, match="`net.block` is the last Linear, and the norm `net.norm` runs behind it"):
        assert watch(Tied(), OutputMonitor(every_n_steps=1)).points == []
    model = Tied()
    keeper = watch(model, OutputMonitor(head="net", every_n_steps=1))
    logits, labels, _ = model.seen[1]
    expected = output_rows(logits[labels != -100]).entropy.mean().item()
    assert at(keeper, "output/net/entropy")[1] == pytest.approx(expected, rel=1e-5)


def test_the_half_life_is_that_of_the_curve():
    monitor = OutputMonitor()
    for step in range(0, 400, 10):
        monitor._trend.update(step, 2.0 * 0.5 ** (step / 150))
    assert monitor._trend.direction() == "falling"
    assert -math.log(2) / monitor._trend.slope == pytest.approx(150, rel=1e-6)


class SelfTraining(LightningModule):
    """Learns from labels, and then from what it predicts most."""

    def __init__(self, alone):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.alone = alone

    def training_step(self, batch, batch_idx):
        x, labels = batch
        logits = self.net(x)
        own = logits.detach().mean(0).argmax().expand(len(x))
        return cross_entropy(logits, own if self.alone and batch_idx >= 20 else labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


@pytest.mark.parametrize("alone", [False, True])
def test_one_class_for_all_is_said_where_labels_are_of_several(alone):
    torch.manual_seed(0)
    labels = torch.arange(60 * 32) % 4
    data = TensorDataset(3 * torch.eye(8)[labels] + 0.1 * torch.randn(len(labels), 8), labels)
    watcher, keeper = CollapseGuard(action="log"), PointKeeper()
    fit(SelfTraining(alone), [OutputMonitor(every_n_steps=1), watcher, keeper], DataLoader(data, batch_size=32))
    assert [point.null for point in keeper.curve("output/net.2/usage")] == pytest.approx([4] * 60)
    assert keeper.curve("output/net.2/usage")[-1].value == pytest.approx(1 if alone else 4, rel=0.05)
    assert [verdict.kind for verdict in watcher.verdicts] == (["prediction_collapse"] if alone else [])
    assert not alone or 20 <= watcher.verdicts[0].since <= watcher.verdicts[0].step <= 45
