"""Every benchmark runs, on little; what it measures is no test."""

from pathlib import Path

import pytest
import torch

from tests.benchmarks import (
    attention_entropy,
    continual,
    drift_false_alarms,
    every_step,
    false_alarms,
    first_non_finite,
    guard_overhead,
    losses,
    monitor_overhead,
    neural_collapse,
    projection,
    vicreg_covariance,
    weight_spectrum,
)
from tests.benchmarks.false_alarms import interval


def _continual(monkeypatch):
    monkeypatch.setattr(continual, "PAIRS", 2)
    batch = torch.randn(8, 1, 28, 28), torch.randint(10, (8,))
    continual.fisher("MLP", continual.perceptron(), [batch], 2.0)
    continual.penalty_step("MLP", continual.perceptron(), batch, 0.4)
    continual.path_step("MLP", continual.perceptron(), 1.0)


def _every_step(monkeypatch):
    monkeypatch.setattr(every_step, "STEPS", 4)
    every_step.every_step(list(every_step.READINGS), (2, 8))
    every_step.power_step()


def _attention_entropy(monkeypatch):
    monkeypatch.setattr(attention_entropy, "ROUNDS", {64: 2})
    attention_entropy.against_fused_attention(64, "causal")
    attention_entropy.share_of_training(16)


def _neural_collapse(monkeypatch):
    neural_collapse.finish(5, 8, 2)
    neural_collapse.passes(5, 8, 1000, 8, 2)


def _vicreg_covariance(monkeypatch):
    monkeypatch.setattr(vicreg_covariance, "SHAPES_AND_ROUNDS", {(8, 4): 2})
    vicreg_covariance.main()


def _monitor_overhead(monkeypatch):
    monkeypatch.setattr("sys.argv", ["monitor_overhead", "digits", "all digits", "nc", "nrc", "id", "--quick"])
    monitor_overhead.main()


def _false_alarms(monkeypatch):
    monkeypatch.setattr("sys.argv", ["false_alarms", "--quick"])
    false_alarms.main()


def _drift_false_alarms(monkeypatch):
    for name, alarms, trials in drift_false_alarms.rows(quick=True):
        low, _ = interval(alarms, trials)
        assert low <= drift_false_alarms.LEVEL, name
        print(name)


def _first_non_finite(monkeypatch):
    monkeypatch.setattr(first_non_finite, "BLOCKS", 2)
    monkeypatch.setattr(first_non_finite, "STEPS", 8)
    monkeypatch.setattr(first_non_finite, "MODELS", {"digits MLP": (*first_non_finite.MODELS["digits MLP"][:2], 1)})
    first_non_finite.main(2)


def _guard_overhead(monkeypatch):
    monkeypatch.setattr(guard_overhead, "BLOCK", 4)
    guard_overhead.main(3)


def _weight_spectrum(monkeypatch):
    monkeypatch.setattr(weight_spectrum, "EVERY", 2)
    weight_spectrum.spectra(3)


BENCHMARKS = {
    "attention_entropy": _attention_entropy,
    "continual": _continual,
    "drift_false_alarms": _drift_false_alarms,
    "every_step": _every_step,
    "false_alarms": _false_alarms,
    "first_non_finite": _first_non_finite,
    "guard_overhead": _guard_overhead,
    "losses": lambda monkeypatch: losses.compare(losses.PAIRS, rounds=1),
    "monitor_overhead": _monitor_overhead,
    "neural_collapse": _neural_collapse,
    "projection": lambda monkeypatch: projection.main([(1, 8, 4, 2)], floats=2**9, blocks=3),
    "vicreg_covariance": _vicreg_covariance,
    "weight_spectrum": _weight_spectrum,
}


@pytest.mark.filterwarnings("ignore")  # of so few steps
@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_runs(name, monkeypatch, capsys):
    threads = torch.get_num_threads()
    BENCHMARKS[name](monkeypatch)
    assert torch.get_num_threads() == threads
    assert capsys.readouterr().out


def test_none_is_left_out():
    scripts = {path.stem for path in Path(__file__).parent.glob("*.py") if "__main__" in path.read_text()}
    # peers has an environment of its own, and compiled waits for a compiler
    assert scripts - {"peers", "compiled", "test_benchmarks"} == set(BENCHMARKS)
