"""Minimum spanning tree in a fixed number of vector operations, so that nothing waits for the device."""

import torch
from torch import Tensor


@torch.no_grad()
def minimum_spanning_tree(squares: Tensor) -> tuple[Tensor, Tensor]:
    """The edges of the minimum spanning tree of a complete graph, by the rounds of Boruvka.

    Every round joins each tree of the forest to its nearest other tree, so ``log2(N)`` rounds suffice, however the
    points lie. Edges are compared by their place in one stable sort: no two are equal, so no cycle closes, and points
    that coincide are joined by edges of length zero.

    Work ``O(N ** 2 log N)``, memory ``O(N ** 2)``.

    Args:
        squares: Distances, or any increasing function of them, shape ``(N, N)`` and symmetric; the diagonal is not
            read.

    Returns:
        The two ends of each edge, shape ``(N,)`` each. One of the ``N`` edges is none: its ends are equal.

    Example:
        >>> left, right = minimum_spanning_tree(torch.tensor([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 1.0, 0.0]]))
        >>> sorted((min(edge), max(edge)) for edge in zip(left.tolist(), right.tolist()) if edge[0] != edge[1])
        [(0, 1), (1, 2)]
    """
    points = len(squares)
    index = torch.arange(points, device=squares.device)
    ends = torch.triu_indices(points, points, 1, device=squares.device)
    order = squares[ends[0], ends[1]].argsort(stable=True)
    ends = ends[:, order]
    # place of the edge between any two points; `none` is larger than all
    none = ends.shape[1]
    places = torch.full((points, points), none, dtype=torch.long, device=squares.device)
    place = torch.arange(none, device=squares.device)
    places[ends[0], ends[1]] = place
    places[ends[1], ends[0]] = place
    ends = torch.cat([ends, ends.new_zeros(2, 1)], dim=1)
    tree_of = index
    edge_of = torch.full_like(index, none)
    rounds = (points - 1).bit_length()
    for _ in range(rounds):
        outside = torch.where(tree_of.unsqueeze(1) != tree_of, places, none).amin(dim=1)
        nearest = torch.full_like(index, none).scatter_reduce(0, tree_of, outside, "amin")
        found = nearest < none
        one, other = tree_of[ends[0, nearest]], tree_of[ends[1, nearest]]
        # of its two ends one is in the tree itself
        target = torch.where(found, one + other - index, index)
        # two trees that chose each other chose the same edge; the first of them stays as the root
        root = (target[target] == index) & (index <= target)
        edge_of = torch.where(found & ~root, nearest, edge_of)
        target = torch.where(root, index, target)
        for _ in range(rounds):
            target = target[target]
        tree_of = target[tree_of]
    return ends[0, edge_of], ends[1, edge_of]
