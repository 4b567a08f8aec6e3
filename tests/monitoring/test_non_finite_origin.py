"""Producer and propagator, one step at a time: what was passed on first that is not finite, and who is named for it."""

import gc
import weakref
from math import isfinite

import pytest
import torch
from torch import nn

from lightning_collapse.functional import Cause
from lightning_collapse.monitoring.call_frames import CallFrames
from lightning_collapse.monitoring.non_finite_origin import ROWS, Reading, find_origin


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Residual(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch, self.last = branch, nn.Linear(4, 4)

    def forward(self, x):
        return self.last(x + self.branch(x))


def measure(net, *inputs, loss=None):
    """A frame of a forward and a backward pass."""
    net.zero_grad()
    frames = CallFrames(net)
    frames.open(step=3)
    frames.begin(inputs)
    frames.armed = True
    value = net(*inputs)
    value = value if loss is None else loss(value)
    value = value.sum()
    frames.armed = False
    frames.end(value)
    if value.requires_grad:
        value.backward()
        frames.note_gradients()
    return Reading(frames.close())


def found(*args, earlier=(), **kwargs):
    origin = find_origin(measure(*args, **kwargs), earlier)
    return None if origin is None else (origin.layer, origin.cause)


def chain(bad, at=2, depth=5):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(depth)]
    layers[at] = bad
    return nn.Sequential(*layers)


ONES = torch.ones(3, 4)


def test_a_healthy_step_has_no_origin():
    reading = measure(chain(nn.ReLU()), ONES)
    assert reading.healthy
    assert find_origin(reading) is None


@pytest.mark.parametrize("at", range(5))
def test_a_weight_of_each_layer(at):
    net = chain(nn.Linear(4, 4), at)
    nn.init.constant_(net[at].weight[:1, :1], torch.nan)
    origin = find_origin(measure(net, ONES))
    assert (origin.layer, origin.call, origin.cause) == (str(at), at, Cause.UPDATE)
    assert f"`{at}.weight`" in origin.words


def test_weights_that_a_module_uses_without_calling_their_owner():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    nn.init.constant_(attention.out_proj.weight, torch.inf)
    net = Residual(Function(lambda x: x))
    net.branch = nn.Sequential(Function(lambda x: x.unsqueeze(0)), Function(lambda x: attention(x, x, x)[0][0]))
    net.branch[1].attention = attention
    assert found(net, ONES) == ("branch.1.attention", Cause.UPDATE)


def test_a_buffer_that_is_read():
    net = chain(nn.BatchNorm1d(4).eval())
    net[2].running_var.fill_(torch.nan)
    assert found(net, ONES) == ("2", Cause.UPDATE)
    net[2].train()  # which does not read it
    net[2].running_var.fill_(torch.nan)
    assert found(net, torch.randn(3, 4)) is None


def test_an_operation_that_is_not_defined():
    assert found(chain(Function(lambda x: (x * 0).log())), ONES) == ("2", Cause.UNDEFINED)
    assert found(chain(Function(lambda x: x / (x - x))), ONES) == ("2", Cause.UNDEFINED)
    assert found(chain(Function(lambda x: (x * 0) / 0)), ONES) == ("2", Cause.UNDEFINED)


@pytest.mark.parametrize(
    ("inside", "cause"),
    [
        (lambda x: (x * 1e5).half(), Cause.OVERFLOW),
        (lambda x: (-1e5 * x).to(torch.float16), Cause.OVERFLOW),  # minus infinity
        (lambda x: (x * 300).half() @ torch.full((4, 4), 300.0).half(), Cause.OVERFLOW),
        (lambda x: (x * 12).half().exp(), Cause.OVERFLOW),
        (lambda x: 1 / (x * 1e-9).half(), Cause.UNDEFINED),  # which is 0
        (lambda x: (x * 1e-9).half().log(), Cause.UNDEFINED),
        (lambda x: (x * 0).half() / (x * 0).half(), Cause.UNDEFINED),
    ],
)
def test_float16_inside_of_a_module_that_runs_in_float32_around_it(inside, cause):
    assert found(chain(Function(lambda x: inside(x).float() / 1e5)), ONES) == ("2", cause)


def test_a_mask_in_float16_inside_is_no_overflow():
    mask = torch.tensor([True, False, False, False])
    net = chain(Function(lambda x: x.half().masked_fill(mask, -torch.inf).softmax(-1).float()), 1)
    assert found(net, ONES) is None
    nn.init.constant_(net[3].weight, torch.inf)
    assert found(net, ONES) == ("3", Cause.UPDATE)


