"""Processes with uneven batches read the value, and average to the gradient, of one process with all rows."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from torch import Tensor

from lightning_collapse.callbacks.loss_terms.regularizer import Regularizer
from lightning_collapse.losses import (
    EffectiveRankHinge,
    EntropyGuidedAttention,
    LogDetBarrier,
    SupCon,
    TooFewRowsError,
    VarianceLoss,
    VICReg,
    variance_loss,
)
from lightning_collapse.mixins.anti_collapse import AntiCollapseMixin
from lightning_collapse.utilities.distributed import (
    all_gather_rows,
    all_gather_rows_with_grad,
    all_reduce_sum,
    all_reduce_sum_with_grad,
    world_size,
)
from lightning_collapse.utilities.registry import LOSSES
from tests.distributed.launch import spawn
from tests.distributed.unlabelled_losses import ROWS, pair_weights, readings
from tests.integration.siamese import Siamese, fit, weights
from tests.losses.cases import CASES as FACTS

RANKS = 2
MANY = (1, 5, 13, 21)  # rows of each of four processes
FIT = {"batches": 3, "batch_size": 32}
FAR = 500.0  # a mean of a thousand times the spread
CASES = {
    f"{name}-{shape}-{dtype}-{mean}": (name, shape, dtype, mean)
    for name in sorted(LOSSES)
    for shape in FACTS[name].split
    for dtype, mean in ((torch.float32, 0.0), (torch.float64, 0.0), (torch.float32, FAR))
    if FACTS[name].shift or not mean
}

# what is summed, gathered, drawn, whitened or told apart
SAMPLE = (
    *("VICReg", "BarlowTwins", "SIGReg", "Uniformity", "CodingRate", "KoLeo", "MMCR", "WMSE", "CorInfoMax"),
    *("EffectiveRankHinge", "SpectralTransformation"),
)
SAMPLE_CASES = [case for case, (name, shape, *_) in CASES.items() if name in SAMPLE and shape[0] == sum(MANY)]
SCALE_FREE = ("BarlowTwins", "EffectiveRankHinge", "SpectralTransformation", "WMSE")


class Flipped(Siamese):
    """Every process takes its part of each batch; views of a sample do not depend on the others."""

    def views(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        batch = batch[self.trainer.global_rank :: self.trainer.world_size]
        return self.projector(self.encoder(batch)), self.projector(self.encoder(batch.flip(1)))


class MixedFlipped(AntiCollapseMixin, Flipped):
    def __init__(self) -> None:
        super().__init__()
        self.set_regularizers({"vicreg": VICReg()})

    def training_step(self, batch: Tensor) -> Tensor:
        first, second = self.views(batch)
        return (first - second).square().mean() + self.anti_collapse_loss(first, second)


class SometimesThree(Flipped):
    """Calls the layer once too often on one process in one step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch)
        if batch_idx == 1 and self.trainer.global_rank == 1:
            loss = loss + 0 * self.projector(self.encoder(batch)).mean()
        return loss


