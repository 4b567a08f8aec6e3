"""What exact per-sample importances cost beside the passes that training makes over the same samples.

(a) ``diagonal_fisher`` with given labels over one plain forward and backward pass over the same batches, in processor
time on one thread. Both alternate in one process, so that what else the machine does meets both. Included are hooks,
the comparison of the rules with autograd on the first batch, and all that puts the model back.

(b) The same samples one by one, as a loop of batches of one would have it, over ``diagonal_fisher``.

(c) The gradient of ``EWC`` after one task over that of its formula by autograd, summed over named parameters.

(d) What ``SynapticIntelligence`` does in one optimizer step beside its pull, ``observe`` and ``after_step``, over a
plain loop over parameters: before the pull is added it keeps the gradient of the task, which the path is an integral
of, and after the step it adds their products. Below it the same loop without that copy, so that the path contains the
pull, as many have it.

In (c) and (d) calls alternate, 20 of one and 20 of the other, on weights with gradients that are there already.

Run: ``chrt -f 50 python -m tests.benchmarks.continual``, or without ``chrt`` where it is not allowed.
"""

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_collapse.penalties import EWC, SynapticIntelligence, diagonal_fisher
from tests.benchmarks.every_step import report

PAIRS, WARM_UP = 15, 2
BATCHES, ROWS = 16, 128
STEPS = 20
Batches = Iterable[tuple[Tensor, Tensor]]


def perceptron() -> nn.Module:
    """Van de Ven's model of split MNIST, https://arxiv.org/abs/2502.11756: two hidden layers of 400."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )


def convolutions() -> nn.Module:
    """Three blocks of two convolutions with batch normalization on images of 32 by 32."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        for channels in (before, after):
            layers += [nn.Conv2d(channels, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def plain(model: nn.Module, batches: Batches) -> None:
    """One forward and backward pass over every batch, in eval mode as the importances are."""
    model.eval()
    for x, y in batches:
        model.zero_grad()
        cross_entropy(model(x), y).backward()
    model.zero_grad()


def one_by_one(model: nn.Module, batches: Batches) -> None:
    """Squared gradients of batches of one, summed."""
    model.eval()
    totals = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in batches:
        for row, label in zip(x.split(1), y.split(1), strict=True):
            model.zero_grad()
            cross_entropy(model(row), label).backward()
            for total, parameter in zip(totals, model.parameters(), strict=True):
                if parameter.grad is not None:
                    total += parameter.grad.square()
    model.zero_grad()


def seconds(call: Callable[[], object]) -> float:
    """Processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def fisher(name: str, model: nn.Module, batches: list[tuple[Tensor, Tensor]], budget: float) -> None:
    """Print (a) and (b)."""
    ratios = []
    for _ in range(WARM_UP + PAIRS):
        exact = seconds(lambda: diagonal_fisher(model, batches, "empirical"))
        ratios.append(exact / seconds(lambda: plain(model, batches)))
    ratios = ratios[WARM_UP:]
    report(f"{name}: diagonal Fisher / forward and backward pass (budget {budget})", ratios)
    one = [slow / len(batches[0][1]) for slow in (seconds(lambda: one_by_one(model, batches[:1])) for _ in range(3))]
    faster = statistics.median(one) * sum(len(y) for _, y in batches) / exact
    print(f"{name}: a loop over single samples takes {faster:.1f} times as long")


def penalty_step(name: str, model: nn.Module, batch: tuple[Tensor, Tensor], budget: float) -> None:
    """Print (c)."""
    parameters = dict(model.named_parameters())
    penalty = EWC(1000.0, "empirical")
    penalty.start(parameters)
    penalty.consolidate(model, [batch])
    anchors = {n: p.detach().clone() for n, p in parameters.items()}
    fisher = {n: part.clone() for n, part in penalty.state["importance"].items()}
    plain(model, [batch])
    moved(parameters)

    def naive() -> None:
        terms = [(fisher[n] * (p - anchors[n]) ** 2).sum() for n, p in model.named_parameters()]
        (500.0 * torch.stack(terms).sum()).backward()

    check_equal(parameters, lambda: penalty.add_gradients(parameters), naive)
    ratios = alternating(lambda: penalty.add_gradients(parameters), naive)
    report(f"{name}: gradient of EWC / autograd of its formula (budget {budget})", ratios)


def path_step(name: str, model: nn.Module, budget: float) -> None:
    """Print (d)."""
    parameters = dict(model.named_parameters())
    penalty = SynapticIntelligence(1.0)
    penalty.start(parameters)
    moved(parameters)
    paths = {n: torch.zeros_like(p) for n, p in parameters.items()}
    past = {n: p.detach().clone() for n, p in parameters.items()}

    def ours() -> None:
        penalty.observe(parameters)
        penalty.after_step(parameters)

    @torch.no_grad()
    def add(gradients: dict[str, Tensor]) -> None:
        for n, p in model.named_parameters():
            if n in gradients:
                paths[n].sub_(gradients[n] * (p - past[n]))
                past[n].copy_(p)

    def found() -> dict[str, Tensor]:
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def loop() -> None:
        add({n: gradient.clone() for n, gradient in found().items()})

    report(f"{name}: path of SI / loop over parameters (budget {budget})", alternating(ours, loop))
    report(f"{name}: path of SI / loop that takes the pull for the task's", alternating(ours, lambda: add(found())))


@torch.no_grad()
def moved(parameters: dict[str, nn.Parameter]) -> None:
    """Away from the anchors, with gradients."""
    for parameter in parameters.values():
        parameter += 0.01 * torch.randn_like(parameter)
        parameter.grad = torch.randn_like(parameter)


def check_equal(parameters: dict[str, nn.Parameter], *calls: Callable[[], None]) -> None:
    """Both add the same to gradients."""
    found = []
    for call in calls:
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        call()
        found.append([p.grad for p in parameters.values()])
    torch.testing.assert_close(*found)


def alternating(ours: Callable[[], None], theirs: Callable[[], None]) -> list[float]:
    """Ratios of processor time."""
    ratios = []
    for _ in range(WARM_UP + PAIRS):
        first = seconds(lambda: [ours() for _ in range(STEPS)])
        ratios.append(first / seconds(lambda: [theirs() for _ in range(STEPS)]))
    return ratios[WARM_UP:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits = [(torch.randn(ROWS, 1, 28, 28), torch.randint(10, (ROWS,))) for _ in range(BATCHES)]
    fisher("MLP", perceptron(), digits, budget=2.0)
    images = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))) for _ in range(BATCHES // 2)]
    fisher("CNN", convolutions(), images, budget=2.5)
    for name, model, batch in (("MLP", perceptron(), digits[0]), ("CNN", convolutions(), images[0])):
        penalty_step(name, model, batch, budget=0.4)
        path_step(name, model, budget=1.0)
