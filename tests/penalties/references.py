"""What penalties are, in ``float64``, with every anchor of every task, of a linear softmax classifier."""

import torch
from torch import nn


def probabilities(theta, x):
    return torch.softmax(x @ theta["weight"].T + theta["bias"], dim=1)


def with_bias(x):
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def split(matrix):
    """A matrix over inputs and a one, as weight and bias."""
    return {"weight": matrix[:, :-1], "bias": matrix[:, -1]}


def squares(theta, anchor, importance):
    return sum((importance[name] * (theta[name] - anchor[name]) ** 2).sum() for name in theta)


def exact_fisher(theta, x):
    """E[p (1 - p) x^2]."""
    p = probabilities(theta, x)
    return split((p * (1 - p)).T @ with_bias(x) ** 2 / len(x))


class Reference:
    """A penalty that forgets nothing."""

    def __init__(self, weight):
        self.weight = weight
        self.tasks = []

    def start(self, theta):
        self.origin = {name: value.clone() for name, value in theta.items()}

    def step(self, gradient, before, after):
        pass

    def end(self, theta, x, y):
        raise NotImplementedError

    def value(self, theta):
        raise NotImplementedError


class EWCReference(Reference):
    def end(self, theta, x, y):
        self.tasks.append((dict(theta), exact_fisher(theta, x)))

    def value(self, theta):
        return self.weight / 2 * sum(squares(theta, anchor, fisher) for anchor, fisher in self.tasks)


class OnlineEWCReference(EWCReference):
    gamma = 0.7

    def value(self, theta):
        latest = self.tasks[-1][0] if self.tasks else None
        ages = range(len(self.tasks), 0, -1)
        return (
            self.weight
            / 2
            * sum(
                self.gamma**age * squares(theta, latest, fisher)
                for age, (_, fisher) in zip(ages, self.tasks, strict=True)
            )
        )


class KFACEWCReference(Reference):
    def end(self, theta, x, y):
        p, a = probabilities(theta, x), with_bias(x)
        self.tasks.append((dict(theta), a.T @ a / len(x), (torch.diag(p.sum(dim=0)) - p.T @ p) / len(x)))

    def value(self, theta):
        forms = []
        for _, inputs, gradients in self.tasks:
            latest = self.tasks[-1][0]
            parts = {n: theta[n] - latest[n] for n in theta}
            distance = torch.cat([parts["weight"], parts["bias"].unsqueeze(1)], dim=1).flatten()
            forms.append(distance @ torch.kron(gradients, inputs) @ distance)
        return self.weight / 2 * sum(forms)


class MASReference(Reference):
    def end(self, theta, x, y):
        outputs = x @ theta["weight"].T + theta["bias"]
        each = (2 * outputs.unsqueeze(2) * with_bias(x).unsqueeze(1)).abs()
        self.tasks.append((dict(theta), split(each.mean(dim=0))))

    def value(self, theta):
        return self.weight * sum(squares(theta, self.tasks[-1][0], importance) for _, importance in self.tasks)


class SynapticIntelligenceReference(Reference):
    damping = 0.1

    def start(self, theta):
        super().start(theta)
        self.path = {name: [] for name in theta}

    def step(self, gradient, before, after):
        for name, path in self.path.items():
            path.append(-gradient[name] * (after[name] - before[name]))

    def end(self, theta, x, y):
        importance = {
            name: torch.stack(path).sum(dim=0).relu() / ((theta[name] - self.origin[name]) ** 2 + self.damping)
            for name, path in self.path.items()
        }
        self.tasks.append((dict(theta), importance))
        self.start(theta)

    def value(self, theta):
        return self.weight * sum(squares(theta, self.tasks[-1][0], importance) for _, importance in self.tasks)


class RWalkReference(Reference):
    alpha, every, epsilon = 0.9, 3, 1e-3

    def __init__(self, weight):
        super().__init__(weight)
        self.window, self.fisher, self.past = [], None, None

    def step(self, gradient, before, after):
        self.window.append((gradient, before, after))
        if len(self.window) == self.every:
            self.close()

    def start(self, theta):
        self.score = {name: torch.zeros_like(value) for name, value in theta.items()}

    def close(self):
        for name, score in self.score.items():
            square = torch.stack([g[name] ** 2 for g, _, _ in self.window]).mean(dim=0)
            drop = sum(g[name] * (before[name] - after[name]) for g, before, after in self.window)
            way = self.window[-1][2][name] - self.window[0][1][name]
            self.fisher = self.fisher or {}
            fisher = self.fisher.get(name, square)
            score += (drop / (fisher * way**2 / 2 + self.epsilon)).relu()
            self.fisher[name] = (1 - self.alpha) * fisher + self.alpha * square
        self.window = []

    def end(self, theta, x, y):
        if self.window:
            self.close()
        self.past = {n: s if self.past is None else (self.past[n] + s) / 2 for n, s in self.score.items()}
        ranged = []
        for table in (self.fisher, self.past):
            everything = torch.cat([value.flatten() for value in table.values()])
            low, high = everything.min(), everything.max()
            ranged.append({name: (value - low) / (high - low) for name, value in table.items()})
        self.tasks = [(dict(theta), {name: ranged[0][name] + ranged[1][name] for name in theta})]
        self.start(theta)

    def value(self, theta):
        return self.weight * sum(squares(theta, *task) for task in self.tasks)


class L2InitReference(Reference):
    def end(self, theta, x, y):
        pass

    def value(self, theta):
        return self.weight * sum(((theta[name] - self.origin[name]) ** 2).sum() for name in theta)


class L2SPReference(L2InitReference):
    def value(self, theta):
        old = ((theta["weight"] - self.origin["weight"]) ** 2).sum()
        return self.weight / 2 * old + 0.05 / 2 * (theta["bias"] ** 2).sum()


class SoftOrthogonalityReference(L2InitReference):
    def value(self, theta):
        gram = theta["weight"] @ theta["weight"].T  # 3 rows of 6
        return self.weight * ((gram - torch.eye(3)) ** 2).sum() + 0.0 * theta["bias"].sum()


class RankOneEWCReference(Reference):
    def end(self, theta, x, y):
        errors = probabilities(theta, x) - nn.functional.one_hot(y, 3)
        gradients = errors.unsqueeze(2) * with_bias(x).unsqueeze(1)
        mean = gradients.mean(dim=0)
        coefficient = (gradients * mean).sum(dim=(1, 2)).square().mean() / mean.square().sum() ** 2
        self.tasks.append((dict(theta), split(mean), coefficient))

    def value(self, theta):
        along = [
            c * sum((mean[name] * (theta[name] - anchor[name])).sum() for name in theta) ** 2
            for anchor, mean, c in self.tasks
        ]
        return self.weight / 2 * sum(along)


def softmax_regression():
    """The model that references know, in ``float64``."""
    torch.manual_seed(0)
    return nn.Linear(6, 3, dtype=torch.float64)


def task(index, n=48, dtype=torch.float64):
    """Samples and labels of a task."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64)).argmax(dim=1)
    return x.to(dtype), y