class Labels:
    """Classes of the rows of this process; in the second step of the second there are none, in the third of both."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Tensor) -> Tensor | None:
        self.calls += 1
        if self.calls == 3 or (self.calls == 2 and dist.get_rank() == 1):
            return None
        return (batch[dist.get_rank() :: dist.get_world_size(), 0] > 0).long()


def data(shape: tuple[int, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Rows of two views, and weights of a layer that keep features below the variance floor."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    weight = torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64) / (2 * shape[1] ** 0.5)
    return [row.to(dtype) for row in rows], weight.to(dtype)


def value_and_gradient(case: str, split: slice) -> tuple[Tensor, Tensor]:
    name, shape, dtype, mean = CASES[case]
    rows, weight = data(shape, dtype)
    weight.requires_grad_()
    loss = LOSSES[name](**FACTS[name].exact)
    value = loss(*(row[split] @ weight + mean for row in rows[: loss.views]))
    value.backward()
    assert weight.grad is not None
    return value.detach(), weight.grad


def splits(rank: int, rows: int) -> slice:
    first = rows // 3  # uneven
    return slice(0, first) if rank == 0 else slice(first, None)


def gradient_at_collapse(loss: torch.nn.Module, split: slice) -> Tensor:
    """Of twelve equal rows, those of a part."""
    features = torch.full((12, 3), 2.0)[split].requires_grad_()
    loss(features).backward()
    assert features.grad is not None
    return features.grad


def messages(name: str) -> int:
    """How many all-reduces a forward pass takes."""
    sent = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: sent.append(1) or all_reduce(*args, **kwargs)
    try:
        LOSSES[name](**FACTS[name].exact)(*[torch.randn(FACTS[name].split[-1])] * LOSSES[name].views)
    finally:
        dist.all_reduce = all_reduce
    return len(sent)


def few_rows(rank: int, rows: tuple[int, int]) -> float | str:
    features = torch.arange(1.0, 7.0).view(2, 3)[rank].repeat(rows[rank], 1)
    try:
        return variance_loss(features).item()
    except TooFewRowsError as error:
        return str(error)


def primitives(rank: int) -> dict[str, Any]:
    mine = torch.full((2,), rank + 1.0)
    leaf = mine.clone().requires_grad_()
    total = all_reduce_sum_with_grad(leaf)
    (grad,) = torch.autograd.grad((rank + 1) * total.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), leaf)
    rows = torch.full((3 * rank, 2), float(rank), dtype=torch.bfloat16)
    mask = torch.tensor([True, False, True])[: len(rows)]
    uneven = torch.arange(2.0 * 3 * rank).view(3 * rank, 2).requires_grad_()
    everything, first = all_gather_rows_with_grad(uneven)
    ((rank + 1) * everything.square().sum()).backward()
    return {
        "world": world_size(),
        "sum": all_reduce_sum(mine),
        "argument": mine,
        "with_grad": total.detach(),
        "grad": grad.detach(),
        "second": second,
        "gathered": all_gather_rows(rows, mask),
        "rows": everything.detach(),
        "first": first,
        "grad of rows": uneven.grad,
    }


def door(make: Any, *callbacks: Any) -> tuple[Tensor, list[Any]]:
    many = {"strategy": "ddp", "devices": RANKS, "plugins": [TorchElasticEnvironment()]}
    model, logger, _ = fit(make, *callbacks, **FIT, **many, use_distributed_sampler=False)
    return weights(model), logger.rows


def join(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), GROUP_RANK="0")
    os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)


def averaged(case: str, split: slice) -> tuple[Tensor, Tensor]:
    """The value, and the gradient as data-parallel training averages it."""
    value, grad = value_and_gradient(case, split)
    dist.all_reduce(grad)
    return value, grad / world_size()


def second_derivative(name: str, split: slice) -> Tensor | str:
    """Along a direction, of the layer's weights, as data-parallel training averages it, or the words of its refusal."""
    rows, weight = data(FACTS[name].split[-1], torch.float64)
    weight.requires_grad_()
    loss = LOSSES[name](**FACTS[name].exact)
    value = loss(*(row[split] @ weight for row in rows[: loss.views]))
    try:
        (grad,) = torch.autograd.grad(value, weight, create_graph=True)
    except RuntimeError as error:
        return str(error)
    if grad.requires_grad:
        (second,) = torch.autograd.grad((grad * weight.detach().sin()).sum(), weight)
    else:  # a linear loss
        second = torch.zeros_like(weight)
    dist.all_reduce(second)
    return second / world_size()


def difference_of_gradients(name: str) -> Tensor:
    """The same in one process, from first derivatives."""
    rows, weight = data(FACTS[name].split[-1], torch.float64)
    loss, step = LOSSES[name](**FACTS[name].exact), 1e-6 * weight.sin()
    ends = [(weight + side * step).requires_grad_() for side in (1, -1)]
    for end in ends:
        loss(*(row @ end for row in rows[: loss.views])).backward()
    return (ends[0].grad - ends[1].grad) / 2e-6


