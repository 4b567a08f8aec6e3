"""One token of each sequence, its spectrum, and the phase that the curve of its rank shows."""

from itertools import pairwise

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_collapse import GeometryPhaseMonitor
from lightning_collapse.functional import eigenvalue_effective_rank, rankme
from lightning_collapse.functional.geometry_phase import PhaseTracker
from lightning_collapse.spectral import singular_values
from lightning_collapse.utilities.features import token_at
from lightning_collapse.utilities.points import Flag
from tests.toys import PointKeeper, fit


class Language(LightningModule):
    """Tokens, a layer and a head; never learns, so that its features can be computed again."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(50, 12), nn.Linear(12, 12), nn.Linear(12, 50)
        self.lr = lr

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.head(self.body(self.embed(batch["input_ids"]))).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def sequences(count: int = 12, size: int = 16, length: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i in range(count):
        real = torch.randint(2, length + 1, (size, 1), generator=generator)
        mask = torch.arange(length) < real
        mask = mask.flip(1) if i % 2 else mask  # padding on either side
        batches.append({"input_ids": torch.randint(50, (size, length), generator=generator), "attention_mask": mask})
    return batches


def tokens(model: Language, batches: list[dict[str, Tensor]], position: int) -> Tensor:
    rows = []
    for batch in batches:
        features = model.body(model.embed(batch["input_ids"])).detach()
        rows += [of[mask.bool()][position] for of, mask in zip(features, batch["attention_mask"], strict=True)]
    return torch.stack(rows).double()


def watch(model, batches, keeper, *callbacks, **kwargs):
    return fit(model, [*callbacks, keeper], DataLoader(batches, batch_size=None), **kwargs)


@pytest.mark.parametrize("position", [-1, 0, 1, -2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_values_are_those_of_that_token_of_the_last_sequences(position: int, precision: str) -> None:
    model, batches, keeper = Language(), sequences(), PointKeeper()
    watch(model, batches, keeper, GeometryPhaseMonitor(position=position, every_n_steps=6), precision=precision)
    points = {point.key.rpartition("/")[2]: point for point in keeper.points if point.step == 11}
    assert points["n"].value == 48  # four per feature
    rows = tokens(model, batches[9:], position)
    tolerance = 1e-5 if precision == "32-true" else 0.02
    assert points["rankme"].value == pytest.approx(rankme(singular_values(rows, center=False)).item(), rel=tolerance)
    expected = eigenvalue_effective_rank(singular_values(rows)).item()
    assert points["eigenvalue_effective_rank"].value == pytest.approx(expected, rel=tolerance)
    assert points["eigenvalue_effective_rank"].null > expected
    assert {point.key.split("/")[1] for point in keeper.points} == {"head.input"}


def test_sequences_too_short_are_left_out() -> None:
    keeper = PointKeeper()
    batches = sequences(4)
    watch(Language(), batches, keeper, GeometryPhaseMonitor(position=4, every_n_steps=4, rows=64))
    long = sum(int((batch["attention_mask"].sum(dim=1) > 4).sum()) for batch in batches)
    assert keeper.curve("geometry/head.input/n")[-1].value == long


def test_vectors_are_taken_as_they_are() -> None:
    features, valid = token_at(torch.ones(3, 4), None, -1)
    assert features.shape == (3, 4)
    assert valid.all()
    assert token_at(torch.ones(3, 4, 2, 2), None, -1) is None
    assert token_at(torch.ones(3, 4, dtype=torch.long), None, -1) is None


def test_monitoring_changes_nothing() -> None:
    def run(*callbacks):
        torch.manual_seed(0)
        model = Language(lr=0.1)
        watch(model, sequences(), PointKeeper(), *callbacks)
        return model.state_dict(), torch.get_rng_state()

    (plain, rng), (watched, rng_watched) = run(), run(GeometryPhaseMonitor(every_n_steps=3))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert torch.equal(rng, rng_watched)


def test_a_compiled_model_costs_no_graph_and_reads_the_same() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, plain, compiled = Language(), PointKeeper(), PointKeeper()
    watch(model, sequences(), plain, GeometryPhaseMonitor(every_n_steps=3))
    torch.compiler.reset()
    watch(torch.compile(model, backend=backend), sequences(), compiled, GeometryPhaseMonitor(every_n_steps=3))
    assert len(graphs) == 1
    for expected, found in zip(plain.points, compiled.points, strict=True):
        assert (found.key, found.step, found.n) == (expected.key, expected.step, expected.n)
        assert found.value == pytest.approx(expected.value, rel=1e-5, nan_ok=True)


def test_a_layer_that_never_runs_and_bad_numbers_read_nan() -> None:
    model = Language()
    model.unused = nn.Linear(3, 3)
    keeper = PointKeeper()
    with pytest.warns(UserWarning, match="`unused` did not run before a point. Choose another `layer`"):
        watch(model, sequences(4), keeper, GeometryPhaseMonitor("unused", every_n_steps=2))
    assert {point.flag for point in keeper.points} == {Flag.NOT_CALLED}
    assert keeper.points[0].value != keeper.points[0].value
    with torch.no_grad():
        model.body.weight.fill_(torch.nan)
    keeper = PointKeeper()
    watch(model, sequences(4), keeper, GeometryPhaseMonitor("body", every_n_steps=2))
    assert {point.flag for point in keeper.points} == {Flag.FEW_ROWS}


def test_phases_need_a_turn_that_lasts() -> None:
    tracker = PhaseTracker(hysteresis=0.1, patience=2)
    ranks = [30, 20, 12, 14, 12, 10, 11.5, 11.6, 20, 30, 25, 31, 27, 26, 20, float("nan"), 0, 10, 12, 13, 30]
    phases = [int(tracker.update(rank)) for rank in ranks]
    assert phases == [1] * 7 + [2] * 6 + [3] * 6 + [2] * 2
    assert all(abs(later - earlier) <= 1 for earlier, later in pairwise(phases))
    again = PhaseTracker(hysteresis=0.1, patience=2)
    for half in (ranks[:9], ranks[9:]):
        resumed = PhaseTracker(hysteresis=0.1, patience=2)
        resumed.load_state_dict(again.state_dict())
        again, found = resumed, [int(resumed.update(rank)) for rank in half]
    assert found == phases[9:]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"hysteresis": 0}, "`hysteresis` is the relative change that counts as a turn: positive, got 0"),
        ({"patience": 0}, "`patience` must be at least 1, got 0"),
        ({"rows": 1}, "`rows` must be at least 2"),
        ({"every_n_steps": 0}, "`every_n_steps` must be a whole number of at least 1"),
        ({"layer": ["head"]}, "`layer` takes one name, .* got \\['head'\\]"),
        ({"position": "last"}, "`position` is the number of a token, -1 for the last, got 'last'"),
    ],
)
def test_bad_arguments(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        GeometryPhaseMonitor(**arguments)


@pytest.mark.parametrize(
    ("layer", "match"), [("haed", "'haed' matches no submodule of Language"), ("*", "it matches 3 layers")]
)
def test_a_layer_that_is_not_one_is_refused_at_the_start(layer, match) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        watch(Language(), sequences(2), PointKeeper(), GeometryPhaseMonitor(layer))
