"""Losses, forward and backward, against the formula as published and against lightly's: in turn, in one process.

Run: ``python -m tests.benchmarks.losses [plain] [lightly]``; lightly is in the environment of ``make peers``, which
runs the second part. One of the plain ones is dearer than the plain form, for what that form lacks: MMCR has a
gradient where singular values vanish. KoLeo does not lose the nearest of two close rows to rounding, as both the plain
form and lightly's do. The covariance of VICReg has a script of its own.
"""

import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import tests.benchmarks.peers as comparison  # first: it lets torchvision load beside a CPU build of torch
from lightning_collapse.losses import (
    MMCR,
    WMSE,
    Alignment,
    BarlowTwins,
    CodingRate,
    KoLeo,
    SIGReg,
    Uniformity,
    VICReg,
    VISReg,
    barlow_twins_terms,
    coding_rate_loss,
    koleo_loss,
    ldreg_loss,
    mmcr_terms,
    sigreg_loss,
    uniformity_loss,
)

Loss = Callable[[Tensor], Tensor]
Sides = tuple[Loss, Loss, tuple[int, int], float]  # ours, the other, shape of the features, relative tolerance
DIRECTIONS = torch.nn.functional.normalize(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), dim=0)


def units(z: Tensor) -> Tensor:
    """Rows of length one."""
    return torch.nn.functional.normalize(z, dim=1)


def plain_uniformity(z: Tensor) -> Tensor:
    """With all distances."""
    return torch.pdist(units(z)).square().mul(-2).exp().mean().log()


def plain_sigreg(z: Tensor) -> Tensor:
    """With complex exponentials at all 17 knots."""
    knots = torch.linspace(-5, 5, 17)
    window = torch.exp(-knots.square() / 2)
    angles = (z @ DIRECTIONS).unsqueeze(2) * knots
    error = ((1j * angles).exp().mean(dim=0) - window).abs().square() * window
    return (torch.trapezoid(error, knots, dim=1) * len(z)).mean()


def plain_coding_rate(z: Tensor) -> Tensor:
    """With the ``D x D`` matrix."""
    rows = units(z)
    n, d = rows.shape
    rate: Tensor = torch.logdet(torch.eye(d) + d / (n * 0.2) * rows.T @ rows) / 2
    return -rate


def plain_mmcr(z: Tensor) -> Tensor:
    """With singular values that autograd differentiates."""
    first, second = (units(half) for half in z.chunk(2, dim=1))
    return -torch.linalg.svdvals((first + second) / 2).sum()


def plain_barlow_twins(z: Tensor) -> Tensor:
    """With the ``D x D`` cross-correlation."""
    first, second = (torch.nn.functional.batch_norm(half, None, None, training=True) for half in z.chunk(2, dim=1))
    correlation = first.T @ second / len(z)
    diagonal = correlation.diagonal()
    off = correlation.square().sum() - diagonal.square().sum()
    value: Tensor = (diagonal - 1).square().sum() + 0.0051 * off
    return value


def plain_koleo(z: Tensor) -> Tensor:
    """With the nearest by inner products, as in DINOv2."""
    rows = units(z)
    with torch.no_grad():
        products = rows @ rows.T
        nearest = products.fill_diagonal_(-1).argmax(dim=1)
    return -((rows - rows[nearest]).norm(dim=1) + 1e-8).log().mean()


def plain_ldreg(z: Tensor) -> Tensor:
    """With all distances, sorted."""
    ordered = torch.cdist(z, z.detach()).sort(dim=1).values
    mean, last = ordered[:, 1:64].mean(dim=1), ordered[:, 64]
    return -(mean / (last - mean)).log().mean()


def our_mmcr(z: Tensor) -> Tensor:
    """The term that counts by default."""
    first, second = z.chunk(2, dim=1)
    return mmcr_terms(first, second)["centroid"]


def our_barlow_twins(z: Tensor) -> Tensor:
    """Both terms, weighted."""
    first, second = z.chunk(2, dim=1)
    terms = barlow_twins_terms(first, second)
    return terms["invariance"] + 0.0051 * terms["redundancy"]


PAIRS: dict[str, Sides] = {
    "coding rate": (lambda z: coding_rate_loss(z), plain_coding_rate, (128, 1024), 1e-4),
    "SIGReg, 256 directions": (lambda z: sigreg_loss(z, DIRECTIONS), plain_sigreg, (512, 256), 1e-3),
    "uniformity": (lambda z: uniformity_loss(z), plain_uniformity, (1024, 512), 1e-4),
    "MMCR, two views": (our_mmcr, plain_mmcr, (512, 2 * 128), 1e-4),
    "Barlow Twins, two views": (our_barlow_twins, plain_barlow_twins, (128, 2 * 1024), 1e-4),
    "KoLeo": (lambda z: koleo_loss(z), plain_koleo, (1024, 256), 1e-4),
    "LDReg": (lambda z: ldreg_loss(z), plain_ldreg, (1024, 256), math.inf),  # it adds an eps
}


def of_views(loss: Callable[..., Tensor]) -> Loss:
    """Of a matrix whose halves are two views, each contiguous."""
    return lambda z: loss(*z.chunk(2))