def test_a_number_that_is_too_large_for_what_autocast_computes_in():
    class Narrow(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", torch.float16):
                return super().forward(x * 1e5).float()  # infinity times what may be of either sign: NaN

    assert found(chain(Narrow(4, 4)), ONES) == ("2", Cause.OVERFLOW)


def test_an_overflow_inside_of_a_composite_is_the_composites():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.constant_(self.first.bias, 100.0)

        def forward(self, x):
            return self.second(self.first(x).exp())  # 2.7e43, in float32

    origin = find_origin(measure(chain(Twice()), ONES))
    assert (origin.layer, origin.cause) == ("2", Cause.OVERFLOW)
    assert "between its modules, before `2.second`" in origin.words


def test_the_backward_pass_of_a_module():
    assert found(chain(Function(lambda x: (x * 0).sqrt())), ONES) == ("2", Cause.BACKWARD)


def test_the_backward_pass_of_one_of_two_branches():
    torch.manual_seed(0)
    root = Residual(nn.Sequential(Function(lambda x: (x * 0).sqrt())))
    assert found(nn.Sequential(nn.Linear(4, 4), root), ONES) == ("1.branch.0", Cause.BACKWARD)


def test_the_backward_pass_of_the_loss():
    assert found(chain(nn.ReLU()), ONES, loss=lambda x: (x * 0).sqrt()) == ("training_step", Cause.BACKWARD)


def test_data_that_are_not_finite():
    bad = ONES.clone()
    bad[1, 1] = torch.inf
    assert found(chain(nn.ReLU()), bad) == ("batch", Cause.DATA)


def test_masks_of_minus_infinity_are_nothing():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    net = Function(lambda x, mask: layer(x, src_mask=mask))
    net.layer = layer
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    reading = measure(net, ONES[None], causal)
    assert reading.healthy
    assert not all(map(isfinite, reading.sizes))
    assert find_origin(reading) is None


def test_what_is_infinite_in_a_healthy_step_is_usual():
    class Masked(nn.Module):
        """Logits of minus infinity, of which the softmax makes zeros."""

        def __init__(self):
            super().__init__()
            self.mask, self.bad = Function(lambda x: x.masked_fill(torch.eye(3, 4).bool(), -torch.inf)), False
            self.last = Function(lambda x: x / (0 if self.bad else 1) * 0)

        def forward(self, x):
            return self.last(self.mask(x).softmax(dim=1))

    net = Masked()
    healthy = measure(net, ONES)
    net.bad = True
    bad = measure(net, ONES)
    assert find_origin(bad, [healthy]).layer == "last"


def test_a_module_that_is_called_twice_is_told_apart():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Function(lambda x: x.log())

        def forward(self, x):
            return self.net(x), self.net(x * 0)

    reading = measure(Siamese(), ONES, loss=lambda pair: pair[0] + pair[1])
    origin = find_origin(reading)
    assert (origin.layer, origin.call) == ("net", 1)


def test_a_table_has_the_last_rows_up_to_the_first_that_is_bad():
    net = chain(Function(lambda x: x / 0 * 0), at=30, depth=40)
    healthy = [measure(chain(nn.Identity(), at=30, depth=40), ONES) for _ in range(2)]
    origin = find_origin(measure(net, ONES), healthy)
    assert len(origin.rows) == ROWS
    assert [row.call for row in origin.rows] == list(range(10, 31))
    assert [row.verdict != "" for row in origin.rows] == [False] * 20 + [True]
    assert all(len(row.values) == 3 for row in origin.rows)


def test_nothing_of_a_step_is_kept_alive():
    net, frames = chain(nn.ReLU()), None
    frames = CallFrames(net)
    frames.open(0)
    frames.armed = True
    out = net(ONES)
    alive = weakref.ref(out)
    del out
    gc.collect()
    assert alive() is None
    frames.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not any("__getstate__" in vars(module) for module in net.modules())


ODD = {
    "nothing": lambda: None,
    "a number": lambda: 3,
    "no rows": lambda: torch.zeros(0, 4),
    "integers": lambda: torch.zeros(3, dtype=torch.long),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": lambda: torch.zeros(2, device="meta"),
    "complex": lambda: torch.full((2,), 1 - 1j, dtype=torch.complex64),
    "a tree": lambda: {"a": [torch.ones(2), (torch.ones(1),)]},
}


@pytest.mark.parametrize("value", ODD.values(), ids=list(ODD))
def test_whatever_a_module_returns_ends_nothing(value):
    net = Function(value)
    frames = CallFrames(net)
    frames.open(0)
    frames.armed = True
    net()
    frame = frames.close()
    assert [call.done for call in frame.calls] == [-1, 0]
    assert all(size == 1 for size in Reading(frame).sizes)
    assert frames.contained.failed == {}
