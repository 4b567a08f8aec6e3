"""Covariance term, forward and backward, against the plain ``D x D`` formulation: in turn, in one process, as ratios.

Run: ``python -m tests.benchmarks.vicreg_covariance``. Budget: at most 0.2 at 256 x 2048.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_collapse.losses import covariance_loss

SHAPES_AND_ROUNDS = {(256, 2048): 15, (128, 4096): 5, (256, 256): 101, (1024, 256): 51}


def plain(features: Tensor) -> Tensor:
    """The formula as written, with the view of the off-diagonal elements that public implementations use."""
    n, d = features.shape
    centered = features - features.mean(dim=0)
    covariance = centered.T @ centered / (n - 1)
    return covariance.flatten()[:-1].view(d - 1, d + 1)[:, 1:].square().sum() / d


def seconds(loss: Callable[[Tensor], Tensor], features: Tensor) -> tuple[float, Tensor]:
    """Processor time of forward and backward, and the gradient."""
    leaf = features.detach().requires_grad_()
    start = time.process_time()
    loss(leaf).backward()
    assert leaf.grad is not None
    return time.process_time() - start, leaf.grad


def main() -> None:
    """Print one line per shape: medians of both, and the median of the ratios of each round."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("   n x d        plain ms   ours ms   ours/plain")
    for (n, d), rounds in SHAPES_AND_ROUNDS.items():
        features = torch.randn(n, d)
        _, expected = seconds(plain, features)
        _, found = seconds(covariance_loss, features)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        pairs = [(seconds(plain, features)[0], seconds(covariance_loss, features)[0]) for _ in range(rounds)]
        both = [1000 * statistics.median(times) for times in zip(*pairs, strict=True)]
        ratio = statistics.median(ours / theirs for theirs, ours in pairs)
        print(f"{n:5d} x {d:<5d} {both[0]:12.2f} {both[1]:9.2f} {ratio:12.3f}")


if __name__ == "__main__":
    main()
