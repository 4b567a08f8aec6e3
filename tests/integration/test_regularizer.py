"""What only the callback does: find a layer, count its calls, wrap the step and come off again."""

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_collapse.callbacks.loss_terms.regularizer import Regularizer
from lightning_collapse.losses import AntiCollapseLoss, VarianceLoss, VICReg
from lightning_collapse.utilities.training_step import wrap_training_step
from tests.integration.siamese import MixedSiamese, Siamese, curve, fit, weights

pytestmark = pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # on purpose


@pytest.mark.parametrize("as_dict", [True, False])
def test_what_a_training_step_returns(as_dict: bool) -> None:
    returned = []

    class Lit(Siamese):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch)
            if batch_idx == 1:
                return None
            output = {"loss": loss, "extra": 1} if as_dict else loss
            returned.append((output, loss))
            return output

    model, _, _ = fit(Lit, Regularizer(VICReg(), layer="projector"))
    assert len(returned) == 3
    if as_dict:
        assert all(output["loss"] is loss for output, loss in returned)
    assert "training_step" not in vars(model)


def test_chunk_splits_one_call() -> None:
    class Stacked(Siamese):
        def views(self, batch: Tensor) -> Any:
            return self.projector(self.encoder(torch.cat([batch, batch.roll(1, 0)]))).chunk(2)

    class MixedStacked(MixedSiamese):
        views = Stacked.views

    model, _, _ = fit(Stacked, Regularizer(VICReg(), layer="projector", chunk=2))
    mixed, _, _ = fit(MixedStacked)
    assert torch.equal(weights(model), weights(mixed))


@pytest.mark.parametrize(
    ("regularizer", "match"),
    [
        (
            lambda: Regularizer(VICReg(), layer="project"),
            "'project' matches no submodule of Siamese.*Did you mean `projector`",
        ),
        (lambda: Regularizer(VICReg(), layer="encoder.*"), r"must name one layer, but matches 3: encoder.0, encoder.1"),
        (lambda: Regularizer(VarianceLoss(), layer="projector"), r"1 call\(s\).*there were 2.*another layer"),
        (lambda: Regularizer(VICReg(), layer="projector", chunk=2), r"1 call\(s\) of the layer.*there were 2"),
    ],
)
def test_misuse_is_refused(regularizer: Callable[[], Regularizer], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(Siamese, regularizer())


def test_one_call_for_two_views_is_refused_with_the_way_out() -> None:
    class OneCall(Siamese):
        def training_step(self, batch: Tensor) -> Any:
            return self.projector(self.encoder(batch)).square().mean()

    with pytest.raises(MisconfigurationException, match=r"2 call\(s\).*there were 1.*pass `chunk=2`"):
        fit(OneCall, Regularizer(VICReg(), layer="projector"))


def test_calls_without_gradient_are_no_views() -> None:
    class Teacher(Siamese):
        def training_step(self, batch: Tensor) -> Any:
            with torch.no_grad():
                self.views(batch)
            return super().training_step(batch)

    model, _, _ = fit(Teacher, Regularizer(VICReg(), layer="projector"))
    plain, _, _ = fit(Siamese, Regularizer(VICReg(), layer="projector"))
    assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize("kind", ["tokens", "maps"])
def test_tokens_and_maps_become_rows(kind: str) -> None:
    class Shaped(Siamese):
        def __init__(self) -> None:
            super().__init__()
            shape = (2, 8) if kind == "tokens" else (4, 2, 2)
            self.shaped = nn.Unflatten(1, shape)

        def training_step(self, batch: Tensor) -> Any:
            return self.shaped(self.encoder(batch)).square().mean()

    class Expected(AntiCollapseLoss):
        def terms(self, *views: Tensor) -> dict[str, Tensor]:
            seen.append(tuple(views[0].shape))
            return {"variance": VarianceLoss()(*views)}

        coefficients: ClassVar = {"variance": 1.0}

    seen: list[tuple[int, ...]] = []
    fit(Shaped, Regularizer(Expected(), layer="shaped"))
    assert set(seen) == {(32, 8) if kind == "tokens" else (16, 4)}


def test_layer_that_never_runs_is_refused() -> None:
    class Unused(Siamese):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

    with pytest.raises(MisconfigurationException, match="run with gradient in `training_step`, and it did not"):
        fit(Unused, Regularizer(VICReg(), layer="unused"))


def test_twins_need_names() -> None:
    def pair(**names: Any) -> list[Regularizer]:
        loss = VICReg
        return [Regularizer(loss(), layer="encoder"), Regularizer(loss(), layer="projector", **names)]

    with pytest.raises(MisconfigurationException, match="Two `Regularizer`s are called 'vicreg', on 'encoder'"):
        fit(Siamese, *pair())
    model, logger, _ = fit(Siamese, *pair(name="head"))
    assert {"regularizer/vicreg/value", "regularizer/head/value"} <= {key for _, row in logger.rows for key in row}
    assert "training_step" not in vars(model)
    assert not any(m._forward_hooks for m in model.modules())


def test_module_is_restored_after_an_exception() -> None:
    class Failing(Siamese):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("boom")
            return super().training_step(batch)

    made = []
    with pytest.raises(RuntimeError, match="boom"):
        fit(lambda: made.append(Failing()) or made[0], Regularizer(VICReg(), layer="projector"))
    assert "training_step" not in vars(made[0])
    assert not any(m._forward_hooks for m in made[0].modules())


def test_wrappers_nest_and_come_off_in_any_order() -> None:
    model = Siamese()
    own = lambda batch: batch  # noqa: E731
    for before in (None, own):
        if before:
            model.training_step = before
        for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)):
            unwraps = [wrap_training_step(model, lambda step, batch: step(batch)) for _ in range(3)]
            for i in order:
                unwraps[i]()
                unwraps[i]()
            assert vars(model).get("training_step") is before


