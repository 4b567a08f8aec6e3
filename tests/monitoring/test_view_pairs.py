"""Views: which layers see two, in two calls or in one, and what is drawn of them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import CollapseMonitor
from lightning_collapse.functional import lidar, lidar_null, recall_at_1
from lightning_collapse.monitoring.view_pairs import ViewPairs
from tests.toys import PointKeeper, Toy, batches, fit


class TwoCalls(Toy):
    """Each view in a call of its own."""

    def training_step(self, batch, batch_idx):
        self.views = [self.encoder(batch + 0.3 * torch.randn_like(batch)) for _ in range(2)]
        return nn.functional.mse_loss(*self.views)


class OneCall(Toy):
    """One view behind the other."""

    def training_step(self, batch, batch_idx):
        views = self.encoder(torch.cat([batch + 0.3 * torch.randn_like(batch) for _ in range(2)]))
        self.views = views.chunk(2)
        return nn.functional.mse_loss(*self.views)


class Unrelated(Toy):
    """Two calls on samples that have nothing to do with each other."""

    def training_step(self, batch, batch_idx):
        first, second = (self.encoder(part) for part in batch.chunk(2))
        return first.pow(2).mean() - second.tanh().mean()


class Keeps(TwoCalls):
    """The same, and keeps what it has made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.made.append(torch.stack(self.views).detach())
        return loss


def recall(trainer):
    return trainer.logger.curve("views/encoder/recall_at_1")


@pytest.mark.parametrize("model", [TwoCalls, OneCall])
def test_views_are_found_and_read_exactly(model):
    toy = model()
    keeper = PointKeeper()
    trainer = fit(toy, [CollapseMonitor(layers=["encoder"], every_n_steps=1, rows=32), keeper], max_steps=1)
    [(_, value)] = recall(trainer)
    assert value == pytest.approx(recall_at_1(*(view.detach() for view in toy.views)).item())
    assert [point.null for point in keeper.curve("views/encoder/recall_at_1")] == [pytest.approx(1 / 32)]


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_lidar_is_that_of_the_views_in_the_window(scale):
    toy, keeper = Keeps(), PointKeeper()
    with torch.no_grad():
        toy.encoder[0].weight.mul_(scale), toy.encoder[0].bias.mul_(scale)
    fit(toy, [CollapseMonitor(layers=["encoder"], every_n_steps=2, rows=64), keeper], max_steps=4)
    # the first point tells that these are views; the later windows hold two batches
    points = keeper.curve("views/encoder/lidar")
    expected = [lidar(*torch.cat(toy.made[i : i + 2], dim=1), relative=True) for i in (0, 2)]
    assert [point.value for point in points] == pytest.approx([of.rank.item() for of in expected])
    assert [(point.n, point.null) for point in points] == [(64, lidar_null(64, 8))] * 2


def test_no_lidar_of_as_many_features_as_samples():
    class Wide(TwoCalls):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(16, 40)

    trainer = fit(Wide(), [CollapseMonitor(layers=["encoder"], every_n_steps=1, rows=32)], max_steps=3)
    assert recall(trainer)
    assert not trainer.logger.curve("views/encoder/lidar")


@pytest.mark.parametrize("model", [Toy, Unrelated])
def test_what_is_no_view_is_not_drawn(model):
    trainer = fit(model(), [CollapseMonitor(layers=["encoder"], every_n_steps=1)], batches(12))
    assert not recall(trainer)


def test_a_short_last_batch_has_no_other_chance():
    loader = DataLoader([*batches(3), torch.randn(6, 16), *batches(3)], batch_size=None)
    keeper = PointKeeper()
    fit(TwoCalls(), [CollapseMonitor(layers=["encoder"], every_n_steps=1), keeper], loader)
    assert {point.null for point in keeper.curve("views/encoder/recall_at_1")} == {1 / 32}


def test_features_are_kept_of_layers_with_views_alone():
    pairs = ViewPairs()
    draw = torch.Generator().manual_seed(0)
    for time in range(5):
        same = torch.randn(32, 8, generator=draw)
        pairs.add("twins", time, torch.stack([same, same]))
        pairs.add("others", time, torch.randn(2, 32, 8, generator=draw))
        sums = pairs.read(["twins", "others", "silent"], 0, torch.device("cpu"))
        pairs.judge({layer: of.tolist() for layer, of in sums.items()})
    assert (pairs.layers, pairs.open) == ({"twins"}, False)
    assert list(pairs.read(["twins", "others"], 0, torch.device("cpu"))) == ["twins"]


def test_what_is_resumed_goes_on_where_it_was():
    pairs, draw = ViewPairs(), torch.Generator().manual_seed(0)
    same = torch.randn(32, 8, generator=draw)
    pairs.add("twins", 0, torch.stack([same, same]))
    pairs.judge({"twins": pairs.read(["twins"], 0, torch.device("cpu"))["twins"].tolist()})
    other = ViewPairs()
    other.load_state_dict(pairs.state_dict(rows=True), torch.device("cpu"))
    assert other.state_dict(rows=False) == pairs.state_dict(rows=False)
    assert torch.equal(*(of.read(["twins"], 0, torch.device("cpu"))["twins"] for of in (pairs, other)))


def test_views_of_tokens_are_those_of_their_means():
    class Words(Toy):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            first, second = (self.encoder(batch["input_ids"]) for _ in range(2))
            return nn.functional.mse_loss(first, second + 1)

    ids = torch.randint(50, (16, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(16, 6, dtype=torch.long)
    mask[:, 4:] = 0
    loader = DataLoader([{"input_ids": ids, "attention_mask": mask}], batch_size=None)
    trainer = fit(Words(), [CollapseMonitor(layers=["encoder"], every_n_steps=1)], loader, max_steps=1)
    assert recall(trainer) == [(0, pytest.approx(1.0))]
