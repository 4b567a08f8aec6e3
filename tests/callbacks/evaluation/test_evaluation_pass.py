"""A pass over clean data in eval mode, against two passes over the final model written out, and unseen by the fit."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_collapse import NeuralCollapseMonitor
from lightning_collapse.utilities.points import Flag
from tests.toys import QUIET, PointKeeper, fit, weights

C, D = 4, 12
EVAL = "neural_collapse/head.input.eval"


class Classifier(LightningModule):
    """With all that eval mode changes: dropout and batch normalization."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(D, C)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["label"]) if isinstance(batch, dict) else batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def dataset(n: int = 90, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(C, (n,), generator=generator)
    return TensorDataset(torch.randn(n, 6, generator=generator) + y.unsqueeze(1), y)


def training() -> DataLoader:
    return DataLoader(dataset(), batch_size=16, shuffle=True)


def clean() -> DataLoader:
    return DataLoader(dataset(70, 2), batch_size=16, shuffle=True)


def run(monitor: NeuralCollapseMonitor | None, *callbacks: Any, **kwargs: Any) -> tuple[Classifier, PointKeeper]:
    keeper, model = PointKeeper(), kwargs.pop("model", None) or Classifier()
    loader = kwargs.pop("train", None) or training()
    fit(model, [*([monitor] if monitor else []), *callbacks, keeper], loader, **kwargs)
    return model, keeper


def last(keeper: PointKeeper) -> dict[str, float]:
    points = [point for point in keeper.points if point.key.startswith(EVAL + "/")]
    return {p.key.rpartition("/")[2]: p.value for p in points if p.step == points[-1].step}


def naive(model: Classifier, x: Tensor, y: Tensor) -> dict[str, float]:
    """The published formulas, in double precision, in two passes."""
    model = model.double().eval()
    with torch.no_grad():
        features = model.body(x.double())
        chosen = model.head(features).argmax(dim=1)
    means = torch.stack([features[y == c].mean(dim=0) for c in range(C)])
    centered = means - means.mean(dim=0)
    within = sum(torch.outer(row, row) for row in features - means[y]) / len(y)
    between = centered.T @ centered / C
    norms, directions = centered.norm(dim=1), nn.functional.normalize(centered, dim=1)
    pairs = ~torch.eye(C, dtype=torch.bool)
    variance = torch.stack([(features[y == c] - means[c]).square().sum(dim=1).mean() for c in range(C)])
    cdnv = (variance[:, None] + variance) / (2 * torch.cdist(means, means).square())
    weight = model.head.weight.detach()
    return {
        "nc1": (within @ torch.linalg.pinv(between, rtol=1e-12, hermitian=True)).trace().item() / C,
        "nc2_equinorm": (norms.std() / norms.mean()).item(),
        "nc2_equiangular": (directions @ directions.T + 1 / (C - 1))[pairs].abs().mean().item(),
        "nc3": (weight / weight.norm() - centered / centered.norm()).square().sum().item(),
        "cdnv": cdnv[pairs].mean().item(),
        "nc4": (torch.cdist(features, means).argmin(dim=1) != chosen).double().mean().item(),
        "n": len(y),
        "classes": C,
    }


@pytest.mark.parametrize(("precision", "rel"), [("32-true", 1e-5), ("64-true", 1e-12), ("bf16-mixed", 0.01)])
def test_values_are_those_of_the_final_model(precision: str, rel: float) -> None:
    model, keeper = run(NeuralCollapseMonitor(loader=clean()), max_epochs=2, precision=precision)
    found, (x, y) = last(keeper), dataset(70, 2).tensors
    reference = naive(model, x, y)
    assert 0 < reference["nc4"] < 0.6
    for name, value in reference.items():
        step = 2 / len(y) if name == "nc4" and precision == "bf16-mixed" else 0
        assert found[name] == pytest.approx(value, rel=rel, abs=step), name
    assert found["flag"] == 0


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        (lambda x, y: {"x": x, "label": y}, {}),
        (lambda x, y: [x, y], {}),
        (
            lambda x, y: {"x": x, "label": y.roll(1), "class": y},
            {"labels": lambda batch: batch["class"], "inputs": lambda module, batch: module(batch["x"])},
        ),
    ],
)
def test_forms_of_batches(form: Any, arguments: dict[str, Any]) -> None:
    x, y = dataset(70, 2).tensors
    batches = [form(*pair) for pair in zip(x.split(16), y.split(16), strict=True)]
    train = DataLoader(batches, batch_size=None)
    for loader in (batches, lambda: iter(batches)):
        model, keeper = run(NeuralCollapseMonitor(every_n_steps=1000, loader=loader, **arguments), train=train)
        found, reference = last(keeper), naive(model, x, y)
        assert [found[k] for k in ("nc1", "nc4", "n")] == pytest.approx(
            [reference[k] for k in ("nc1", "nc4", "n")], 1e-4
        )


