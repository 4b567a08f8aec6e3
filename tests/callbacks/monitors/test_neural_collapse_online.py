"""Neural collapse while a network trains: nulls, imbalance, vocabularies, moving planes and mixed batches."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader

from lightning_collapse import LabelledGeometryMonitor, NeuralCollapseMonitor
from lightning_collapse.functional import collapse_nulls
from lightning_collapse.layers import ETFClassifier
from lightning_collapse.metrics.neural_collapse import measures
from lightning_collapse.spectral.class_moments import ClassMoments
from lightning_collapse.utilities.points import Flag
from tests.toys import PointKeeper, fit

RARE = {"minority_cosine", "minority_norm", "gof_error", "norm_count_slope", "norm_count_slope_means"}


class Net(LightningModule):
    def __init__(self, dim=6, classes=5, lr=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.head, self.lr, self.seen = nn.Linear(dim, classes), lr, []

    def features(self, x):
        rows = self.norm(self.body(x))
        self.seen.append(rows.detach().clone())
        return rows

    def loss(self, x, y):
        return F.cross_entropy(self.head(self.features(x)), y)

    def training_step(self, batch, batch_idx):
        return self.loss(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def watch(model, batches, *args, **kwargs):
    keeper, monitor = PointKeeper(), NeuralCollapseMonitor(*args, **kwargs)
    fit(model, [monitor, keeper], DataLoader(batches, batch_size=None))
    step = keeper.points[-1].step
    return {p.measure: p for p in keeper.points if p.step == step and not p.layer.endswith(".eval")}


def noise(count=4, size=60, dim=6, classes=5):
    torch.manual_seed(1)
    return [(torch.randn(size, dim), torch.arange(size) % classes) for _ in range(count)]


@pytest.mark.parametrize("compiled", [False, True])
def test_fixed_prototypes_are_the_classifier_and_not_the_linear_before_them(compiled):
    class Fixed(Net):
        def __init__(self):
            super().__init__()
            self.head = ETFClassifier(dim=6, num_classes=5)

    model = torch.compile(Fixed(), backend="eager") if compiled else Fixed()
    keeper = PointKeeper()
    monitors = [NeuralCollapseMonitor(every_n_steps=2), LabelledGeometryMonitor(every_n_steps=2)]
    fit(model, [*monitors, keeper], DataLoader(noise(), batch_size=None))
    assert {point.layer for point in keeper.points} == {"head.input"}
    assert all(p.n > 0 and 0 < p.value < 4 for p in keeper.points if p.measure == "nc3")


def test_points_know_their_nulls():
    found = watch(Net(), noise(), every_n_steps=4, rows=240)
    nulls = collapse_nulls(240, 5, 6)
    for name in ("nc1", "cdnv", "log_cdnv", "vci", "gnc2", "unc3", "gof_error"):
        assert found[name].null == nulls[name], name
    assert all(math.isnan(found[name].value) for name in RARE)
    few = watch(Net(), noise(1, 7), every_n_steps=1, rows=7)
    assert math.isnan(few["vci"].value)
    assert math.isnan(few["vci"].null)


def test_imbalance_is_drawn_as_soon_as_it_is_seen():
    batches = noise()
    for _, y in batches:
        y[:] = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 3, 4]).repeat(5)
    model = Net()
    found = watch(model, batches, every_n_steps=4, rows=240)
    moments = ClassMoments(5, 6)
    for rows, (_, y) in zip(model.seen, batches, strict=True):
        moments.update(rows, y)
    expected = measures(moments, model.head.weight.detach())
    for name in RARE:
        assert found[name].value == pytest.approx(expected[name].item(), rel=1e-4), name


def test_a_vocabulary_is_as_large_as_what_was_seen():
    """Half of the classes of a head of 20,000; the same numbers as of a head of those alone."""
    torch.manual_seed(2)
    words = torch.randperm(20_000)[:40].sort().values
    batches = [(torch.randn(240, 6), torch.arange(240) % 40) for _ in range(4)]
    small, large = Net(classes=40), Net(classes=20_000)
    with torch.no_grad():
        large.head.weight[words] = small.head.weight
    expected = watch(small, batches, every_n_steps=4, rows=960)
    found = watch(large, [(x, words[y]) for x, y in batches], every_n_steps=4, rows=960)
    assert found["classes"].value == 40
    for name, point in expected.items():
        assert found[name].value == pytest.approx(point.value, rel=1e-6, nan_ok=True), name
        assert found[name].null == pytest.approx(point.null, nan_ok=True), name


def test_what_a_window_has_no_room_for_is_flagged(monkeypatch):
    monkeypatch.setattr("lightning_collapse.monitoring.class_readings.ROOM", 3)
    found = watch(Net(), noise(), every_n_steps=4, rows=240)
    assert found["classes"].value == 3
    assert found["n"].value == 144
    assert found["flag"].value == Flag.LEFT_OUT


def test_more_classes_than_pairs_are_taken_of(monkeypatch):
    exact = watch(Net(classes=40), noise(size=240, classes=40), every_n_steps=4, rows=960)
    monkeypatch.setattr("lightning_collapse.metrics.neural_collapse.EXACT", 20)
    found = watch(Net(classes=40), noise(size=240, classes=40), every_n_steps=4, rows=960)
    assert found["cdnv"].value != exact["cdnv"].value
    for name in ("cdnv", "gnc2", "nc2_equiangular"):
        assert found[name].value == pytest.approx(exact[name].value, rel=0.05), name


@pytest.mark.parametrize("lr", [0.01, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plane_behind_a_layer_norm_that_is_trained_is_no_direction(lr, dtype):
    """More classes than features, whose normalization moves within the window; the reference lies in the plane."""

    class Normed(Net):
        def loss(self, x, y):
            with torch.autocast("cpu", torch.bfloat16, enabled=False):
                rows = self.features(x).to(dtype).float()  # as a head in full precision sees a narrow body
                self.seen[-1] = rows.detach().clone()
                return F.cross_entropy(self.head(rows), y)

    torch.manual_seed(3)
    centers, labels = torch.randn(40, 16), torch.randint(40, (4, 400))
    batches = [(centers[y] + 0.5 * torch.randn(400, 16), y) for y in labels]
    model = Normed(16, 40, lr, norm=True)
    found = watch(model, batches, every_n_steps=4, rows=1600)["nc1"].value
    rows = torch.cat(model.seen[-4:]).double()
    plane = torch.linalg.eigh(torch.cov(rows.T)).eigenvectors[:, 1:]
    moments = ClassMoments(40, 15)
    moments.update(rows @ plane, labels.flatten())
    assert found == pytest.approx(measures(moments)["nc1"].item(), rel=0.02)


class Mixup(Net):
    """Mixes every second batch, by a second set of labels or by soft ones."""

    def __init__(self, soft, always):
        super().__init__()
        self.soft, self.always = soft, always

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx % 2 and not self.always:
            return self.loss(x, y)
        order, share = torch.arange(len(y)).roll(1), 0.7
        logits = self.head(self.features(share * x + (1 - share) * x[order]))
        if self.soft:
            soft = F.one_hot(y, 5).float()
            return F.cross_entropy(logits, share * soft + (1 - share) * soft[order])
        return share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y[order])


@pytest.mark.parametrize("soft", [False, True])
def test_batches_that_a_step_mixes_are_left_out(soft):
    model, batches = Mixup(soft, always=False), noise()
    with pytest.warns(UserWarning, match=r"other labels than the batch has.*`loader=`.*`labels=`") as said:
        found = watch(model, batches, every_n_steps=4, rows=240)
    assert sum("other labels" in str(one.message) for one in said) == 1
    moments = ClassMoments(5, 6)
    for i in (1, 3):
        moments.update(model.seen[i], batches[i][1])
    assert found["n"].value == 120
    assert found["nc1"].value == pytest.approx(measures(moments)["nc1"].item(), rel=1e-4)
    assert {point.flag for point in found.values()} == {Flag.LEFT_OUT}


def test_nothing_is_published_where_every_batch_is_mixed_unless_the_labels_are_told():
    with pytest.warns(UserWarning, match="other labels than the batch has"):
        found = watch(Mixup(False, always=True), noise(), every_n_steps=4)
    assert {name for name, point in found.items() if math.isfinite(point.value)} == {"n", "classes", "flag"}
    told = watch(Mixup(False, always=True), noise(), labels=lambda batch: batch[1], every_n_steps=4)
    assert math.isfinite(told["nc1"].value)


class DecoderForSequenceClassification(nn.Module):
    """Scores every token, as decoders of Hugging Face do, and takes the last one of each sequence."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(6, 5)

    def forward(self, states, mask):
        scores = self.score(states)
        return scores[torch.arange(len(states)), mask.sum(dim=1) - 1]


def test_of_sequences_that_are_classified_by_their_last_token_that_is_the_row():
    class Last(Net):
        def __init__(self):
            super().__init__()
            self.net = DecoderForSequenceClassification()
            del self.head

        def training_step(self, batch, batch_idx):
            scores = self.net(self.features(batch["states"]), batch["attention_mask"])
            return F.cross_entropy(scores, batch["labels"])

    rows, labels = noise(1)[0]
    lengths = 1 + torch.arange(60) % 4
    mask = (torch.arange(4) < lengths.unsqueeze(1)).long()
    states = torch.randn(60, 4, 6)
    states[torch.arange(60), lengths - 1] = rows
    found = watch(Last(), [{"states": states, "attention_mask": mask, "labels": labels}], every_n_steps=1, rows=60)
    plain = watch(Net(), [(rows, labels)], every_n_steps=1, rows=60)
    for name in ("nc1", "cdnv", "vci", "n"):
        assert found[name].value == pytest.approx(plain[name].value, rel=1e-5), name
