"""Selective scan: states of a diagonal linear recurrence at some places of a sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_collapse.spectral.deterministic import running_sum
from lightning_collapse.spectral.precision import full_precision

_ENTRIES = 1 << 22


@torch.no_grad()
@full_precision
def scan_states(steps: Tensor, rates: Tensor, inputs: Tensor, keys: Tensor, places: Sequence[int]) -> Tensor:
    r"""States :math:`h_t = e^{a \Delta_t} \odot h_{t-1} + u_t k_t^\top` from zero, of every head.

    The recurrence of Mamba (a head for each channel, a rate for each of its ``n`` numbers), Mamba-2 (one rate for a
    head) and RWKV-4 (steps of 1). A place beyond the end reads the sequence again from its beginning, as often as
    needed: what a layer comes to on longer text of the same kind.

    Args:
        steps: Step sizes :math:`\Delta`, shape ``(N, T, H)``.
        rates: Of decay :math:`a`, at most 0, shape ``(H, n)`` or ``(H, 1)``.
        inputs: What is written :math:`u`, shape ``(N, T, H, P)``.
        keys: Where to :math:`k`, shape ``(N, T, n)``, or ``(N, T, H, n)`` where heads differ.
        places: Numbers of tokens after which the state is asked for, ascending.

    Returns:
        Shape ``(N, len(places), H, P, n)``, at least ``float32``.

    Raises:
        ValueError: If places do not ascend from 1.

    References:
        Gu & Dao, *Mamba*, 2023, https://arxiv.org/abs/2312.00752; Dao & Gu, *Transformers are SSMs*, 2024,
        https://arxiv.org/abs/2405.21060.

    Example:
        >>> ones = torch.ones(1, 3, 1)
        >>> scan_states(ones, -torch.log(torch.tensor([[2.0]])), ones[..., None], ones, (1, 2, 6)).flatten()
        tensor([1.0000, 1.5000, 1.9688])
    """
    if not places or any(a >= b for a, b in zip((0, *places), places, strict=False)):
        raise ValueError(f"`places` must ascend from 1, got {tuple(places)}.")
    length, columns = steps.shape[1], inputs.shape[3] * keys.shape[-1]
    keys = keys.unsqueeze(2) if keys.ndim == 3 else keys
    chunk = max(_ENTRIES // (steps.shape[0] * steps.shape[2] * columns), 1)
    state = inputs.new_zeros(steps.shape[0], steps.shape[2], inputs.shape[3], keys.shape[-1])
    found, at = [], 0
    for place in places:
        while at < place:
            first = at % length
            last = min(first + chunk, first + place - at, length)
            within = running_sum(steps[:, first:last], dim=1)
            rest = within[:, -1:] - within  # from each token to the last of these
            fades = (rest.unsqueeze(3) * rates).exp()
            written = torch.einsum("bthn,bthp,bthn->bhpn", fades, inputs[:, first:last], keys[:, first:last])
            state = (within[:, -1].unsqueeze(2) * rates).exp().unsqueeze(2) * state + written
            at += last - first
        found.append(state)
    return torch.stack(found, dim=1)
