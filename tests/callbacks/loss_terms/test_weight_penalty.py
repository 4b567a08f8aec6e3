"""The door without a change to the code, what it refuses, and the door inside the module."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_collapse import ContinualMetrics, ContinualMixin, Distillation, EWCMixin, Replay, WeightPenalty
from lightning_collapse.penalties import EWC, MAS, L2Init, RankOneEWC, SynapticIntelligence
from lightning_collapse.replay import ReplayBuffer
from tests.penalties.toys import Classifier, fit_tasks, flat, loader
from tests.toys import fit


class Frozen(Classifier):
    def __init__(self):
        super().__init__()
        self.encoder.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def test_all_penalties_observe_the_gradient_of_the_task_alone():
    class Sees(SynapticIntelligence):
        def observe(self, parameters, scale=None):
            seen.append(parameters["head.weight"].grad.clone())
            super().observe(parameters, scale)

    class Shifted(L2Init):
        def start(self, parameters):
            super().start({name: parameter.detach() + 1 for name, parameter in parameters.items()})
            self.memory.place(parameters)

    class Mixed(ContinualMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.set_penalties({"shifted": Shifted(1.0), "sees": Sees(0.0)})

    seen = []
    for callbacks in ([], [WeightPenalty(Shifted(1.0), name="first")]):
        for base in (Classifier, Mixed):
            torch.manual_seed(0)
            fit(base(), [*callbacks, WeightPenalty(Sees(0.0), name="outside")], loader(0), max_steps=1)
    assert len(seen) == 6
    assert all(torch.equal(gradient, seen[0]) for gradient in seen)


def test_only_chosen_parameters():
    moved = {}
    for pattern in ("encoder.*", "head.*"):
        torch.manual_seed(0)
        model = Classifier()
        start = model.encoder[0].weight.detach().clone()
        fit(model, [WeightPenalty(L2Init(weight=1.0), parameters=[pattern])], loader(0), max_epochs=10)
        moved[pattern] = (model.encoder[0].weight - start).norm().item()
    assert moved["encoder.*"] < 0.3 * moved["head.*"]


def test_two_penalties_of_one_name_are_refused():
    class Lit(ContinualMixin, Classifier):
        def __init__(self):
            super().__init__()
            self.set_penalties({"l2init": L2Init()})

    with pytest.raises(MisconfigurationException, match="Two penalties are called 'l2init'"):
        fit(Lit(), [WeightPenalty(L2Init())], loader(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [WeightPenalty(L2Init(), parameters=["encoder.*", "nose"])], "'nose'.*It has: encoder.0.weight"),
        (lambda: [WeightPenalty(L2Init(), parameters=["encoder.*"])], "none of its 2 parameters is trainable"),
    ],
)
def test_refused_when_the_fit_starts(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(Frozen(), make(), loader(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightPenalty(nn.Linear(1, 1)), "`penalty` takes"),
        (lambda: WeightPenalty(L2Init(), parameters="encoder.*"), "`parameters` takes a list"),
        (lambda: WeightPenalty(L2Init(), parameters=[]), "`parameters` takes a list"),
        (lambda: WeightPenalty(EWC(weight=10.0), loader="train"), "`loader` takes"),
        (lambda: EWC(gamma=1.5, online=True), "`gamma` must be"),
        (lambda: EWC(gamma=0.5), "online=True"),
        (lambda: EWC(normalize="sum"), "`normalize`"),
        (lambda: EWC(weight=10.0, n_samples=0), "`n_samples`"),
        (lambda: EWC(estimator="true"), "`estimator`"),
        (lambda: MAS(n_samples=0), "`n_samples`"),
        (lambda: SynapticIntelligence(damping=0.0), "`damping`"),
    ],
)
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flattened_parameters_are_refused():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.__class__ = type("Flat", (FSDPStrategy,), {})
    with pytest.raises(MisconfigurationException, match="fully_shard"):
        WeightPenalty(L2Init()).on_fit_start(trainer, Classifier())


class Nameless(Classifier):
    """Calls its layers in the training step."""

    forward = LightningModule.forward

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.head(self.encoder(batch[0])), batch[1])


@pytest.mark.parametrize("penalty", [EWC, MAS, RankOneEWC])
def test_a_module_that_cannot_be_called_is_refused_before_it_is_trained(penalty):
    model = Nameless()
    with pytest.raises(MisconfigurationException, match=f"`{penalty.__name__}` calls the module.*`outputs="):
        fit(model, [WeightPenalty(penalty())], loader(0))
    told = penalty(weight=0.1, outputs=lambda module, batch: module.head(module.encoder(batch[0])))
    fit(model, [WeightPenalty(told)], loader(0))
    assert told.memory["anchor"]
    WeightPenalty(RankOneEWC(losses=lambda module, batch: batch[0][:, 0])).on_fit_start(Trainer(), model)


def test_a_stream_without_end_is_read_as_far_as_it_was_trained_on():
    class Stream(IterableDataset):
        read = 0

        def __iter__(self):
            while self.read < 1000:
                self.read += 1
                yield torch.randn(6), torch.randint(3, ())

    stream, penalty = Stream(), MAS()
    fit(Classifier(), [WeightPenalty(penalty)], DataLoader(stream, batch_size=2), max_epochs=-1, max_steps=4)
    assert penalty.memory["importance"]
    assert stream.read <= 2 * (4 + 1 + 4 + 1)  # the trainer looks one batch ahead


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize(("data", "options"), [(DataLoader([]), {}), (loader(0), {"limit_train_batches": 0})])
def test_a_fit_without_batches_says_so(data, options):
    with pytest.warns(UserWarning, match="it had no training batches"):
        fit(Classifier(), [WeightPenalty(L2Init())], data, **options)


def test_several_loaders_are_refused():
    class Two(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["a"], batch_idx)

    loaders = {"a": loader(0), "b": loader(1)}
    with pytest.raises(MisconfigurationException, match="several loaders"):
        fit(Two(), [WeightPenalty(EWC(weight=10.0))], loaders)
    ewc = EWC(weight=10.0)
    fit(Two(), [WeightPenalty(ewc, loader=lambda: loader(0))], loaders)
    assert ewc.memory["importance"]


WRONG = [(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long))]


@pytest.mark.parametrize("late", [[], WRONG])
def test_a_task_without_usable_data_is_not_remembered_and_nothing_is_lost(late):
    """Data that were there when the fit began, and that a buffer of replay brings when the task ends."""
    torch.manual_seed(0)
    penalty, model = WeightPenalty(EWC(weight=10.0)), Classifier()
    fit(model, [penalty], loader(0))
    before = penalty.penalty.state_dict()["memory"]
    reads = iter([list(loader(1)), late])
    penalty.loader = lambda: next(reads)
    with pytest.warns(UserWarning, match="learning task 1 failed with .*; it is not remembered, those before it are"):
        fit(model, [penalty], loader(1))
    torch.testing.assert_close(penalty.penalty.state_dict()["memory"], before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert penalty.task_index == 2


def test_a_shrunken_head_is_refused_and_a_grown_one_trains():
    penalty = WeightPenalty(EWC(weight=10.0))
    fit(Classifier(), [penalty], loader(0))
    fit(Classifier(classes=5), [penalty], loader(1))
    assert penalty.penalty.memory["importance"]["head.weight"].shape == (5, 8)
    with pytest.raises(
        MisconfigurationException, match=r"`head.weight` has shape \(3, 8\), and what is remembered of it \(5, 8\)"
    ):
        fit(Classifier(), [penalty], loader(2))


def test_a_frozen_part_is_remembered_until_it_is_trained_again():
    penalty = WeightPenalty(EWC(weight=10.0))
    torch.manual_seed(0)
    fit(Classifier(), [penalty], loader(0))
    fit(Frozen(), [penalty], loader(1))
    assert penalty.penalty.memory["importance"]["encoder.0.weight"].abs().max() > 0


def test_unfinished_tasks_and_fast_dev_run():
    penalty = WeightPenalty(EWC(weight=10.0))
    fit(Classifier(), [penalty], loader(0), fast_dev_run=True)
    assert penalty.task_index == 0
    assert not penalty.penalty.memory["importance"]


def test_module_brings_its_penalties_back_from_a_checkpoint(tmp_path):
    class Lit(EWCMixin, Classifier):
        def __init__(self):
            super().__init__("adam")

    model = Lit()
    trainer = fit_tasks(model)
    trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    loaded = Lit.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    for lit in (model, loaded):
        fit(lit, (), loader(2))
    assert torch.equal(flat(model), flat(loaded))
    plain = Classifier()
    plain.load_state_dict(model.state_dict())
    assert loaded.weight_penalties["ewc"].task_index == 3


def test_mixin_goes_first_and_hooks_call_super():
    with pytest.raises(TypeError, match=r"class Lit\(ContinualMixin, LightningModule\)"):

        class Lit(LightningModule, ContinualMixin):
            pass

    with pytest.warns(UserWarning, match="`Silent` overrides `on_train_start` without a call of `super"):

        class Silent(ContinualMixin, Classifier):
            def on_train_start(self):
                pass

    class Loud(ContinualMixin, Classifier):
        def on_train_start(self):
            super().on_train_start()


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_along_the_penalty_that_would_diverge_are_told_before_they_are_taken(optimizer, clip, recwarn):
    """Of SGD alone the line is known: with momentum 0.9 and a rate of 0.2 a curvature of 19."""
    penalty = L2Init(weight=10.0)  # 20
    fit(Classifier(optimizer), [WeightPenalty(penalty)], loader(0), max_steps=1, gradient_clip_val=clip)
    told = [str(warning.message) for warning in recwarn if "overshoot" in str(warning.message)]
    assert len(told) == (optimizer == "sgd" and clip is None)
    assert all("weight is below 9.5. It is 10." in text for text in told)


def test_a_penalty_learned_from_a_task_is_told_of_when_the_task_ends():
    with pytest.warns(UserWarning, match="'ewc': at this learning rate steps along the penalty overshoot"):
        fit(Classifier(), [WeightPenalty(EWC(weight=1e6))], loader(0))
    fit(Classifier(), [WeightPenalty(EWC(weight=1e-2))], loader(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC(weight="1"), "`weight` must be a number, finite and not negative, got '1'"),
        (lambda: EWC(weight=-1.0), "`weight` must be a number, finite and not negative, got -1.0"),
        (lambda: EWC(n_samples=10.5), "`n_samples` must be an integer of at least 1, got 10.5"),
        (lambda: MAS(n_samples=0), "`n_samples` must be an integer of at least 1, got 0"),
        (lambda: WeightPenalty(EWC(), parameters=[3]), r"`parameters` takes a list of names .* got \[3\]"),
        (lambda: WeightPenalty(EWC(), parameters=[]), r"`parameters` takes a list of names .* got \[\]"),
        (lambda: WeightPenalty(EWC(), parameters="head.*"), r"`parameters` takes a list of names .* got 'head"),
        (lambda: WeightPenalty(EWC), "`penalty` takes an object such as"),
        (lambda: ContinualMetrics([[]], metric=3), "`metric` must be a function, got 3"),
        (lambda: Distillation(weight=-1.0), "`weight` must not be negative, got -1.0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_are_left_as_they_are_when_a_task_ends():
    class Differentiates(L2Init):
        def consolidate(self, model, loader=None):
            sum(parameter.sum() for parameter in model.parameters()).backward()

    gradients = []
    for penalty in (L2Init, Differentiates):
        torch.manual_seed(0)
        model = Classifier()
        fit(model, [WeightPenalty(penalty(), name="pull")], loader(0))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


class Counts(Classifier):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("door", ["callback", "mixin"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: WeightPenalty(EWC(), loader=WRONG),
            r"fails in layer `encoder.0`: RuntimeError: mat1 .*`outputs=lambda",
        ),
        (lambda: WeightPenalty(EWC(), loader=[]), r"brought no samples.*`WeightPenalty\(..., loader=...\)`"),
        (lambda: WeightPenalty(MAS(outputs=lambda module, batch: module.head(batch[0]))), "fails in layer `head`"),
        (lambda: WeightPenalty(EWC(estimator="empirical", labels=lambda batch: 1 / 0)), "division by zero.*`labels="),
    ],
)
def test_a_task_that_cannot_be_learned_is_refused_before_the_first_step(make, message, door):
    class Lit(ContinualMixin, Counts):
        def __init__(self):
            super().__init__()
            self.set_penalties({"it": make()} if door == "mixin" else {})

    model = Lit()
    with pytest.raises(MisconfigurationException, match=message):
        fit(model, [make()] if door == "callback" else [], loader(0))
    assert model.steps == 0


def test_an_iterator_cannot_be_read_again():
    with pytest.raises(MisconfigurationException, match=r"iterator, which can be read once only.*`loader=...`"):
        fit(Classifier(), [WeightPenalty(EWC())], iter(loader(0)))
    penalty = EWC(weight=1.0)
    fit(Classifier(), [WeightPenalty(penalty, loader=loader(0))], iter(loader(0)))
    assert penalty.memory["importance"]


def test_a_buffer_that_training_fills_may_be_empty_at_the_start():
    class Fills(Classifier):
        def training_step(self, batch, batch_idx):
            buffer.append(batch)
            return super().training_step(batch, batch_idx)

    buffer, penalty = [], EWC(weight=1.0)
    fit(Fills(), [WeightPenalty(penalty, loader=lambda: buffer)], loader(0))
    assert penalty.memory["importance"]
    replay, penalty = Replay(ReplayBuffer(20)), EWC(weight=1.0)
    fit(Classifier(), [replay, WeightPenalty(penalty, loader=replay.buffer.loader(8))], loader(0))
    assert penalty.memory["importance"]


def test_a_first_batch_without_rows_is_not_the_one_that_is_tried():
    class Skips(Classifier):
        def training_step(self, batch, batch_idx):
            if len(batch[0]):
                return super().training_step(batch, batch_idx)
            return 0 * sum(weight.sum() for weight in self.parameters())

    x, y = next(iter(loader(0)))
    batches, penalty = [[x[:0], y[:0]], [x, y]], EWC(weight=1.0)
    fit(Skips(), [WeightPenalty(penalty)], DataLoader(batches, batch_size=None))
    assert penalty.memory["importance"]
    with pytest.raises(MisconfigurationException, match="could not learn the task"):
        fit(Skips(), [WeightPenalty(EWC(labels=lambda batch: 1 / 0))], DataLoader(batches, batch_size=None))


def test_the_trial_is_not_noticed():
    """Not by weights, running statistics, random numbers and what was learned before."""

    class Random(Classifier):
        def __init__(self):
            super().__init__()
            self.encoder.append(nn.BatchNorm1d(8))
            self.encoder.append(nn.Dropout(0.5))

    class Untried(WeightPenalty):
        def _try(self, *args):
            pass

    found = []
    for kind in (WeightPenalty, Untried):
        torch.manual_seed(0)
        model, penalty = Random(), kind(EWC(weight=1.0), name="ewc")
        for index in range(2):
            fit(model, [penalty], DataLoader(loader(index).dataset, 8, shuffle=True))
        found.append([*model.state_dict().values(), *penalty.penalty.memory["importance"].values(), torch.rand(3)])
    assert all(map(torch.equal, *found))
