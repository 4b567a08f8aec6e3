"""Transition of a gated recurrent cell: one step of it, and the matrix that a small change of its state is taken by."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from lightning_collapse.spectral.precision import accumulation_dtype

Cell = Literal["RNN_TANH", "RNN_RELU", "GRU", "LSTM"]


def cell_step(cell: Cell, weights: Sequence[Tensor | None], inputs: Tensor, state: Tensor) -> Tensor:
    """The next state of a cell of torch: of an LSTM the output and the cell state, joined.

    Args:
        cell: Its kind, as ``nn.RNNBase.mode`` has it.
        weights: Of inputs and of states, then the two biases or ``None`` for each, then for an LSTM with ``proj_size``
            its projection.
        inputs: Shape ``(I,)``.
        state: Shape ``(S,)``.

    Returns:
        Shape ``(S,)``.

    Example:
        >>> cell_step("RNN_RELU", (torch.eye(2), torch.eye(2), None, None), torch.tensor([1.0, -9.0]), torch.ones(2))
        tensor([2., 0.])
    """
    of_input, of_state, *rest = weights
    assert of_input is not None
    assert of_state is not None
    biases, projection = rest[:2], rest[2] if len(rest) > 2 else None
    width = of_state.shape[1]
    x, h = linear(inputs, of_input, biases[0]), linear(state[:width], of_state, biases[1])
    if cell == "GRU":
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3), h.chunk(3)
        keep = (xz + hz).sigmoid()
        return (1 - keep) * (xn + (xr + hr).sigmoid() * hn).tanh() + keep * state
    if cell == "LSTM":
        write, keep, new, read = (x + h).chunk(4)
        held = keep.sigmoid() * state[width:] + write.sigmoid() * new.tanh()
        output = read.sigmoid() * held.tanh()
        return torch.cat([output if projection is None else linear(output, projection), held])
    return (x + h).relu() if cell == "RNN_RELU" else (x + h).tanh()


def transition_matrix(cell: Cell, weights: Sequence[Tensor | None], inputs: Tensor, state: Tensor) -> Tensor:
    r"""Jacobian :math:`\partial h_{t+1} / \partial h_t` of a cell at one input and state.

    Its eigenvalues say how long the cell remembers, where weights alone do not: gates scale them. At zeros it is the
    recurrent weight of a plain network.

    Args:
        cell: Its kind.
        weights: As for :func:`cell_step`.
        inputs: Likewise.
        state: Likewise.

    Returns:
        Shape ``(S, S)``, in ``float64`` where the device has it.

    Example:
        >>> zeros = torch.zeros(6, 1), torch.zeros(6, 2), None, None
        >>> transition_matrix("GRU", zeros, torch.zeros(1), torch.zeros(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    dtype = accumulation_dtype(state.device)
    wide = [None if weight is None else weight.detach().to(dtype) for weight in weights]
    inputs, state = inputs.detach().to(dtype), state.detach().to(dtype)
    matrix: Tensor = torch.func.jacrev(lambda h: cell_step(cell, wide, inputs, h))(state)
    return matrix
