"""``RouterMonitor``: which routers are found, which experts a step chose, and what is said of collapse."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, RouterMonitor
from lightning_collapse.functional.routing import routing_readings, routing_sums
from lightning_collapse.utilities.routers import find_routers
from tests.toys import PointKeeper, fit

WIDTH, EXPERTS, K = 8, 6, 2


class Experts(nn.Module):
    """Weights of all experts in one tensor, as Hugging Face's library has them."""

    def __init__(self):
        super().__init__()
        self.down = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, rows, weight, chosen):
        return sum(weight[:, i, None] * (rows.unsqueeze(1) @ self.down[chosen[:, i]]).squeeze(1) for i in range(K))


class Plain(nn.Module):
    """A Linear called gate beside a list of experts."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, EXPERTS), nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(EXPERTS))

    def forward(self, rows):
        logits = self.gate(rows)
        self.truth = logits, logits.topk(K, dim=-1).indices, "softmax"
        weight, chosen = torch.topk(F.softmax(logits, dim=-1), K)
        outputs = torch.stack([expert(rows) for expert in self.experts], dim=1)
        return (weight.unsqueeze(2) * outputs.gather(1, chosen.unsqueeze(2).expand(-1, -1, 8))).sum(dim=1)


class TopKRouter(nn.Module):
    """As in Mixtral: a parameter of its own, a softmax, and a choice inside."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, rows):
        logits = F.linear(rows, self.weight)
        weight, chosen = torch.topk(logits.float().softmax(dim=-1), K, dim=-1)
        return logits, (weight / weight.sum(dim=-1, keepdim=True)).to(rows.dtype), chosen


class GroupRouter(nn.Module):
    """As in DeepSeek: sigmoids, a bias that only the choice knows, and the best of two groups."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.register_buffer("bias", torch.linspace(-0.5, 0.5, EXPERTS))

    def forward(self, rows):
        scores = F.linear(rows, self.weight).sigmoid()
        biased = scores + self.bias
        best = biased.view(-1, 2, EXPERTS // 2).topk(2, dim=-1)[0].sum(dim=-1).topk(1, dim=-1, sorted=False)[1]
        mask = torch.zeros(len(rows), 2).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 2, EXPERTS // 2)
        chosen = biased.masked_fill(~mask.reshape(-1, EXPERTS).bool(), 0.0).topk(K, dim=-1, sorted=False)[1]
        return scores.gather(1, chosen), chosen


class Mixtral(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = TopKRouter(), Experts()

    def forward(self, rows):
        logits, weight, chosen = self.gate(rows)
        self.truth = logits, chosen, "softmax"
        return self.experts(rows, weight, chosen)


class DeepSeek(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = GroupRouter(), Experts()
        self.shared_experts = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows):
        weight, chosen = self.gate(rows)
        self.truth = F.linear(rows, self.gate.weight), chosen, "sigmoid"
        return self.experts(rows, weight, chosen) + self.shared_experts(rows)


class Switch(nn.Module):
    """A classifier inside a router, one expert by argmax, noise before."""

    def __init__(self):
        super().__init__()
        self.router = nn.ModuleDict({"classifier": nn.Linear(WIDTH, EXPERTS)})
        self.router.forward = self.route
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(WIDTH, WIDTH) for i in range(EXPERTS)})

    def route(self, rows):
        logits = self.router["classifier"](rows)
        noisy = logits + torch.linspace(-1, 1, EXPERTS)
        self.truth = logits, noisy.argmax(dim=-1, keepdim=True), "softmax"
        return noisy.softmax(dim=-1).max(dim=-1)

    def forward(self, rows):
        weight, chosen = self.router(rows)
        outputs = torch.stack([expert(rows) for expert in self.experts.values()], dim=1)
        return weight.unsqueeze(1) * outputs[torch.arange(len(rows)), chosen]


class Soft(nn.Module):
    """Every expert has every token."""

    def __init__(self):
        super().__init__()
        self.gating, self.experts = (
            nn.Linear(WIDTH, EXPERTS),
            nn.ModuleList(nn.Linear(WIDTH, 8) for _ in range(EXPERTS)),
        )

    def forward(self, rows):
        logits = self.gating(rows)
        self.truth = logits, None, "softmax"
        return (logits.softmax(-1).unsqueeze(2) * torch.stack([e(rows) for e in self.experts], dim=1)).sum(dim=1)


KINDS: dict[str, Any] = {"gate": Plain, "mixtral": Mixtral, "deepseek": DeepSeek, "switch": Switch, "soft": Soft}
NAMES = {"gate": "gate", "mixtral": "gate", "deepseek": "gate", "switch": "router", "soft": "gating"}


class Model(LightningModule):
    """Two layers of experts and a head of as many classes as there are experts, whose choice is no expert's."""

    def __init__(self, kind="gate"):
        super().__init__()
        self.blocks = nn.ModuleList(KINDS[kind]() for _ in range(2))
        self.head = nn.Linear(WIDTH, EXPERTS)
        self.truth = []

    def forward(self, rows):
        for block in self.blocks:
            rows = rows + block(rows)
        return self.head(rows)

    def training_step(self, batch, batch_idx):
        logits = self(batch.flatten(0, -2))
        self.truth.append([[t.detach() if torch.is_tensor(t) else t for t in block.truth] for block in self.blocks])
        self.right = (logits.argmax(dim=-1) == 0).float().mean()
        return logits.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def rows(count=8, size=32):
    return DataLoader(torch.randn(count * size, WIDTH, generator=torch.Generator().manual_seed(0)), batch_size=size)


