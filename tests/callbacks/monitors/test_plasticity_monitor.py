"""Units that were switched off are counted exactly, and training does not notice."""

from math import ceil, isnan

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import PlasticityMonitor
from lightning_collapse.functional import dead_fraction, dormant_fraction, srank
from lightning_collapse.utilities.features import evenly
from lightning_collapse.utilities.points import Flag
from tests.toys import QUIET, PointKeeper, Toy, batches, fit, weights

pytestmark = pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers")


def values_of(keeper, layer):
    last = keeper.points[-1].step
    prefix = f"plasticity/{layer}/"
    return {p.key.removeprefix(prefix): p for p in keeper.points if p.key.startswith(prefix) and p.step == last}


class Still(Toy):
    """Nothing moves, and of the 32 units of the first layer so many are off."""

    def __init__(self, off=0):
        super().__init__()
        with torch.no_grad():
            self.encoder[0].weight[:off] = 0
            self.encoder[0].bias[:off] = -1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("off", [0, 5, 32])
def test_units_that_are_off_are_counted(off):
    keeper, model = PointKeeper(), Still(off)
    fit(model, [PlasticityMonitor(every_n_steps=6, batches=6, max_overhead=1e9), keeper])
    features = torch.cat([model.encoder[:2](x) for x in batches()]).detach()
    found = values_of(keeper, "encoder.1")
    assert found["dormant_fraction"].value == off / 32
    assert found["dead_fraction"].value == off / 32
    assert found["mean_activation"].value == pytest.approx(features.abs().mean().item(), rel=1e-5)
    if off < 32:  # four rows per feature at most
        assert found["srank"].value == srank(torch.linalg.svdvals(evenly(features, 4 * 32))).item()
    assert found["srank"].n == 6 * 32
    assert found["flag"].value == Flag.OK


def test_weights_and_distance_from_the_start():
    keeper, model = PointKeeper(), Toy()
    before = weights(model)
    monitor = PlasticityMonitor(every_n_steps=6)
    for _ in range(2):
        fit(model, [monitor, keeper])
    after = weights(model)

    def expect(prefix):
        names = [name for name in after if name.startswith(prefix)]
        now, then = (torch.cat([state[name].flatten() for name in names]) for state in (after, before))
        return pytest.approx([now.abs().mean().item(), (now - then).norm().item()], rel=1e-5)

    for layer, prefix in (("all", ""), ("encoder.2", "encoder.2"), ("head", "head")):
        found = values_of(keeper, layer)
        assert [found["mean_weight"].value, found["init_distance"].value] == expect(prefix)


def test_equal_singular_values():
    """Rows are axes: the spectrum is flat, and its rank 0.99 of its length, rounded up."""

    class Axes(Still):
        def __init__(self):
            super().__init__()
            self.eye = nn.ReLU()

        def training_step(self, batch, batch_idx):
            return super().training_step(self.eye(batch), batch_idx)

    keeper = PointKeeper()
    loader = DataLoader(torch.eye(16).repeat(4, 1), batch_size=16)
    fit(Axes(), [PlasticityMonitor(layers=["eye"], every_n_steps=4), keeper], loader)
    found = values_of(keeper, "eye")
    assert found["srank"].value == ceil(0.99 * 16)
    assert found["dead_fraction"].value == 0
    assert found["mean_activation"].value == pytest.approx(1 / 16)