def guided(form: str, split: slice) -> list[Tensor]:
    """Entropy guidance of some sequences: its value and gradients, as data-parallel training averages them."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64)
    later = torch.ones(4, 4, dtype=torch.bool).triu(1)
    guide, weight = EntropyGuidedAttention(1, 2, 0.0, form, hinge=True).double(), torch.ones((), dtype=torch.float64)
    value = guide((weight.requires_grad_() * scores[split]).masked_fill(later, -torch.inf).softmax(dim=-1))
    grads = torch.autograd.grad(value, [weight, guide.thresholds])
    if world_size() > 1:
        for grad in grads:
            dist.all_reduce(grad)
    return [value.detach(), *(grad / world_size() for grad in grads)]


def at_collapse(name: str, rows: int) -> tuple[float, float]:
    """What a loss reads where some rows of each process are all equal, and what it is to read."""
    loss = LOSSES[name](**FACTS[name].exact)
    features = torch.full((rows, 4), 1000.7)
    return loss(*[features] * loss.views).item(), loss.at_collapse(sum(MANY), 4)


def one_of_many(rank: int, folder: str) -> None:
    join(rank, len(MANY), folder)
    own = slice(sum(MANY[:rank]), sum(MANY[: rank + 1]))
    result: dict[str, Any] = {case: averaged(case, own) for case in SAMPLE_CASES}
    result["collapse"] = {name: at_collapse(name, MANY[rank]) for name in SCALE_FREE}
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def worker(rank: int, folder: str) -> None:
    join(rank, RANKS, folder)
    result: dict[str, Any] = {case: averaged(case, splits(rank, CASES[case][1][0])) for case in CASES}
    result["messages"] = {name: messages(name) for name in LOSSES}
    result["second"] = {name: second_derivative(name, splits(rank, FACTS[name].split[-1][0])) for name in LOSSES}
    result["guided"] = {form: guided(form, splits(rank, 6)) for form in ("normalized", "paper", "code")}
    result["unlabelled"] = readings(splits(rank, ROWS)), pair_weights(splits(rank, ROWS))
    floors = EffectiveRankHinge(), LogDetBarrier()
    result["collapsed"] = [gradient_at_collapse(loss, splits(rank, 12)) for loss in floors]
    result["few"] = {rows: few_rows(rank, rows) for rows in [(1, 0), (0, 1), (0, 0), (1, 1), (0, 2)]}
    result["primitives"] = primitives(rank)
    result["callback"] = door(Flipped, Regularizer(VICReg(), layer="projector"))
    result["mixin"] = door(MixedFlipped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result["sometimes"] = door(SometimesThree, Regularizer(VICReg(), layer="projector"))
        result["no labels here"] = door(Flipped, Regularizer(SupCon(), layer="projector", labels=Labels()))
    result["warned"] = [str(w.message) for w in caught if "go without" in str(w.message)]
    with pytest.raises(TooFewRowsError):
        VarianceLoss()(torch.zeros(0, 3))
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def found_by(work: Callable[..., None], ranks: int, folder: Path) -> list[dict[str, Any]]:
    spawn(work, args=(str(folder),), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return found_by(worker, RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes found, of which one has a single row."""
    return found_by(one_of_many, len(MANY), tmp_path_factory.mktemp("many"))


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_those_of_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    check(case, ranks)


@pytest.mark.parametrize("case", SAMPLE_CASES)
def test_four_processes_and_one_with_a_single_row(case: str, many: list[dict[str, Any]]) -> None:
    check(case, many)


@pytest.mark.parametrize("name", SCALE_FREE)
def test_collapse_whose_mean_is_rounded(name: str, many: list[dict[str, Any]]) -> None:
    for result in many:
        found, expected = result["collapse"][name]
        assert found == pytest.approx(expected, abs=1e-4)


