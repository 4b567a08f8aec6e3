"""The mean-variance split residual: its formula, its mean, its prefix form, packed and padded sequences, decoding."""

import io

import pytest
import torch
from torch import Tensor, nn

from lightning_collapse.layers import MVSplitResidual

B, T, D = 3, 7, 5


def pair(length: int = T, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, f = torch.randn(2, B, length, D, generator=generator, dtype=torch.float64).add(2).to(dtype).unbind()
    return x, f


def layer(causal: bool = False, norm: bool = False, dtype: torch.dtype = torch.float64) -> MVSplitResidual:
    made = MVSplitResidual(D, causal, norm=norm).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for gate in made.parameters():
        gate.data.copy_(torch.randn(D, generator=generator))
    return made


def naive(of: MVSplitResidual, x: Tensor, f: Tensor, members: Tensor) -> Tensor:
    """``members[b, t, s]``: whether token s takes part in the means that token t sees."""
    rows = torch.empty_like(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            some = members[b, t]
            m_x, m_f = (z[b][some].mean(dim=0) if some.any() else torch.zeros(D) for z in (x, f))
            rows[b, t] = x[b, t] + of.beta * (f[b, t] - m_f) + of.alpha * (m_f - m_x)
    return rows / (rows.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() if of.norm else rows


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_value_and_gradient_are_the_reference(causal: bool, packed: bool, padded: bool, norm: bool) -> None:
    of = layer(causal, norm)
    x, f = (z.requires_grad_() for z in pair())
    # modalities that alternate, two documents, and one
    segments = torch.tensor([[1, 0, 1, 0, 0, 1, 1], [4, 4, 4, 9, 9, 9, 9], [0] * T]) if packed else None
    mask = torch.ones(B, T, dtype=torch.bool) if padded else None
    members = torch.ones(B, T, T, dtype=torch.bool)
    if segments is not None:
        members &= segments.unsqueeze(2) == segments.unsqueeze(1)
    if mask is not None:
        mask[0, :2] = mask[1, 3:] = False  # left padding, and a document of nothing else
        members &= mask.unsqueeze(1)
    if causal:
        members &= torch.ones(T, T, dtype=torch.bool).tril()
    out, expected = of(x, f, segments, mask), naive(of, x, f, members)
    torch.testing.assert_close(out, expected)
    leaves = [x, f, of.alpha, of.beta]
    for found, exact in zip(*(torch.autograd.grad(o.sin().sum(), leaves) for o in (out, expected)), strict=True):
        torch.testing.assert_close(found, exact)


def test_the_mean_moves_by_alpha_alone() -> None:
    of, (x, f) = layer(), pair()
    m_x, m_f = x.mean(dim=1), f.mean(dim=1)
    torch.testing.assert_close(of(x, f).mean(dim=1), (1 - of.alpha) * m_x + of.alpha * m_f, rtol=0, atol=1e-14)
    causal = layer(causal=True)
    prefixed = causal(x, f)
    torch.testing.assert_close(prefixed[:, -1], of(x, f)[:, -1], rtol=0, atol=1e-14)
    torch.testing.assert_close(prefixed[:, 0], (x + of.alpha * (f - x))[:, 0], rtol=0, atol=1e-14)
    assert (prefixed.mean(dim=1) - (1 - of.alpha) * m_x - of.alpha * m_f).abs().max() > 0.1


def test_start() -> None:
    of, (x, f) = MVSplitResidual(D, norm=False).double(), pair()
    torch.testing.assert_close(of(x, f), x + of.beta[0] * (f - f.mean(dim=1, keepdim=True)))
    assert of.alpha.tolist() == [0] * D
    assert of.beta.tolist() == pytest.approx([0.03] * D)
    nothing = MVSplitResidual(D, alpha=0.0, beta=0.0).double()
    torch.testing.assert_close(nothing(x, f), nn.functional.rms_norm(x, (D,), eps=1e-5))
    assert {name: p.shape for name, p in of.named_parameters()} == {"alpha": (D,), "beta": (D,)}


@pytest.mark.parametrize("prefill", [1, 17, 49])
def test_decoding_step_by_step_is_the_whole(prefill: int) -> None:
    of = layer(causal=True, norm=True, dtype=torch.float32)
    x, f = pair(50, torch.float32)
    mask = torch.ones(B, 50, dtype=torch.bool)
    mask[0, :9] = False
    whole = of(x, f, mask=mask)
    out, state = of.extend(x[:, :prefill], f[:, :prefill], mask=mask[:, :prefill])
    steps = [out]
    for t in range(prefill, 50):
        out, state = of.extend(x[:, t : t + 1], f[:, t : t + 1], state, mask=mask[:, t : t + 1])
        steps.append(out)
    assert state.shape == (B, 2 * D + 1)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-6)


def test_padding_may_hold_anything() -> None:
    of, (x, f) = layer(), pair()
    mask = torch.arange(T).expand(B, T) < 5
    expected = of(x[:, :5], f[:, :5])
    x[:, 5:], f[:, 5:] = torch.nan, torch.inf
    torch.testing.assert_close(of(x, f, mask=mask)[:, :5], expected)


def test_half_precision_sums_do_not_stall() -> None:
    ones = torch.ones(1, 1024, D, dtype=torch.bfloat16)
    of = MVSplitResidual(D, causal=True, alpha=1.0, beta=1.0, norm=False).bfloat16()
    assert torch.equal(of(2 * ones, ones), ones)  # 2 + (1 - 1) + (1 - 2)
    mixed = layer(norm=True, dtype=torch.float32)
    x, f = pair(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mixed(x, f.bfloat16()), mixed(x, f.bfloat16().float()), rtol=0, atol=0)


def test_a_document_in_a_pack_reads_what_it_reads_alone() -> None:
    """Behind a thousand tokens of a large mean, whose sum is taken off again."""
    of = layer(causal=True, dtype=torch.float32)
    x, f = pair(1030, torch.float32)
    x[:, :1000] += 1000
    segments = (torch.arange(1030) >= 1000).long().expand(B, -1)
    torch.testing.assert_close(of(x, f, segments)[:, 1000:], of(x[:, 1000:], f[:, 1000:]), rtol=0, atol=2e-6)


def test_meta_compile_and_state() -> None:
    with torch.device("meta"):
        of = MVSplitResidual(D, causal=True, beta=0.5)
    of.to_empty(device="cpu").reset_parameters()
    assert of.beta.tolist() == [0.5] * D
    x, f = pair(dtype=torch.float32)
    compiled = torch.compile(of, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, f), of(x, f))
    file = io.BytesIO()
    torch.save(of.state_dict(), file)
    assert repr(of) == "MVSplitResidual(dim=5, causal=True, norm=True, eps=1e-05)"


def test_bad_arguments() -> None:
    x, f = pair()
    with pytest.raises(ValueError, match=r"must have shape \(B, T, 5\), got \(3, 7, 5\) and \(3, 6, 5\). Flatten"):
        layer()(x, f[:, 1:])
    for name in ("segments", "mask"):
        with pytest.raises(ValueError, match=rf"`{name}` must have shape \(3, 7\), got \(3, 6\)"):
            layer()(x, f, **{name: torch.ones(3, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match="`extend` needs a layer of `causal=True`"):
        layer().extend(x, f)
    with pytest.raises(ValueError, match="`eps` must be positive, got 0"):
        MVSplitResidual(4, eps=0)
