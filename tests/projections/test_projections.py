"""Plain projections: no leak through any optimizer, what they refuse, layers of several kinds, gradients of outputs."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_collapse.projections import GPM, OGD, SGP, HebbianSubspace, NullSpace

DOUBLE = torch.float64


def inputs(n=40, d=20, rank=5, dtype=DOUBLE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, rank, generator=generator, dtype=dtype) @ torch.randn(
        rank, d, generator=generator, dtype=dtype
    )


def copies(projection):
    return {name: p.detach().clone() for name, p in projection.parameters.items()}


OPTIMIZERS = {
    "SGD": lambda w: torch.optim.SGD(w, 0.1),
    "SGD, decay": lambda w: torch.optim.SGD(w, 0.1, weight_decay=0.1),
    "momentum": lambda w: torch.optim.SGD(w, 0.1, momentum=0.9),
    "momentum, decay": lambda w: torch.optim.SGD(w, 0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda w: torch.optim.Adam(w, 0.01),
    "AdamW": lambda w: torch.optim.AdamW(w, 0.01, weight_decay=0.0),
    "AdamW, decay": lambda w: torch.optim.AdamW(w, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "most"), [(DOUBLE, 1e-12), (torch.float32, 1e-4)])
def test_no_optimizer_leaks(name, dtype, most):
    """Its state comes from an old task; of gradients that are projected all but plain SGD leak."""
    torch.manual_seed(0)
    layer, gpm, old = nn.Linear(20, 7, dtype=dtype), GPM(threshold=1.0), inputs(dtype=dtype)
    leaks = {}
    for what in ("update", "gradient"):
        module = copy.deepcopy(layer)
        optimizer, generator = OPTIMIZERS[name](module.parameters()), torch.Generator().manual_seed(1)
        gpm = GPM(threshold=1.0)
        gpm.start(module)
        for step in range(60):
            if step == 20:
                gpm.learn(module, [old])
                basis = gpm.subspaces["weight"].directions
                start = module.weight.detach().clone()
            module.weight.grad = torch.randn(7, 20, generator=generator, dtype=dtype)
            if what == "gradient" and step >= 20:
                module.weight.grad -= module.weight.grad @ basis @ basis.T
            before = copies(gpm)
            optimizer.step()
            if what == "update":
                gpm.project_(gpm.parameters, before)
        moved = module.weight.detach() - start
        leaks[what] = ((moved @ basis).norm() / moved.norm()).item()
    assert basis.shape == (20, 5)
    assert leaks["update"] < most
    assert (leaks["gradient"] > 0.01) == (name != "SGD")


def test_scaled_directions_keep_what_importance_leaves():
    layer, sgp = nn.Linear(20, 7, dtype=DOUBLE), SGP(threshold=1.0)
    sgp.start(layer)
    sgp.learn(layer, [inputs()])
    before, change = copies(sgp), torch.randn(7, 20, dtype=DOUBLE)
    with torch.no_grad():
        layer.weight += change
    sgp.project_(sgp.parameters, copy.deepcopy(before))
    directions, importance = sgp.subspaces["weight"]
    left = (layer.weight.detach() - before["weight"]) @ directions
    torch.testing.assert_close(left, change @ directions * (1 - importance))
    s = torch.linalg.svdvals(inputs())[:5]
    torch.testing.assert_close(importance, 11 * s / (10 * s + s[0]))


class Turned(nn.Module):
    """A linear layer with its weight the other way round, as in GPT-2."""

    def __init__(self, nx, nf):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


KINDS = {
    "tokens": (nn.Linear(6, 3), (4, 5, 6)),
    "image": (nn.Conv2d(2, 3, 2, stride=2, padding=1), (4, 2, 4, 4)),
    "channels last": (nn.Conv2d(8, 3, 2).to(memory_format=torch.channels_last), (3, 8, 2, 2)),
    "signal": (nn.Conv1d(5, 3, 3, padding_mode="circular", padding=1, dilation=2), (1, 5, 7)),
    "turned": (Turned(6, 3), (4, 6)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_old_outputs_stay_in_layers_of_every_kind(kind):
    layer, shape = copy.deepcopy(KINDS[kind][0]), KINDS[kind][1]
    torch.manual_seed(0)
    old, gpm = torch.randn(shape), GPM(threshold=1.0)
    gpm.start(layer)
    gpm.learn(layer, lambda: [old])
    outputs, before = layer(old).detach(), copies(gpm)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn_like(parameter)
    gpm.project_(gpm.parameters, copy.deepcopy(before))
    torch.testing.assert_close(layer(old), outputs, rtol=1e-4, atol=2e-5)
    matrix = layer.weight.detach() - before["weight"]
    width = len(matrix) if kind == "turned" else matrix[0].numel()
    rank = gpm.readings()[""]["rank"]
    assert 0 < rank <= width
    assert (matrix.norm() > 0.1) == (rank < width)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_no_step_has_moved_stays_as_it_is_and_autocast_changes_nothing(kind):
    layer, shape = copy.deepcopy(KINDS[kind][0]), KINDS[kind][1]
    torch.manual_seed(0)
    gpm = GPM(threshold=0.9)
    gpm.start(layer)
    gpm.learn(layer, [torch.randn(shape)])
    start = copies(gpm)
    gpm.project_(gpm.parameters, copies(gpm))
    assert all(torch.equal(p, start[name]) for name, p in gpm.parameters.items())
    moved, found = {name: torch.randn_like(p) for name, p in start.items()}, []
    for autocast in (False, True):
        now = {name: part.clone(memory_format=torch.preserve_format) for name, part in moved.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            gpm.project_(now, copy.deepcopy(start))
        found.append(now)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_what_cannot_be_projected_is_frozen_and_what_lies_outside_is_free():
    net = nn.Sequential(
        nn.Conv2d(4, 4, 1, groups=2), nn.GroupNorm(1, 4), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    gpm = GPM()
    gpm.start(net, ["0", "1", "3"])
    assert gpm.frozen == ["0.weight", "0.bias", "1.weight", "1.bias", "3.bias"]
    assert list(gpm.parameters) == ["3.weight", *gpm.frozen]
    gpm.start(net, ["3"], freeze=False)
    assert list(gpm.parameters) == ["3.weight"]
    net[4].weight = net[3].weight
    with pytest.raises(ValueError, match="no linear layer and no convolution"):
        gpm.start(net)


def test_blocks_are_heard_where_eval_mode_would_compute_in_one_piece():
    block, gpm = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), GPM(0.9)
    gpm.start(block)
    assert list(gpm.parameters)[:2] == ["linear1.weight", "linear2.weight"]
    assert {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "norm1.weight"} <= set(gpm.frozen)
    gpm.learn(block, [torch.randn(4, 5, 8)])
    assert all(0 < of["rank"] <= 16 for of in gpm.readings().values())
    assert [*gpm.readings()] == ["linear1", "linear2"]


class Table(nn.Module):
    """Two dimensions, and no product."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, indices):
        return self.weight[indices]


