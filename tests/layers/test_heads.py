"""Heads that resist a bad collapse: fixed frames, cosines, variational ones and one for a second loss."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_collapse.functional import align_gradients
from lightning_collapse.layers import (
    AuxiliaryHead,
    CosineClassifier,
    ETFClassifier,
    HAFrameClassifier,
    NestedDropout,
    NormalizedFeatures,
    SparseETFClassifier,
    VBLLClassifier,
    VBLLRegression,
    required_scale,
)
from lightning_collapse.layers.sparse_etf_classifier import _gradient
from lightning_collapse.losses import VBLL, logit_distillation_loss
from tests.toys import batches, fit

TREE = torch.tensor([[float((a ^ b).bit_length()) for b in range(8)] for a in range(8)])
"""Distances of the leaves of a binary tree."""
MAKE = {
    "HAFrameClassifier": lambda: HAFrameClassifier(TREE, seed=3),
    "SparseETFClassifier": lambda: SparseETFClassifier(8, 4, steps=20, seed=3),
    "CosineClassifier": lambda: CosineClassifier(8, 4),
    "VBLLClassifier": lambda: VBLLClassifier(8, 4, "dense"),
    "VBLLRegression": lambda: VBLLRegression(8, 4),
    "NestedDropout": lambda: NestedDropout(8, sigma=3.0),
}
every_layer = pytest.mark.parametrize("name", MAKE)


def cosines(rows):
    units = rows / rows.norm(dim=1, keepdim=True)
    return (units @ units.T)[~torch.eye(len(rows), dtype=torch.bool)]


@every_layer
def test_is_filled_after_the_meta_device(name):
    with torch.device("meta"):
        layer = MAKE[name]()
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(7)  # what was in memory
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    expected = MAKE[name]()
    torch.testing.assert_close(layer.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert all(p.ndim for p in layer.parameters())  # FSDP2 takes no others


@every_layer
def test_precisions_and_compilation(name):
    layer, features = MAKE[name](), torch.randn(5, 8)
    exact = layer.eval()(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(features).float(), exact, rtol=0.03, atol=0.03 * exact.abs().max().item())
    half = layer.bfloat16()(features.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.03, atol=0.05 * exact.abs().max().item())
    assert MAKE[name]().to("meta")(features.to("meta")).shape == exact.shape


def test_one_graph():
    torch._dynamo.reset()
    model = nn.Sequential(NestedDropout(8, sigma=3.0), CosineClassifier(8, 4))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    features = torch.randn(5, 8)
    plain = nn.Sequential(NestedDropout(8, sigma=3.0), model[1])
    for _ in range(4):
        torch.testing.assert_close(compiled(features), plain(features))


@pytest.mark.parametrize(("gamma", "least"), [(1.0, -1.0), (2.0, -0.472), (5.0, -0.186)])
def test_frame_of_a_tree(gamma, least):
    before = torch.random.get_rng_state()
    rows = HAFrameClassifier(TREE, dim=12, gamma=gamma).prototypes()
    assert torch.equal(before, torch.random.get_rng_state())
    found = rows @ rows.T
    expected = (1 - least) * torch.exp(-gamma * TREE.double() / 3) + least
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert not torch.equal(rows, HAFrameClassifier(TREE, dim=12, gamma=gamma, seed=1).prototypes())


@pytest.mark.parametrize(
    ("distances", "options", "match"),
    [
        ([[0.0, 1.0]], {}, r"`distances` must be a symmetric matrix of two classes or more.*shape \(1, 2\)"),
        ([[0.0, 1.0], [2.0, 0.0]], {}, "`distances` must be a symmetric matrix"),
        ([[0.0, 0.0], [0.0, 0.0]], {}, "`distances` must be a symmetric matrix"),
        (TREE.tolist(), {"dim": 3}, "`dim` must be at least [78] for these 8 classes, got 3. Put a wider"),
        (TREE.tolist(), {"gamma": 0.0}, "`gamma` must be positive, got 0"),
    ],
)
def test_frames_that_there_are_not(distances, options, match):
    with pytest.raises(ValueError, match=match):
        HAFrameClassifier(distances, **options)


def test_distances_without_a_frame_are_an_error_and_no_nan():
    """On a ring with shortcuts no vectors have these cosines."""
    ring = torch.full((6, 6), 0.01).fill_diagonal_(0)
    ring[0, 1:4] = ring[1:4, 0] = 1.0
    ring[4, 5] = ring[5, 4] = 1.0
    with pytest.raises(ValueError, match=r"`distances` with `gamma=2\.0` give no cosines that vectors can have"):
        HAFrameClassifier(ring)


def test_sparse_frame():
    before = torch.random.get_rng_state()
    start, trained = (SparseETFClassifier(64, 10, steps=n, lr=1e-3).prototypes() for n in (0, 300))
    assert torch.equal(before, torch.random.get_rng_state())
    assert (trained == 0).sum() == 384
    torch.testing.assert_close(trained.norm(dim=1), torch.full((10,), 0.1, dtype=torch.float64))
    assert cosines(start).max() > 0.1
    assert cosines(trained).max() < -0.03
    assert cosines(trained).std() < 0.5 * cosines(start).std()
    again = SparseETFClassifier(64, 10, steps=300, lr=1e-3)
    assert torch.equal(again.weight, trained.float())
    rows = torch.randn(2, 64)
    torch.testing.assert_close(again(rows), rows @ again.weight.T)


def test_gradient_of_the_sparse_frame():
    rows = (0.1 * torch.randn(5, 7, dtype=torch.float64)).requires_grad_()
    units = rows / rows.norm(dim=1, keepdim=True)
    nearest = (units @ units.T).masked_fill(torch.eye(5, dtype=torch.bool), -2).amax(dim=1)
    ((rows.norm(dim=1) - 0.1).square().sum() - nearest.arccos().mean()).backward()
    torch.testing.assert_close(_gradient(rows.detach()), rows.grad, rtol=1e-10, atol=1e-12)


def test_no_row_is_empty():
    rows = SparseETFClassifier(3, 4, sparsity=0.8, steps=0).prototypes()
    assert (rows != 0).any(dim=1).all()
    with pytest.raises(ValueError, match="`sparsity` must be from 0 to below 1, got 1"):
        SparseETFClassifier(3, 4, sparsity=1)


def test_required_scale():
    for classes, p, expected in [(10, 0.99, 6.11), (100, 0.99, 9.10), (1000, 0.99, 11.49), (50_000, 0.9, 13.02)]:
        assert required_scale(classes, p) == pytest.approx(expected, abs=0.005)
    weight = ETFClassifier(9, 10).double().weight
    best = (required_scale(10, 0.99) * weight @ weight.T).softmax(dim=1).diagonal()
    torch.testing.assert_close(best, torch.full((10,), 0.99).double(), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="`probability` must be between 0 and 1, got 1"):
        required_scale(10, 1)


def test_cosine_classifier():
    head, features = CosineClassifier(8, 10), torch.randn(5, 8)
    expected = required_scale(10) * torch.cosine_similarity(features.unsqueeze(1), head.weight, dim=-1)
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(1e-3 * features), head(features))
    head(features).square().sum().backward()
    assert head.log_scale.shape == head.log_scale.grad.shape == (1,)
    fixed = CosineClassifier(8, 10, scale=10.0, learn_scale=False)
    assert [name for name, _ in fixed.named_parameters()] == ["weight"]
    with pytest.warns(UserWarning, match="fixed `scale` of 1.0 cannot reach a probability of 0.99 with 10 classes"):
        CosineClassifier(8, 10, scale=1.0, learn_scale=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_normalized_features(dtype):
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6e-8, 0.0]], dtype=dtype).requires_grad_()
    rows = NormalizedFeatures()(features)
    assert rows.dtype == torch.float32
    rows[:2].sum().backward()
    assert features.grad.isfinite().all()
    assert (features.grad[0] * features[0]).sum().abs() < 1e-3  # nothing along the row
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [features[2, 0].item() * 1e6, 0.0]])
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-6)


def test_bound_and_prediction_of_the_variational_classifier():
    torch.manual_seed(0)
    head, features, labels = VBLLClassifier(6, 4, "dense").double(), torch.randn(5, 6).double(), torch.arange(5) % 4
    mean, deviation = head(features), head.variance(features).sqrt()
    sampled = mean + deviation * torch.randn(20_000, 5, 4).double()
    exact = sampled.log_softmax(dim=-1).mean(dim=0)[torch.arange(5), labels]
    assert (head.log_likelihood(features, labels) <= exact + 0.02).all()
    before = torch.random.get_rng_state()
    probabilities = head.predict(features, samples=4000)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.testing.assert_close(probabilities, sampled.softmax(dim=-1).mean(dim=0), rtol=0, atol=0.03)
    assert torch.equal(head.predict(features), head.predict(features))
    torch.testing.assert_close(head.ood_score(features), 1 - head.predict(features).amax(dim=1))


@pytest.mark.parametrize("covariance", ["diagonal", "dense"])
def test_likelihood_of_the_variational_regression_is_exact(covariance):
    torch.manual_seed(0)
    head, features, targets = VBLLRegression(3, 2, covariance).double(), torch.randn(4, 3).double(), torch.randn(4, 2)
    factor = head.log_diagonal.exp().diag_embed() + (0 if head.below is None else head.below.tril(-1))
    weights = head.mean + (factor @ torch.randn(100_000, 2, 3, 1).double()).squeeze(-1)
    outputs = torch.einsum("skd,nd->snk", weights, features)
    sampled = torch.distributions.Normal(outputs, head.log_noise.exp()).log_prob(targets).sum(dim=-1)
    error = 5 * sampled.std(dim=0) / 100_000**0.5
    assert ((head.log_likelihood(features, targets) - sampled.mean(dim=0)).abs() < error).all()
    spread = outputs.var(dim=0) + head.log_noise.exp().square()
    torch.testing.assert_close(head.variance(features), spread, rtol=0.03, atol=0)
    assert (head.ood_score(10 * features) > head.ood_score(features)).all()
    loss = VBLL(head, train_rows=10)
    expected = -head.log_likelihood(features, targets).mean() + head.divergence() / 10
    torch.testing.assert_close(loss(features, targets), expected)
    with pytest.raises(ValueError, match=r"`targets` of `VBLL` must be floating point of shape \(4, 2\), got .*unsq"):
        loss(features, targets[:, 0])


def test_divergence_is_zero_on_the_prior():
    """But for the prior of the noise, which is at its own value."""
    head = VBLLRegression(5, 2, "dense", wishart_scale=2.0)
    with torch.no_grad():
        head.mean.zero_()
        head.below.zero_()
        head.log_diagonal.fill_(0.5 * math.log(1 / 5))
        head.log_noise.zero_()
    assert head.divergence().item() == pytest.approx(2.0, abs=1e-5)  # b / 2 per output


def test_logit_distillation():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 4).double().requires_grad_(), 3 * torch.randn(6, 4).double()
    p = ((student - teacher) / 2).sigmoid()
    divergence = 0.5 * (0.5 / p).log() + 0.5 * (0.5 / (1 - p)).log()
    torch.testing.assert_close(logit_distillation_loss(student, teacher), 4 * divergence.sum() / 6, rtol=0, atol=1e-8)
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    paper = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = logit_distillation_loss(student, teacher, form="binary_kl")
    torch.testing.assert_close(found, 4 * paper.sum() / 6, rtol=0, atol=1e-8)
    for form in ("log_cosh", "binary_kl"):
        extreme = torch.tensor([[1e4, -1e4]]).requires_grad_()
        loss = logit_distillation_loss(extreme, -extreme.detach(), form=form)
        loss.backward()
        assert loss.isfinite()
        assert extreme.grad.isfinite().all()
        assert torch.autograd.gradcheck(lambda s, form=form: logit_distillation_loss(s, teacher, form=form), student)
        assert logit_distillation_loss(teacher, teacher, form=form).item() == pytest.approx(0, abs=1e-12)
    small = logit_distillation_loss(teacher + 1e-3, teacher).item()
    assert small == pytest.approx(4 * 1e-6 / 8, rel=1e-4)
    assert extreme.grad.abs().max() <= 2.0
    with pytest.raises(ValueError, match="`form` must be one of"):
        logit_distillation_loss(teacher, teacher, form="kl")


def test_aligned_gradients():
    reference = [torch.tensor([1.0, 0.0]), torch.tensor([[2.0]])]
    against = [torch.tensor([-3.0, 4.0]), torch.tensor([[0.5]])]
    aligned = align_gradients(against, reference)
    assert sum((g * r).sum() for g, r in zip(aligned, reference, strict=True)).abs() < 1e-6
    torch.testing.assert_close(aligned[0], torch.tensor([-3.0 + 2 / 5, 4.0]))
    with_it = [torch.tensor([3.0, 4.0]), torch.tensor([[0.5]])]
    assert all(map(torch.equal, align_gradients(with_it, reference), with_it))
    zeros = [torch.zeros(2), torch.zeros(1, 1)]
    assert all(map(torch.equal, align_gradients(against, zeros), against))
    assert align_gradients([], []) == []
    with pytest.raises(ValueError, match="must be as many, got 2 and 1"):
        align_gradients(against, reference[:1])


class DualHead(LightningModule):
    """Distillation on a head of its own, where cross-entropy has the first word on the encoder."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.head = nn.Linear(16, 8), nn.Linear(8, 3)
        self.auxiliary = AuxiliaryHead(8, 3, hidden=5)
        self.products = []

    def training_step(self, batch, batch_idx):
        optimizer, features = self.optimizers(), self.encoder(batch)
        entropy = nn.functional.cross_entropy(self.head(features), batch[:, 0].gt(0).long())
        match = logit_distillation_loss(self.auxiliary(features), -10 * batch[:, :3])
        optimizer.zero_grad()
        self.manual_backward(match, retain_graph=True)
        backbone = list(self.encoder.parameters())
        against = [p.grad.clone() for p in backbone]
        for p in backbone:
            p.grad = None
        self.manual_backward(entropy)
        aligned = align_gradients(against, [p.grad for p in backbone])
        self.products.append(sum((g * p.grad).sum().item() for g, p in zip(aligned, backbone, strict=True)))
        for p, gradient in zip(backbone, aligned, strict=True):
            p.grad += gradient
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_dual_heads_in_a_fit():
    model = DualHead()
    before = [p.detach().clone() for p in model.parameters()]
    fit(model)
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert min(model.products) > -1e-4
    assert AuxiliaryHead.drop_(model) == ["auxiliary"]
    assert model.auxiliary is None
    assert not any(name.startswith("auxiliary") for name in model.state_dict())
    assert len(AuxiliaryHead(8, 3, hidden=0)) == 1