def check(case: str, ranks: list[dict[str, Any]]) -> None:
    expected, reference = value_and_gradient(case, slice(None))
    tolerance = 1e-3 if CASES[case][-1] == FAR else 1e-5
    for result in ranks:
        value, grad = result[case]
        assert value.item() == pytest.approx(expected.item(), rel=tolerance)
        assert ((grad * reference).sum() / reference.square().sum()).item() == pytest.approx(1, abs=tolerance)
        torch.testing.assert_close(grad, reference, rtol=tolerance, atol=tolerance * reference.abs().max().item())
    assert all(torch.equal(result[case][0], ranks[0][case][0]) for result in ranks)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_second_derivative_is_that_of_one_process_or_refused(name: str, ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        found = result["second"][name]
        if isinstance(found, str):
            assert "differentiated once only" in found
        else:
            expected = difference_of_gradients(name)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_messages(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["messages"] == {name: case.messages for name, case in FACTS.items()}


def test_too_few_rows_is_decided_by_all(ranks: list[dict[str, Any]]) -> None:
    single = variance_loss(torch.arange(1.0, 7.0).view(2, 3)).item()
    for result in ranks:
        few = result["few"]
        assert all("needs at least 2 rows over all processes" in few[rows] for rows in [(1, 0), (0, 1), (0, 0)])
        assert few[1, 1] == pytest.approx(single)
        assert few[0, 2] == pytest.approx(0.99)


def test_sums(ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(ranks):
        found = result["primitives"]
        assert found["world"] == RANKS
        assert torch.equal(found["sum"], torch.full((2,), 3.0))
        assert torch.equal(found["argument"], torch.full((2,), rank + 1.0))
        assert torch.equal(found["with_grad"], torch.full((2,), 3.0))
        # process r evaluates (r + 1) s^2 with s = 3: all gradients arrive everywhere
        assert torch.equal(found["grad"], torch.full((2,), (1 + 2) * 2 * 3.0))
        # summed once more on the way back through the gradient's own all-reduce
        assert torch.equal(found["second"], torch.full((2,), 2.0 * 2 * 3))


def test_gathered_rows(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        rows, mask = result["primitives"]["gathered"]
        assert rows.dtype == torch.bfloat16
        assert torch.equal(mask, torch.tensor([False, False, False, True, False, True]))
        assert torch.equal(rows, torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3, dtype=torch.bfloat16))


def test_rows_gathered_with_gradient(ranks: list[dict[str, Any]]) -> None:
    rows = torch.arange(6.0).view(3, 2)
    found = [result["primitives"] for result in ranks]
    assert all(torch.equal(one["rows"], rows) for one in found)
    assert [one["first"] for one in found] == [0, 0]
    # process r evaluates (r + 1) x^2: all gradients arrive, process 0 has no rows
    assert torch.equal(found[1]["grad of rows"], (1 + 2) * 2 * rows)
    assert found[0]["grad of rows"].shape == (0, 2)


def test_equal_rows_are_told_apart_as_in_one_process(ranks: list[dict[str, Any]]) -> None:
    for i, loss in enumerate((EffectiveRankHinge(), LogDetBarrier())):
        found = torch.cat([result["collapsed"][i] for result in ranks]) / RANKS
        expected = gradient_at_collapse(loss, slice(None))
        assert expected.norm() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("form", ["normalized", "paper", "code"])
def test_entropy_guidance_is_that_of_one_process(form: str, ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        torch.testing.assert_close(result["guided"][form], guided(form, slice(None)))


def test_losses_without_labels_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    expected, weights = readings(slice(None)), pair_weights(slice(None))
    drawn = [result["unlabelled"][0].pop("drawn") for result in ranks]
    assert torch.equal(*drawn)
    assert expected.pop("drawn").isfinite().all()
    assert (weights[0] < 1).tolist() == [i == 3 for i in range(ROWS)]
    for result in ranks:
        found, found_weights = result["unlabelled"]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found_weights, weights)


def test_without_a_process_group() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert world_size() == 1
    assert all_reduce_sum_with_grad(x) is x
    assert all_gather_rows_with_grad(x) == (x, 0)
    total = all_reduce_sum(x)
    assert torch.equal(total, x)
    assert not total.requires_grad
    total.zero_()
    assert x.any()
    rows, mask = all_gather_rows(x)
    assert torch.equal(rows, x)
    assert mask.all()
    with pytest.raises(ValueError, match=r"`rows` must have shape \(n, D\), got \(3,\)"):
        all_gather_rows(torch.zeros(3))


def test_doors(ranks: list[dict[str, Any]]) -> None:
    single, logger, _ = fit(Flipped, Regularizer(VICReg(), layer="projector"), **FIT)
    for result in ranks:
        (callback, callback_rows), (mixin, mixin_rows) = result["callback"], result["mixin"]
        assert torch.equal(callback, mixin)
        assert callback_rows == mixin_rows
        torch.testing.assert_close(callback, weights(single), rtol=1e-5, atol=1e-6)
        for (step, row), (single_step, single_row) in zip(callback_rows, logger.rows, strict=True):
            assert step == single_step
            assert row == pytest.approx(single_row, rel=1e-4)
    assert ranks[0]["callback"][1] == ranks[1]["callback"][1]


def test_a_process_without_labels_does_not_stop_the_others(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["no labels here"][0], ranks[1]["no labels here"][0])
    assert ranks[0]["no labels here"][1] == ranks[1]["no labels here"][1]
    shown = [(step, row["regularizer/supcon/supervised"]) for step, row in ranks[0]["no labels here"][1]]
    assert [step for step, _ in shown] == [0, 1]  # the third goes without the term
    assert all(torch.tensor(value).isfinite() for _, value in shown)
    for result in ranks:
        assert sum("needs labels: `labels` returned None" in message for message in result["warned"]) == 1


def test_a_process_that_cannot_take_part_does_not_stop_the_others(ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(ranks[0]["sometimes"][0], ranks[1]["sometimes"][0])
    assert ranks[0]["sometimes"][1] == ranks[1]["sometimes"][1]
    assert [step for step, _ in ranks[0]["sometimes"][1]] == [0, 1, 2]
    assert sum("there were 3" in message for message in ranks[1]["warned"]) == 1
    assert not any("there were" in message for message in ranks[0]["warned"])
    assert all(torch.tensor(list(row.values())).isfinite().all() for _, row in ranks[0]["sometimes"][1])