def test_what_is_no_product_is_told():
    net, gpm = nn.Sequential(Table(), nn.Linear(4, 2)), GPM()
    gpm.start(net)
    with pytest.warns(UserWarning, match="`0` saw no finite inputs"):
        gpm.learn(net, [torch.arange(5)])
    assert [of["rank"] > 0 for of in gpm.readings().values()] == [False, True]


def test_bad_input_is_refused_by_name():
    for make, match in (
        (lambda: GPM(1.2), "`threshold` is a share of energy.*got 1.2"),
        (lambda: GPM(n_samples=0), "`n_samples` must be an integer"),
        (lambda: SGP(scale=-1.0), "`scale` must not be negative"),
        (lambda: HebbianSubspace(0), "`number` must be an integer"),
        (lambda: NullSpace(0.5), "`factor` must be at least 1, got 0.5"),
        (lambda: OGD(max_directions=0), "`max_directions` must be an integer"),
        (lambda: GPM().start(nn.Linear(2, 2).bfloat16()), "`weight` is kept in torch.bfloat16.*float32"),
        (lambda: GPM().start(nn.LazyLinear(2)), "`weight` has no shape yet"),
        (lambda: GPM().start(nn.Linear(2, 2), ["head"]), "'head' matches no submodule"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    gpm, ogd = GPM(), OGD()
    for projection in (gpm, ogd):
        projection.start(nn.Linear(3, 2))
        with pytest.raises(ValueError, match="no samples"):
            projection.learn(nn.Linear(3, 2), [])
    net = nn.Linear(3, 2)
    for projection, match in ((gpm, "receives 4 numbers, and received 3"), (ogd, "another size")):
        projection.start(net)
        projection.learn(net, [torch.randn(5, 3)])
        with pytest.raises(ValueError, match=match):
            projection.start(nn.Linear(4, 2))
    gpm.start(nn.Linear(3, 5))  # a head with more classes


def test_thresholds_follow_the_task_and_bases_stay_orthonormal():
    seen = []
    gpm, layer = GPM(lambda task: seen.append(task) or 0.9 + 0.05 * task), nn.Linear(20, 2)
    gpm.start(layer)
    for task in range(2):
        gpm.learn(layer, [inputs(rank=20, dtype=torch.float32, seed=task)])
    directions = gpm.subspaces["weight"].directions
    assert seen == [0, 1]
    torch.testing.assert_close(directions.T @ directions, torch.eye(directions.shape[1]), rtol=0, atol=1e-6)
    other = GPM()
    other.load_state_dict(gpm.state_dict())
    assert torch.equal(other.subspaces["weight"].directions, directions)
    assert copy.deepcopy(gpm).parameters == {}


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [lambda: GPM(0.9), lambda: SGP(0.9), lambda: OGD(n_samples=4)])
def test_a_step_does_not_wait_for_the_device(method):
    net, projection = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), method()
    projection.start(net)
    projection.learn(net, [torch.randn(8, 6)])
    before = copies(projection)
    with torch.no_grad():
        net[0].weight += 1.0
    with NoWait():
        projection.project_(projection.parameters, before)
    assert (net[0].weight - before["0.weight"]).isfinite().all()
    with pytest.raises(AssertionError, match="local_scalar_dense"), NoWait():
        before["0.weight"].sum().item()