def test_training_does_not_notice():
    def run(*callbacks):
        torch.manual_seed(0)
        model = Toy()
        fit(model, callbacks)
        return weights(model), torch.rand(2)

    (one, drawn), (other, again) = run(), run(PlasticityMonitor(every_n_steps=2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(drawn, again)


def test_a_resumed_run_knows_where_it_began(tmp_path):
    def run(epochs, model, **kwargs):
        keeper = PointKeeper()
        trainer = Trainer(**{**QUIET, "max_epochs": epochs}, logger=False, callbacks=[monitor, keeper])
        trainer.fit(model, batches(), **kwargs)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return keeper.points

    torch.manual_seed(2)
    first = Toy()
    start = {name: value.clone() for name, value in first.state_dict().items()}
    monitor = PlasticityMonitor(every_n_steps=6)
    whole = run(2, first)
    first.load_state_dict(start)
    monitor = PlasticityMonitor(every_n_steps=6)
    run(1, first)
    torch.load(tmp_path / "1.ckpt", weights_only=True)
    monitor = PlasticityMonitor(every_n_steps=6)
    assert repr(run(2, Toy(), ckpt_path=tmp_path / "1.ckpt")) == repr([point for point in whole if point.step > 5])


def test_bad_numbers_silent_layers_and_wide_ones_are_flagged():
    class Odd(Still):
        def __init__(self):
            super().__init__()
            self.never = nn.ReLU()

        def training_step(self, batch, batch_idx):
            self.encoder(torch.where(torch.arange(len(batch)).unsqueeze(1) == 0, torch.inf, batch))
            return super().training_step(batch, batch_idx)

    keeper = PointKeeper()
    monitor = PlasticityMonitor(layers=["encoder.1", "never", "encoder.0:input"], every_n_steps=2, max_dim=8)
    with pytest.warns(UserWarning, match="`never` did not run"):
        fit(Odd(), [monitor, keeper])
    found = values_of(keeper, "encoder.1")
    assert found["flag"].value == Flag.NONFINITE
    assert not isnan(found["dormant_fraction"].value)
    assert values_of(keeper, "never")["flag"].value == Flag.NOT_CALLED
    keeper = PointKeeper()
    fit(Still(), [PlasticityMonitor(every_n_steps=2, max_dim=8, distance=False), keeper])
    found = values_of(keeper, "encoder.1")
    assert found["flag"].value == Flag.SKETCHED
    assert 1 <= found["srank"].value <= 8
    assert "init_distance" not in values_of(keeper, "all")


def test_functions():
    assert dormant_fraction(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [1.0, 0.5]
    assert dormant_fraction(torch.tensor([1.0, 0.0249]), tau=0.05).item() == 0.5
    assert isnan(dormant_fraction(torch.tensor([1.0, torch.nan])))
    assert dead_fraction(torch.tensor([0.0099, 0.01, 1.0, 1.0])).item() == 0.25
    assert isnan(dead_fraction(torch.tensor([0.1, torch.nan])))
    with pytest.raises(ValueError, match="`tau`"):
        dormant_fraction(torch.ones(2), tau=-1.0)
    with pytest.raises(ValueError, match="`threshold`"):
        dead_fraction(torch.ones(2), threshold=0.0)


@pytest.mark.parametrize("kwargs", [{"batches": 0}, {"tau": -1.0}, {"max_dim": 1}, {"layers": "encoder"}])
def test_arguments(kwargs):
    with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}`"):
        PlasticityMonitor(**kwargs)
    with pytest.raises(MisconfigurationException, match="matches no submodule"):
        fit(Toy(), [PlasticityMonitor(layers=["nothing"])])


class Moving(Still):
    """Units are cloned and shrunk between two fits."""

    def shrink(self, to):
        with torch.no_grad():
            self.encoder[0].weight[16:] = self.encoder[0].weight[:16]
            self.encoder[0].bias[16:] = self.encoder[0].bias[:16]
            for parameter in self.encoder[0].parameters():
                parameter *= to


def test_spread_is_told_from_the_first_point_also_of_a_run_that_goes_on(tmp_path):
    model, keeper, monitor = Moving(), PointKeeper(), PlasticityMonitor(every_n_steps=6, batches=6, distance=False)
    kwargs = {**QUIET, "max_epochs": 1, "logger": False}
    trainer = Trainer(**kwargs, callbacks=[monitor, keeper])
    trainer.fit(model, batches())
    first = values_of(keeper, "encoder.1")
    features = model.encoder[:2](next(iter(batches()))).detach()  # the first step ends in a point
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    model.shrink(0.5)
    now = torch.cat([model.encoder[:2](x) for x in batches()]).detach()
    other, again = PointKeeper(), PlasticityMonitor(every_n_steps=6, batches=6, distance=False)
    again.load_state_dict(state)
    for callback, points in ((monitor, keeper), (again, other)):
        Trainer(**kwargs, callbacks=[callback, points]).fit(model, batches())
        found = values_of(points, "encoder.1")
        spread = now.std(dim=0, correction=0) / features.std(dim=0, correction=0)
        assert found["std_ratio"].value == pytest.approx(spread[features.std(dim=0) > 0].mean().item(), rel=1e-5)
        expected = (now.abs().mean() / features.abs().mean()).item()
        assert found["magnitude_ratio"].value == pytest.approx(expected, rel=1e-5)
        assert found["cloned_fraction"].value > 0.9
    assert first["cloned_fraction"].value < 0.1


def test_activations_are_found_by_what_they_do():
    class QuickGELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    class Stream(nn.Module):
        def forward(self, x):
            return x

    class Custom(Toy):
        def __init__(self):
            super().__init__()
            self.encoder[1] = QuickGELU()
            self.encoder.append(Stream())
            self.encoder.append(nn.Softmax(dim=-1))

    keeper = PointKeeper()
    fit(Custom(), [PlasticityMonitor(every_n_steps=6), keeper])
    assert {p.key.split("/")[1] for p in keeper.points if p.key.endswith("cloned_fraction")} == {"encoder.1"}
