"""Permutations without a random number generator."""

import torch

from lightning_collapse.losses import WMSE
from lightning_collapse.losses.support.shuffle import permutation

CPU = torch.device("cpu")


def test_every_index_once_and_another_order_each_time() -> None:
    orders = [permutation(257, torch.tensor(step), stream, CPU) for step in range(20) for stream in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(257))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert torch.equal(orders[4], permutation(257, torch.tensor(1), 1, CPU))


def test_every_index_goes_everywhere() -> None:
    steps, length = 4000, 8
    counts = torch.zeros(length, length)
    for step in range(steps):
        counts[torch.arange(length), permutation(length, torch.tensor(step), 0, CPU)] += 1
    # chi-squared with (length - 1)**2 degrees of freedom: mean 49, standard deviation 10
    chi_squared = ((counts - steps / length) ** 2 / (steps / length)).sum() * (length - 1) / length
    assert 15 < chi_squared < 90


def test_no_random_number_is_drawn() -> None:
    state = torch.get_rng_state()
    WMSE(sub_batch=16)(*torch.arange(256.0).sin().view(2, 64, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_it_shuffles_in_training_mode_only() -> None:
    loss, views = WMSE(sub_batch=16), torch.randn(2, 64, 4)
    first, second = loss(*views), loss(*views)
    assert not torch.equal(first, second)
    loss.eval()
    assert torch.equal(loss(*views), loss(*views))
    assert loss.step.item() == 2
    assert not loss.state_dict()


def test_a_compiled_loss_keeps_shuffling_in_one_graph() -> None:
    plain, views = WMSE(sub_batch=16), torch.randn(2, 64, 4, dtype=torch.float64)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(WMSE(sub_batch=16), backend=backend, fullgraph=True)
    for _ in range(4):
        torch.testing.assert_close(compiled(*views), plain(*views))
    assert len(graphs) == 1