def test_draws_of_nested_dropout():
    before = torch.random.get_rng_state()
    layer, features = NestedDropout(6, sigma=2.0, mu=1.0), torch.ones(2, 6)
    kept = []
    for _ in range(2000):
        kept.append(int(layer.draw()))
        if len(kept) < 20:
            out = layer(features)
            assert torch.equal(out, (torch.arange(6) < kept[-1]).float().expand(2, 6))
        else:
            layer.calls += 1
    weights = torch.tensor([math.exp(-(((k - 1) / 2) ** 2)) for k in range(1, 7)])
    share = torch.bincount(torch.tensor(kept), minlength=7)[1:] / 2000
    torch.testing.assert_close(share, weights / weights.sum(), rtol=0, atol=0.05)
    assert torch.equal(before, torch.random.get_rng_state())
    other = NestedDropout(6, sigma=2.0, mu=1.0)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(features), layer(features))


def test_nested_dropout_in_evaluation_and_under_checkpointing():
    layer, features = NestedDropout(6, sigma=2.0), torch.randn(2, 6, requires_grad=True)
    for _ in range(5):
        features.grad = None
        out = checkpoint(layer, features, use_reentrant=False)
        out.square().sum().backward()
        assert torch.equal(features.grad, 2 * out.detach())
    assert layer.calls == 5
    layer.eval()
    assert torch.equal(layer(features), features)
    assert layer.evaluate(2)(features)[:, 2:].abs().sum() == 0
    assert torch.equal(layer.evaluate(None)(features), features)
    assert layer.calls == 5
    with pytest.raises(ValueError, match="`k` must be from 1 to 6, or None for all features, got 7"):
        layer.evaluate(7)


def test_a_fit_with_nested_dropout_resumes_its_draws():
    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 8), NestedDropout(8, sigma=3.0), nn.Linear(8, 2))

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Model()
    fit(model)
    assert model.state_dict()["net.1.calls"] == len(batches())