def test_rows_without_a_class_do_not_count() -> None:
    x, y = dataset(70, 2).tensors
    spoilt = torch.cat([y, torch.tensor([-100, 99])])
    rows = torch.cat([x, 50 * torch.ones(2, 6)])
    with pytest.warns(UserWarning, match="labels other than 0 to 3"):
        model, keeper = run(NeuralCollapseMonitor(loader=[(rows, spoilt)]))
    found, reference = last(keeper), naive(model, x, y)
    assert [found[k] for k in ("nc1", "nc4", "n")] == pytest.approx([reference[k] for k in ("nc1", "nc4", "n")], 1e-4)


class Merging(nn.BatchNorm1d):
    """Changes its weights when its mode changes, as merged adapters do."""

    def train(self, mode: bool = True) -> nn.Module:
        self.weight.data.mul_(1.5)
        return super().train(mode)


@pytest.mark.parametrize("shared", [False, True], ids=["own loader", "the training loader"])
def test_the_fit_does_not_notice(shared: bool) -> None:
    class Draws(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + 0.1 * float(np.random.rand()) + 0.1 * random.random() + 0.1 * torch.rand(()), y

    def fitted(watched: bool) -> tuple[dict[str, Tensor], list[Any], list[bool]]:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        generator = torch.Generator().manual_seed(4)
        train = DataLoader(Draws(*dataset().tensors), batch_size=16, shuffle=True, generator=generator)
        other = DataLoader(Draws(*dataset(70, 2).tensors), batch_size=16, shuffle=True)
        model = Classifier()
        model.body[1] = Merging(D)
        model.body.append(nn.Linear(D, D).requires_grad_(False).eval())
        monitor = NeuralCollapseMonitor(every_n_steps=5, loader=train if shared else other, epochs=[1, 2, 3])
        modes, grads = [], []

        class After(Callback):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                modes.extend(module.training for module in pl_module.modules())
                grads.extend(weight.grad.clone() for weight in pl_module.parameters() if weight.grad is not None)
                assert trainer.training
                assert torch.is_grad_enabled()

        run(monitor if watched else None, After(), model=model, train=train, max_epochs=3)
        state = [torch.get_rng_state(), generator.get_state(), torch.tensor([random.random(), np.random.rand()])]
        return weights(model), [*state, *grads], modes

    (plain, state, modes), (watched, same, own) = fitted(False), fitted(True)
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert all(torch.equal(a, b) for a, b in zip(state, same, strict=True))
    assert modes == own
    assert len(set(modes)) == 2


def test_window_and_pass_do_not_mix() -> None:
    _, with_pass = run(NeuralCollapseMonitor(every_n_steps=5, loader=clean(), epochs=[1, 2]), max_epochs=2)
    torch.manual_seed(0)
    _, without = run(NeuralCollapseMonitor(every_n_steps=5), max_epochs=2)
    assert repr([p for p in with_pass.points if ".eval/" not in p.key]) == repr(without.points)
    assert not without.curve("neural_collapse/head.input/nc4")


def test_batch_hooks_see_a_validation() -> None:
    class Augmenting(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return (100 + 9 * batch[0], batch[1]) if self.trainer.training else batch

    model, keeper = run(NeuralCollapseMonitor(loader=clean()), model=Augmenting(0.0))
    assert last(keeper)["nc1"] == pytest.approx(naive(model, *dataset(70, 2).tensors)["nc1"], rel=1e-4)


@pytest.mark.parametrize(
    ("epochs", "count", "expected"),
    [
        (None, 12, [1, 2, 3, 4, 6, 7, 10, 12]),
        ([2, 5], 6, [2, 5]),
    ],
)
def test_epochs(epochs: list[int] | None, count: int, expected: list[int]) -> None:
    monitor = NeuralCollapseMonitor(every_n_steps=1000, loader=clean(), epochs=epochs)
    _, keeper = run(monitor, max_epochs=count, train=DataLoader(dataset(32), batch_size=16))
    assert [point.step for point in keeper.curve(f"{EVAL}/nc1")] == [2 * epoch - 1 for epoch in expected]


def test_last_epoch_may_be_one_of_steps() -> None:
    monitor = NeuralCollapseMonitor(every_n_steps=1000, loader=clean())
    _, keeper = run(monitor, max_epochs=-1, max_steps=10, train=DataLoader(dataset(32), batch_size=16))
    assert [point.step for point in keeper.curve(f"{EVAL}/nc1")] == [1, 3, 5, 7, 9]


def test_resumed_run_goes_on_counting(tmp_path: Any) -> None:
    def monitor() -> NeuralCollapseMonitor:
        return NeuralCollapseMonitor(every_n_steps=1000, loader=clean(), epochs=[2, 4])

    first = fit(Classifier(), [monitor()], training(), max_epochs=3)
    first.save_checkpoint(tmp_path / "third.ckpt")
    keeper = PointKeeper()
    again = Trainer(**{**QUIET, "max_epochs": 4}, logger=False, callbacks=[monitor(), keeper])
    again.fit(Classifier(), training(), ckpt_path=str(tmp_path / "third.ckpt"))
    assert [point.step for point in keeper.curve(f"{EVAL}/nc1")] == [4 * 6 - 1]


def test_what_can_be_gone_through_once_has_no_nc4() -> None:
    x, y = dataset(70, 2).tensors
    with pytest.warns(UserWarning, match="`loader` could not be gone through twice; NC4 reads NaN"):
        model, keeper = run(NeuralCollapseMonitor(loader=iter([(x, y)])))
    found = last(keeper)
    assert found.pop("nc4") != found["nc1"] == pytest.approx(naive(model, x, y)["nc1"], rel=1e-4)


@pytest.mark.parametrize("kind", ["loader", "forward", "inputs"])
def test_a_pass_that_fails_is_left_out(kind: str) -> None:
    def broken() -> Any:
        yield from clean()
        raise OSError("no disk")

    def model() -> Classifier:
        model = Classifier()
        if kind == "forward":
            plain = model.forward
            model.forward = lambda x: plain(x) if model.training else plain(x, "more")
        return model

    arguments = {"loader": broken if kind == "loader" else clean()}
    if kind == "inputs":
        arguments["inputs"] = lambda module, batch: module.no_such(batch)
    with pytest.warns(UserWarning, match="a pass over `loader` failed.*(no disk|positional|no_such).*`inputs=lambda"):
        watched, keeper = run(NeuralCollapseMonitor(every_n_steps=2, **arguments), model=model(), max_epochs=2)
    assert not [point for point in keeper.points if ".eval" in point.key]
    assert keeper.curve("neural_collapse/head.input/nc1")
    assert all(module.training for module in watched.modules())
    torch.manual_seed(0)
    plain, _ = run(None, model=model(), max_epochs=2)
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())


def test_batches_without_labels() -> None:
    x, _ = dataset(70, 2).tensors
    monitor = NeuralCollapseMonitor(every_n_steps=1000, loader=[x.split(16)[0]])
    with pytest.warns(UserWarning, match="the batch has no integer labels"), pytest.warns(match="no labelled rows"):
        _, keeper = run(monitor)
    assert {point.flag for point in keeper.points if point.layer.endswith(".eval")} == {Flag.NOT_CALLED}


def test_fast_dev_run_passes_over_as_many_batches_as_it_trains_on() -> None:
    _, keeper = run(NeuralCollapseMonitor(loader=clean()), fast_dev_run=2)
    assert last(keeper)["n"] == 32


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"loader": 3}, "`loader` takes an iterable of batches, or a function .* got 3"),
        ({"loader": {"a": clean()}}, "`loader` takes an iterable of batches, .* got {'a'"),
        ({"loader": "train"}, "`loader` takes .* got 'train'"),
        ({"loader": [], "epochs": [0]}, r"`epochs` takes whole numbers of at least 1, .* got \[0\]"),
        ({"loader": [], "epochs": []}, r"`epochs` takes .* got \[\]"),
        ({"loader": [], "epochs": 4}, "`epochs` takes .* got 4"),
        ({"loader": [], "inputs": "x"}, "`inputs` takes a function of the module and a batch, got 'x'"),
        ({"epochs": [1]}, r"`epochs` is about the pass over `loader`, and there is none, got \[1\]"),
        ({"inputs": len}, "`inputs` is about the pass over `loader`"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NeuralCollapseMonitor(**arguments)


def test_a_module_without_forward_is_refused_at_the_start() -> None:
    class Silent(Classifier):
        forward = LightningModule.forward

    with pytest.raises(MisconfigurationException, match=r"Silent has no `forward`.*`inputs=lambda"):
        fit(Silent(), [NeuralCollapseMonitor(loader=clean())], training())