def test_hebbian_directions_protect_the_principal_inputs():
    layer, hebbian, x = nn.Linear(12, 4, dtype=DOUBLE), HebbianSubspace(3), torch.randn(50, 12, dtype=DOUBLE)
    x = x * torch.logspace(0, -2, 12, dtype=DOUBLE)
    hebbian.start(layer)
    hebbian.learn(layer, [x])
    _, _, vectors = torch.linalg.svd(x)
    cosines = torch.linalg.svdvals(vectors[:3] @ hebbian.subspaces["weight"].directions)
    assert torch.acos(cosines.min().clamp(max=1)) < 1e-2
    for _ in range(4):
        hebbian.learn(layer, [x[:, :6] @ torch.eye(6, 12, dtype=DOUBLE)])
    assert hebbian.readings()[""]["rank"] == 9  # a direction that no input has is none
    for _ in range(4):
        hebbian.learn(layer, [x])
    assert hebbian.readings() == {"": {"rank": 12.0, "capacity_left": 0.0}}


def test_the_null_space_is_of_all_tasks_together_and_directions_can_become_free_again():
    layer, null, moment = nn.Linear(6, 4, dtype=DOUBLE), NullSpace(), torch.zeros(6, 6, dtype=DOUBLE)
    null.start(layer)
    ranks = []
    for scale in ((9, 3, 1, 0.5, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1, 1, 1)):
        x = torch.randn(400, 6, dtype=DOUBLE) * torch.tensor(scale, dtype=DOUBLE)
        null.learn(layer, [x[:150], x[150:]])
        moment += x.T @ x
        values = torch.linalg.eigvalsh(moment)
        read = null.readings()[""]
        assert read["rank"] == (values > 10 * values[0]).sum()
        ranks.append(read["rank"])
        assert read["null_share"] == pytest.approx((values[values <= 10 * values[0]].sum() / values.sum()).item())
        again = NullSpace()
        again.load_state_dict(copy.deepcopy(null.state_dict()))
        assert again.readings() == null.readings()
        null = again
        null.start(layer)
    assert ranks[1] < ranks[0]
    torch.testing.assert_close(null.moments["weight"], moment)
    before, change = copies(null), torch.randn(4, 6, dtype=DOUBLE)
    with torch.no_grad():
        layer.weight += change
    null.project_(null.parameters, copy.deepcopy(before))
    _, vectors = torch.linalg.eigh(moment)
    free = vectors[:, : 6 - int(ranks[1])]
    torch.testing.assert_close(layer.weight.detach() - before["weight"], change @ free @ free.T)


def test_gradient_steps_change_old_outputs_to_second_order_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y, new = torch.randn(6, 5, dtype=DOUBLE), torch.arange(6) % 3, torch.randn(20, 5, dtype=DOUBLE)
    ogd = OGD(n_samples=6)
    ogd.start(net)
    ogd.learn(net, [(x, y)])
    ogd.learn(net, [(x, y)])  # nothing new: the basis does not grow
    assert ogd.readings()["all"]["rank"] == 6
    start, old = copy.deepcopy(net.state_dict()), net(x).gather(1, y[:, None]).detach()
    changes = {}
    for projected in (False, True):
        for step in (0.1, 0.01):
            net.load_state_dict(start)
            gradients = torch.autograd.grad(net(new).square().mean(), list(net.parameters()))
            before = copies(ogd)
            with torch.no_grad():
                for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                    parameter -= step * gradient
            if projected:
                ogd.project_(ogd.parameters, before)
            changes[projected, step] = (net(x).gather(1, y[:, None]) - old).norm().item()
    assert 8 < changes[False, 0.1] / changes[False, 0.01] < 12
    assert 80 < changes[True, 0.1] / changes[True, 0.01] < 120
    small = OGD(n_samples=6, max_directions=4)
    small.start(net)
    small.learn(net, [(x, y)])
    assert small.readings()["all"]["rank"] == 4
