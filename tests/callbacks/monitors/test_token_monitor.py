"""Every sequence of a step counts as it is, without its padding, and gradients are those that the training has."""

import math
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_collapse import CollapseGuard, TokenMonitor
from lightning_collapse.functional import (
    contraction_ratio,
    loudest_token_share,
    mean_mode_gradient,
    mean_mode_ratio,
    relative_residual,
    token_cosine,
    token_moments,
)
from lightning_collapse.layers import SigmaReparam
from lightning_collapse.utilities.points import Flag
from tests.toys import PointKeeper, fit

WIDTH, LENGTH = 8, 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x, seen):
        q, k, v = self.attn.qkv(x).chunk(3, dim=-1)
        x = x + self.attn.proj((q @ k.mT).masked_fill(~seen.unsqueeze(1), -math.inf).softmax(dim=-1) @ v)
        return x + self.down(self.up(x).relu())


class Net(LightningModule):
    """Two blocks; padding is not in the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.streams = []

    def training_step(self, batch, batch_idx):
        x, seen = batch["x"], batch["attention_mask"].bool()
        self.streams.append([x.detach()])
        for block in self.blocks:
            x = block(x, seen)
            self.streams[-1].append(x.detach())
        return (x[seen] - 1).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def data(*sizes, **more):
    generator = torch.Generator().manual_seed(1)
    found = []
    for size in sizes:
        lengths = torch.randint(2, LENGTH + 1, (size, 1), generator=generator)
        mask = (torch.arange(LENGTH) < lengths).long()
        found.append({"x": torch.randn(size, LENGTH, WIDTH, generator=generator), "attention_mask": mask, **more})
    return DataLoader(found, batch_size=None)


def read(keeper, layer):
    return {p.measure: p for p in keeper.points if p.layer == layer and p.step == keeper.points[-1].step}


def joined(parts):
    return token_moments(torch.cat([x for x, _ in parts]), torch.cat([mask for _, mask in parts]))


def streams_of(net, loader, last, depth):
    masks = [batch["attention_mask"].bool() for batch in loader]
    return joined([(stream[depth], mask) for stream, mask in list(zip(net.streams, masks, strict=True))[-last:]])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_streams_are_read_whole_and_without_padding(accumulate):
    keeper, net, loader = PointKeeper(), Net(), data(5, 3, 4, 6)
    fit(net, [TokenMonitor(every_n_steps=2), keeper], loader, accumulate_grad_batches=accumulate)
    for depth in (1, 2):
        found = read(keeper, f"blocks.{depth - 1}")
        moments, before = (streams_of(net, loader, accumulate, d) for d in (depth, depth - 1))
        assert {p.n for p in found.values()} == {len(moments.n)}
        for name, values in (
            ("relative_residual", relative_residual(moments)),
            ("token_cosine", token_cosine(moments)),
            ("loudest_token_share", loudest_token_share(moments)),
            ("contraction", contraction_ratio(moments, before)),
            ("mean_mode_ratio", mean_mode_ratio(moments)),
        ):
            assert found[name].value == pytest.approx(float(values.mean()), rel=1e-5), name
        assert found["relative_residual"].null == pytest.approx(float((1 - 1 / moments.n).sqrt().mean()))
        assert found["token_cosine"].null == 0
        assert found["mean_mode_ratio"].null == pytest.approx(float((moments.n - 1).rsqrt().mean()))


def gradients_of(net, batches, name):
    """Parts of the gradient of a writer, from its inputs and the gradient of its outputs."""
    writer, kept = net.get_submodule(name), []

    def keep(module, args, output):
        output.retain_grad()
        kept.append((args[0].detach(), output))

    handle = writer.register_forward_hook(keep)
    for batch in batches:
        net.training_step(batch, 0).backward()
    handle.remove()
    mask = torch.cat([batch["attention_mask"] for batch in batches])
    return mean_mode_gradient(torch.cat([y for y, _ in kept]), torch.cat([out.grad for _, out in kept]), mask)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_parts_of_the_gradient_are_those_of_inputs_and_adjoints(accumulate):
    keeper, net, loader = PointKeeper(), Net(), data(5, 3, 4, 6)
    fit(net, [TokenMonitor(every_n_steps=2), keeper], loader, accumulate_grad_batches=accumulate)
    for name in ("blocks.0.attn.proj", "blocks.1.down"):
        expected, found = gradients_of(net, list(loader)[-accumulate:], name), read(keeper, name)
        for part, value in zip(("mean_gradient", "centered_gradient", "amplification"), expected, strict=True):
            assert found[part].value == pytest.approx(float(value), rel=1e-4), (name, part)
        assert found["contraction"].value > 0
        assert "token_cosine" not in found


def test_a_gradient_scaler_changes_no_part():
    def parts(**kwargs):
        keeper = PointKeeper()
        fit(Net(), [TokenMonitor(every_n_steps=1), keeper], data(5, 4), **kwargs)
        return {key: p.value for key, p in read(keeper, "blocks.0.down").items() if "gradient" in key or "amp" in key}

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert parts() == pytest.approx(parts(plugins=[MixedPrecision("16-mixed", "cpu", scaler)]), rel=0.02)
    assert len(parts()) == 3


def test_weights_that_are_computed_from_others_have_no_parts_of_a_gradient():
    net, keeper = Net(), PointKeeper()
    SigmaReparam.convert_(net, include=["blocks.1"])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(net, [TokenMonitor(every_n_steps=1), keeper], data(3))
    assert not [str(each.message) for each in said if "not a leaf" in str(each.message)]  # nothing asks for theirs
    assert math.isfinite(keeper.curve("tokens/blocks.1.down/relative_residual")[-1].value)
    assert not keeper.curve("tokens/blocks.1.down/mean_gradient")
    assert keeper.curve("tokens/blocks.0.down/mean_gradient")


@pytest.mark.parametrize("key", ["position_ids", "document"])
def test_packed_documents_are_sequences_of_their_own(key):
    places = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    numbers = torch.tensor([[7, 7, 7, 9, 9, 9], [4, 4, 2, 2, 2, 2]])
    keeper, net = PointKeeper(), Net()
    loader = data(2, **{key: places if key == "position_ids" else numbers})
    loader.dataset[0]["attention_mask"].fill_(1)
    fit(net, [TokenMonitor(segments=None if key == "position_ids" else key, every_n_steps=1), keeper], loader)
    stream = net.streams[-1][1]
    documents = [stream[:1, :3], stream[:1, 3:], stream[1:, :2], stream[1:, 2:]]
    expected = sum(float(token_cosine(x)) for x in documents) / 4
    assert read(keeper, "blocks.0")["token_cosine"].value == pytest.approx(expected, rel=1e-5)
    assert read(keeper, "blocks.0")["n"].value == 4


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_blocks_tell_their_padding_themselves_whichever_dimension_is_first(batch_first):
    class Encoder(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=batch_first)
            self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def training_step(self, x, batch_idx):
            padding = torch.arange(LENGTH).expand(4, LENGTH) >= 4
            self.out = self.net(x if batch_first else x.transpose(0, 1), src_key_padding_mask=padding)
            return self.out.square().mean()

        configure_optimizers = Net.configure_optimizers

    keeper, net = PointKeeper(), Encoder()
    fit(net, [TokenMonitor(every_n_steps=1), keeper], DataLoader([torch.randn(4, LENGTH, WIDTH)], batch_size=None))
    out = net.out.detach() if batch_first else net.out.detach().transpose(0, 1)
    value = read(keeper, "net.layers.1")["token_cosine"].value
    assert value == pytest.approx(float(token_cosine(out[:, :4]).mean()), rel=1e-5)
    assert {"relative_residual", "contraction"} <= read(keeper, "net.layers.1.self_attn").keys()


def test_tokens_that_are_no_numbers_are_left_out_and_flagged():
    keeper, loader = PointKeeper(), data(5, 4)
    loader.dataset[-1]["x"][0, 0] = math.nan  # of one sequence, which attention then spreads over all of it
    fit(Net(), [TokenMonitor(every_n_steps=1), keeper], loader)
    found = read(keeper, "blocks.1")
    assert found["flag"].value == Flag.NONFINITE
    assert found["n"].value == 3
    assert math.isfinite(found["token_cosine"].value)


def test_without_tokens_it_says_so_and_names_that_match_nothing_are_refused():
    class Flat(Net):
        def training_step(self, batch, batch_idx):
            return self.blocks[0].up(batch["x"][:, 0]).sum()

    keeper = PointKeeper()
    with pytest.warns(UserWarning, match=r"`blocks.0.up` did not run on tokens \(N, L, D\)"):
        fit(Flat(), [TokenMonitor(["blocks.0.up"], every_n_steps=1), keeper], data(5))
    assert {p.flag for p in keeper.points} == {Flag.NOT_CALLED}
    with pytest.raises(MisconfigurationException, match=r"TokenMonitor\(layers=\['nothing'\]\)"):
        fit(Net(), [TokenMonitor(["nothing"])], data(5))
    with pytest.raises(ValueError, match="`segments` is a key of the batch"):
        TokenMonitor(segments=3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_stack_stays_one_graph_and_reads_the_same_streams():
    class Stack(Net):
        def __init__(self, compiled):
            super().__init__()
            self.graphs, self.stack = 0, nn.Sequential(Block(), Block())
            self.stack.forward = self.run
            self.blocks = None
            if compiled:
                self.stack = torch.compile(self.stack, backend=self.count)

        def count(self, graph, inputs):
            self.graphs += 1
            return graph

        def run(self, x, seen):
            return self.stack[1](self.stack[0](x, seen), seen)

        def training_step(self, batch, batch_idx):
            seen = batch["attention_mask"].bool()
            return (self.stack(batch["x"], seen)[seen] - 1).square().sum()

    torch.compiler.reset()
    eager, compiled, net = PointKeeper(), PointKeeper(), Stack(True)
    for keeper, model in ((eager, Stack(False)), (compiled, net)):
        fit(model, [TokenMonitor(every_n_steps=2), keeper], data(*[4] * 6))
    torch.compiler.reset()
    assert net.graphs == 1
    streams = [{(p.key, p.step): p.value for p in k.points if "gradient" not in p.key} for k in (eager, compiled)]
    streams = [{key: value for key, value in of.items() if "amplification" not in key[0]} for of in streams]
    assert streams[0] == pytest.approx(streams[1], rel=1e-5)


def test_the_guard_judges_by_it_without_being_asked():
    guard = CollapseGuard()
    fit(Net(), [TokenMonitor(every_n_steps=1), guard], data(5, 4, 3))
    assert guard.judge.coverage.judged == {"blocks.0", "blocks.1"}


def test_writers_of_maps_have_the_gradients_of_their_tokens():
    """The stream as ``(N, H, W, C)``, as in Swin, reads what the same tokens in a row do."""

    class Plain(Block):
        def forward(self, x):
            return x + self.down(self.up(x).relu())

    class Maps(Net):
        def training_step(self, batch, batch_idx):
            maps = batch["x"] if self.flat else batch["x"].unflatten(1, (2, 3))
            return (self.blocks[1](self.blocks[0](maps)) - 1).square().sum()

    found = []
    for flat in (True, False):
        keeper, model = PointKeeper(), Maps()  # of the same seed
        model.flat, model.blocks = flat, nn.ModuleList([Plain(), Plain()])
        x = torch.randn(4, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
        monitor = TokenMonitor(layers=["blocks.0", "blocks.1"], every_n_steps=1)
        fit(model, [monitor, keeper], DataLoader([{"x": x}], batch_size=None))
        found.append({(p.layer, p.measure): p.value for p in keeper.points if "gradient" in p.measure})
    assert found[0]
    assert found[0] == pytest.approx(found[1])