def lightly_pairs() -> dict[str, Sides]:
    """Every loss that both have, with the same coefficients.

    lightly has no CorInfoMax, coding rate other than that of EMP-SSL, LDReg, INTL or floors under the spectrum; its
    contrastive and clustering losses, TiCo, FroSSL and others have no counterpart here.
    """
    theirs = comparison.peer("lightly.loss")
    modules = ("emp_ssl", "hypersphere", "lejepa", "visreg")  # what the package does not export, too
    emp_ssl, hypersphere, lejepa, visreg = (comparison.peer(f"lightly.loss.{name}_loss") for name in modules)
    mmcr, align, uniform = theirs.MMCRLoss(), Alignment(), Uniformity()
    sphere = hypersphere.HypersphereLoss(t=2.0)

    def their_mmcr(first: Tensor, second: Tensor) -> Tensor:
        """It wants rows of length one."""
        value: Tensor = mmcr(units(first).unsqueeze(1), units(second).unsqueeze(1))
        return value

    def their_visreg(z: Tensor) -> Tensor:
        """The three terms apart from that of the views."""
        value: Tensor = visreg.visreg_scale_loss(z) + visreg.visreg_shape_loss(z, 4096) + visreg.visreg_center_loss(z)
        return value

    def our_sphere(first: Tensor, second: Tensor) -> Tensor:
        return align(first, second) + (uniform(first) + uniform(second)) / 2

    vicreg = of_views(VICReg()), of_views(theirs.VICRegLoss())
    barlow_twins = of_views(BarlowTwins(redundancy=5e-3)), of_views(theirs.BarlowTwinsLoss())
    wmse = of_views(WMSE(sub_batch=256)), theirs.WMSELoss(embedding_dim=128, w_size=256)
    koleo = KoLeo(), theirs.KoLeoLoss()
    # as published the rate grows; `EMPSSLLoss` adds it with the opposite sign
    rate = CodingRate(), lambda z: -emp_ssl.tcr_loss(units(z).unsqueeze(0), 0.2)
    drawn = 0.05  # each side draws its own directions
    return {
        "VICReg, 256 x 2048": (*vicreg, (2 * 256, 2048), 1e-4),
        "VICReg, 256 x 256": (*vicreg, (2 * 256, 256), 1e-4),
        "Barlow Twins, 256 x 2048": (*barlow_twins, (2 * 256, 2048), 1e-4),
        "Barlow Twins, 256 x 256": (*barlow_twins, (2 * 256, 256), 1e-4),
        "Barlow Twins, 64 x 64": (*barlow_twins, (2 * 64, 64), 1e-4),
        "Barlow Twins, 1024 x 128": (*barlow_twins, (2 * 1024, 128), 1e-4),
        "W-MSE, 256 x 128": (*wmse, (2 * 256, 128), 1e-4),
        "MMCR, 256 x 128": (of_views(MMCR(local=5e-3)), of_views(their_mmcr), (2 * 256, 128), 1e-4),
        "alignment + uniformity, 512 x 128": (of_views(our_sphere), of_views(sphere), (2 * 512, 128), 1e-4),
        "coding rate, 256 x 1024": (*rate, (256, 1024), 1e-4),
        "coding rate, 1024 x 256": (*rate, (1024, 256), 1e-4),
        "KoLeo, 256 x 256": (*koleo, (256, 256), 1e-4),
        "KoLeo, 1024 x 256": (*koleo, (1024, 256), 1e-4),
        "KoLeo, 4096 x 256": (*koleo, (4096, 256), 1e-4),
        "SIGReg, 256 x 256, 1024 directions": (SIGReg(quadrature="package"), lejepa.SIGReg(), (256, 256), drawn),
        "VISReg, 256 x 128, 4096 directions": (VISReg(), their_visreg, (256, 128), drawn),
    }


def seconds(loss: Loss, features: Tensor) -> tuple[float, Tensor]:
    """Processor time of forward and backward, and the value."""
    leaf = features.detach().requires_grad_()
    start = time.process_time()
    value = loss(leaf)
    torch.autograd.backward(value)
    return time.process_time() - start, value.detach()


def compare(sides: Mapping[str, Sides], rounds: int = 15) -> None:
    """Print one line per loss: medians of both, and the median of the ratios of each round; values must agree."""
    for name, (ours, other, shape, tolerance) in sides.items():
        torch.manual_seed(0)
        features = torch.randn(shape)
        torch.testing.assert_close(seconds(ours, features)[1], seconds(other, features)[1], rtol=tolerance, atol=0)
        pairs = [(seconds(ours, features)[0], seconds(other, features)[0]) for _ in range(rounds)]
        both = [1000 * statistics.median(times) for times in zip(*pairs, strict=True)]
        ratios = sorted(a / b for a, b in pairs)
        print(
            f"{name:34s} {shape[0]:5d} x {shape[1]:<5d} {both[0]:8.1f} ms against {both[1]:8.1f} ms:"
            f" {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


def main(parts: Sequence[str]) -> None:
    """Compare with the formulas as published, and with lightly where it is installed."""
    torch.set_num_threads(1)
    if not parts or "plain" in parts:
        compare(PAIRS)
    if not parts or "lightly" in parts:
        if importlib.util.find_spec("lightly") is None:
            print("lightly is not installed, its losses are left out: `make peers` has an environment with it")
        else:
            compare(lightly_pairs())


if __name__ == "__main__":
    main(sys.argv[1:])