def watch(model, monitor, loader=None, **kwargs):
    keeper = PointKeeper()
    fit(model, [monitor, keeper], rows() if loader is None else loader, **kwargs)
    return keeper


def at(keeper, key):
    return {point.step: point.value for point in keeper.curve(key)}


def expected(model, layer, steps):
    parts = [model.truth[step][layer] for step in steps]
    sums = [routing_sums(logits.float(), chosen, scores) for logits, chosen, scores in parts]
    return routing_readings(torch.stack(sums).sum(dim=0))


@pytest.mark.parametrize("kind", KINDS)
def test_routers_are_found_and_read_as_the_step_uses_them(kind):
    torch.manual_seed(0)
    model = Model(kind)
    assert [router.name for router in find_routers(model)] == [f"blocks.{i}.{NAMES[kind]}" for i in range(2)]
    keeper = watch(model, RouterMonitor(every_n_steps=4, batches=2))
    for step, steps in ((0, [0]), (3, [2, 3]), (7, [6, 7])):
        for layer in range(2):
            found = expected(model, layer, steps)
            prefix = f"router/blocks.{layer}.{NAMES[kind]}"
            assert at(keeper, f"{prefix}/n")[step] == 32 * len(steps)
            for name in ("load_cv2", "effective_experts", "max_load", "dead", "balance_loss", "z", "token_entropy"):
                assert at(keeper, f"{prefix}/{name}")[step] == pytest.approx(found[name].item(), rel=1e-5), name
            assert at(keeper, f"{prefix}/experts_per_token")[step] == pytest.approx(found["k"].item())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_precision(precision, accumulate):
    torch.manual_seed(0)
    model = Model("mixtral")
    keeper = watch(model, RouterMonitor(every_n_steps=1), precision=precision, accumulate_grad_batches=accumulate)
    found = expected(model, 0, range(accumulate))
    assert at(keeper, "router/blocks.0.gate/load_cv2")[0] == pytest.approx(found["load_cv2"].item(), rel=1e-6)
    assert at(keeper, "router/blocks.0.gate/z")[0] == pytest.approx(found["z"].item(), rel=2e-2)


def test_padding_does_not_count():
    class Padded(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["x"], batch_idx)

    mask = torch.ones(4, 8, dtype=torch.long)
    mask[:2, 5:] = 0
    loader = DataLoader([{"x": torch.randn(4, 8, WIDTH), "attention_mask": mask}], batch_size=None)
    assert at(watch(Padded(), RouterMonitor(every_n_steps=1), loader), "router/blocks.0.gate/n") == {0: 26}


