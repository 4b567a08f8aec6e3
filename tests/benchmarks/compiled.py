"""What watching a compiled model costs between points, in graphs, graph breaks and time.

Two copies of a transformer (four layers of width 128, 128 sequences of 16 tokens), compiled alike with Inductor, of
which one has the hooks of ``CollapseMonitor`` at its defaults; nothing is armed. Their training steps alternate, in
processor time on one thread; the ratio is that of each watched step to the mean of the unwatched ones beside it.

Run: ``python -m tests.benchmarks.compiled``.
"""

import copy
import statistics
import time
import warnings

import torch
from torch import Tensor, nn

from lightning_collapse.monitoring import FeatureHooks
from lightning_collapse.utilities import default_taps

STEPS, WARM_UP = 120, 5


class Block(nn.Module):
    """One layer, before its own norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Transformer(nn.Module):
    """Tokens to logits of the next ones."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Training:
    """Steps of one compiled model."""

    def __init__(self, model: nn.Module) -> None:
        self.call = torch.compile(model, fullgraph=True)
        self.optimizer = torch.optim.AdamW(model.parameters())
        self.x = torch.randint(100, (128, 16))

    def step(self) -> float:
        """Processor seconds of one step."""
        start = time.process_time()
        nn.functional.cross_entropy(self.call(self.x).flatten(0, 1), self.x.flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def main() -> None:
    """Print the ratio, and one of unwatched steps among themselves for the noise."""
    torch.manual_seed(0)
    plain = Transformer()
    watched = copy.deepcopy(plain)
    hooks = FeatureHooks(default_taps(watched))
    explained = torch._dynamo.explain(watched)(torch.randint(100, (128, 16)))
    torch.compiler.reset()
    pair = Training(watched), Training(plain)
    for _ in range(WARM_UP):
        for training in pair:
            training.step()
    times = [[training.step() for training in pair] for _ in range(STEPS)]
    hooks.remove()
    ratios = [2 * times[i][0] / (times[i - 1][1] + times[i][1]) for i in range(1, STEPS)]
    control = [2 * times[i][1] / (times[i - 1][1] + times[i + 1][1]) for i in range(1, STEPS - 1)]
    print(f"compiled transformer: {explained.graph_count} graph, {explained.graph_break_count} breaks while watched")
    for name, values in (("watched between points", ratios), ("control: unwatched steps", control)):
        print(f"{name}: median ratio {statistics.median(values):.4f} ({len(values)} steps)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main()
