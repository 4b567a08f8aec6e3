"""What ``make cuda`` runs on a GPU runs here too, with stand-ins; and it sees a wait."""

import pytest
from lightning.pytorch import Callback

from tests.benchmarks import monitor_overhead as costs
from tests.cuda import __main__ as command
from tests.cuda import waits


class Waits(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        outputs["loss"].item()


def test_nothing_waits(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tests.cuda", "--device", "cpu", "--skip-table"])
    assert command.main() == 0
    assert capsys.readouterr().out.endswith("all held\n")


def test_without_a_gpu_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tests.cuda"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command.main() == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_wait_would_be_seen():
    assert waits.between_points("cpu", Waits()).waits
    assert not waits.between_points("cpu").waits


def test_a_skipped_step_waits_only_where_the_optimizer_cannot_be_told_on_the_device():
    assert not waits.skipping("cpu", fused=True).waits
    assert waits.skipping("cpu", fused=False).waits


@pytest.mark.filterwarnings("ignore:.*the fit ended before the first point")  # of so few steps
@pytest.mark.parametrize("name", ["digits", "every step"])
def test_a_row_of_the_table(name):
    """Two blocks show that it runs; how long it took is no test."""
    found = costs.measure(costs.ROWS[name], quick=True)
    assert len(found.watched) == 2
    assert min(found.watched) > 0