class Hidden(nn.Module):
    """Scores with a parameter that no module holds as its weight."""

    def __init__(self):
        super().__init__()
        self.score = nn.Parameter(torch.randn(WIDTH, EXPERTS))

    def forward(self, rows):
        self.truth = rows @ self.score, (rows @ self.score).topk(K).indices, "softmax"
        return rows


def test_others_are_read_by_a_function():
    def read(module, args, output):
        logits = args[0] @ module.score
        return logits, logits.topk(K, dim=-1).indices

    model = _model_of(Hidden)
    keeper = watch(model, RouterMonitor(layers=["blocks.*"], read=read, every_n_steps=1))
    found = expected(model, 1, [5])
    assert at(keeper, "router/blocks.1/load_cv2")[5] == pytest.approx(found["load_cv2"].item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*no router of a mixture")
def test_a_module_that_shows_no_scores_is_told_of():
    with pytest.warns(UserWarning, match=r"no weight with a row per expert was found in `blocks.0`, `blocks.1`\."):
        keeper = watch(_model_of(Hidden), RouterMonitor(layers=["blocks.*"], every_n_steps=1))
    assert keeper.points == []


def _model_of(kind):
    KINDS["other"] = kind
    model = Model("other")
    del KINDS["other"]
    return model


class Mixed(nn.Module):
    """A mixture whose names say nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, EXPERTS), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, rows):
        logits = self.a(rows)
        self.truth = logits, None, "softmax"
        return (logits.softmax(-1).unsqueeze(2) * torch.stack([e(rows) for e in self.b], dim=1)).sum(dim=1)


def test_a_mixture_without_names_is_told_by_the_graph_of_its_loss():
    model = _model_of(Mixed)
    assert find_routers(model) == []
    keeper = watch(model, RouterMonitor(every_n_steps=1))
    assert list(at(keeper, "router/blocks.0.a/load_cv2")) == list(range(1, 8))
    found = expected(model, 0, [7])
    assert at(keeper, "router/blocks.0.a/load_cv2")[7] == pytest.approx(found["load_cv2"].item(), rel=1e-5)


def test_a_model_without_experts_is_told_so_once():
    class Dense(Model):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList()

    with pytest.warns(UserWarning, match=r"no router of a mixture of experts was found") as said:
        keeper = watch(Dense(), RouterMonitor(every_n_steps=1))
    assert sum("no router" in str(w.message) for w in said) == 1
    assert keeper.points == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 0}, "`batches` must be at least 1"),
        ({"read": print}, "`read` takes a function"),
        ({"layers": "gate"}, "`layers` takes a list of names"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RouterMonitor(**arguments)
    with pytest.raises(MisconfigurationException, match="'gaet' matches no submodule"):
        fit(Model(), [RouterMonitor(layers=["gaet"])], rows())


class Starving(Model):
    """Its router is pulled to one expert, in harm of the loss or not."""

    def __init__(self, pull, harm):
        super().__init__()
        self.pull, self.harm, self.level = pull, harm, nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        loss = 0 * super().training_step(batch, batch_idx) + self.level.square()
        if self.pull and batch_idx >= 16:
            with torch.no_grad():
                for block in self.blocks:
                    block.gate.bias[:K] += 0.4
        return loss + float(self.harm and batch_idx >= 16)


@pytest.mark.parametrize(("pull", "harm"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_router_that_starves_its_experts_is_told_and_a_failure_only_where_the_loss_suffers(pull, harm):
    torch.manual_seed(0)
    guard = CollapseGuard(action="log", rules=["router_collapse"])
    fit(Starving(pull, harm), [RouterMonitor(every_n_steps=1, batches=1), guard], rows(48, 128), log_every_n_steps=1)
    assert {verdict.kind for verdict in guard.verdicts} == ({"router_collapse"} if pull and harm else set())
    assert {notice.kind for notice in guard.notices} == ({"router_collapse"} if pull and not harm else set())
