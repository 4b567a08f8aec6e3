"""A window that a checkpoint cuts in two reads what an uncut one reads."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_collapse import IntrinsicDimensionMonitor, RegressionCollapseMonitor
from tests.regression import Regressor
from tests.toys import PointKeeper, fit

MONITORS = {
    "regression": lambda: RegressionCollapseMonitor(every_n_steps=4, rows=80),
    "intrinsic dimension": lambda: IntrinsicDimensionMonitor(["body.0"], every_n_steps=4, rows=80, k=5),
}


def run(batches, *callbacks, **kwargs):
    torch.manual_seed(0)
    keeper = PointKeeper()
    fit(Regressor(lr=0.0), [*callbacks, keeper], DataLoader(batches, batch_size=None), **kwargs)
    return {point.key: point.value for point in keeper.points}


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.filterwarnings("ignore:.*the fit ended before the first point")
def test_a_window_cut_in_two(name, tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(20, 7, generator=generator), torch.randn(20, 3, generator=generator)) for _ in range(4)]
    first, again = MONITORS[name](), MONITORS[name]()
    save = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=3)
    run(batches[:3], first, save, enable_checkpointing=True)
    again.load_state_dict(torch.load(tmp_path / "mid.ckpt", weights_only=True)["callbacks"][first.state_key])
    again.every_n_steps = 1  # its first batch ends in the point that was three quarters full
    resumed, whole = run(batches[3:], again), run(batches, MONITORS[name]())
    assert resumed == pytest.approx(whole, rel=1e-9)
    assert max(value for key, value in whole.items() if key.endswith("/n")) == 80