def test_callback_is_reusable_and_ignores_validation() -> None:
    class Validated(Siamese):
        def validation_step(self, batch: Tensor) -> Any:
            return self.training_step(batch)

        def val_dataloader(self) -> Any:
            return DataLoader(torch.randn(8, 16), batch_size=8)

    regularizer = Regularizer(VICReg(), layer="projector")
    first, logger, trainer = fit(Validated, regularizer)
    trainer.validate(first, verbose=False)
    second, _, _ = fit(Validated, regularizer)
    assert torch.equal(weights(first), weights(second))
    assert len(curve(logger, "regularizer/vicreg/value")) == 4


def test_later_steps_that_do_not_fit_are_left_out() -> None:
    class Sometimes(Siamese):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch)
            return loss + self.projector(self.encoder(batch)).mean() if batch_idx == 2 else loss

    with pytest.warns(UserWarning, match=r"there were 3.*go without the term"):
        _, logger, _ = fit(Sometimes, Regularizer(VICReg(), layer="projector"))
    assert [step for step, _ in curve(logger, "regularizer/vicreg/value")] == [0, 1, 3]


def test_odd_rows_cannot_be_split() -> None:
    class OneCall(Siamese):
        def training_step(self, batch: Tensor) -> Any:
            return self.projector(self.encoder(batch)).square().mean()

    with pytest.raises(MisconfigurationException, match=r"even number of samples with `chunk=2`, got 15"):
        fit(OneCall, Regularizer(VICReg(), layer="projector", chunk=2), batch_size=15)
    with pytest.warns(UserWarning, match=r"even number of samples.*got 5\. Steps like this one go without"):
        fit(OneCall, Regularizer(VICReg(), layer="projector", chunk=2), batches=1, batch_size=16, extra=5)


def test_chunk_does_not_split_a_sample() -> None:
    """Tokens: 15 samples of two have an even number of rows."""

    class Tokens(Siamese):
        def training_step(self, batch: Tensor) -> Any:
            return self.projector(self.encoder(torch.stack([batch, -batch], dim=1))).square().mean()

    with pytest.raises(MisconfigurationException, match=r"even number of samples with `chunk=2`, got 15"):
        fit(Tokens, Regularizer(VICReg(), layer="projector", chunk=2), batch_size=15)


def test_frozen_layer_warns() -> None:
    class Frozen(Siamese):
        def __init__(self) -> None:
            super().__init__()
            self.encoder.requires_grad_(False)

    with pytest.warns(UserWarning, match="'encoder' has no gradient"):
        fit(Frozen, Regularizer(VICReg(), layer="encoder"))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layer(reentrant: bool) -> None:
    class Checkpointed(Siamese):
        def views(self, batch: Tensor) -> Any:
            batch.requires_grad_()
            forward = nn.Sequential(self.encoder, self.projector)
            return [checkpoint(forward, view, use_reentrant=reentrant) for view in (batch, batch.roll(1, 0))]

    if reentrant:
        with pytest.raises(MisconfigurationException, match="reentrant activation checkpointing"):
            fit(Checkpointed, Regularizer(VICReg(), layer="encoder"))
        return
    model, _, _ = fit(Checkpointed, Regularizer(VICReg(), layer="projector"))
    plain, _, _ = fit(Siamese, Regularizer(VICReg(), layer="projector"))
    assert torch.equal(weights(model), weights(plain))


def test_later_in_place_operations_do_not_matter() -> None:
    class InPlace(Siamese):
        def training_step(self, batch: Tensor) -> Any:
            first, second = (view.relu_() for view in self.views(batch))
            return (first - second).square().mean()

    class Mixed(MixedSiamese):
        def training_step(self, batch: Tensor) -> Any:
            first, second = self.views(batch)
            return (first.relu() - second.relu()).square().mean() + self.anti_collapse_loss(first, second)

    model, _, _ = fit(InPlace, Regularizer(VICReg(), layer="projector"))
    mixed, _, _ = fit(Mixed)
    assert torch.equal(weights(model), weights(mixed))


def test_compiled_module_that_ran_before_still_reaches_the_hook() -> None:
    torch.compiler.reset()
    seed_everything(0, verbose=False)
    model = torch.compile(Siamese(), backend="eager")
    fit(lambda: model)
    _, first, _ = fit(lambda: model, Regularizer(VICReg(), layer="projector"))
    _, second, _ = fit(lambda: model, Regularizer(VICReg(), layer="projector", name="other"))
    _, none, _ = fit(lambda: model)
    assert [len(log.rows) for log in (first, second, none)] == [4, 4, 0]


def test_command_line(tmp_path: Any) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(Regularizer, "regularizer")
    config = {
        "regularizer": {
            "loss": {"class_path": "lightning_collapse.losses.VICReg", "init_args": {"convention": "paper"}},
            "on": "projector",
            "weight": {"class_path": "lightning_collapse.losses.LinearWarmup", "init_args": {"weight": 2, "steps": 5}},
        }
    }
    regularizer = parser.instantiate(parser.parse_object(config)).regularizer
    assert isinstance(regularizer.loss, AntiCollapseLoss)
    assert regularizer.weight(5) == 2.0
    assert regularizer.name == "vicreg"
