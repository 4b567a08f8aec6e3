"""Orthogonal gradient descent (OGD): updates are orthogonal to the gradients of what old samples were told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_collapse.penalties.support.fisher_pass import FisherPass, Outputs
from lightning_collapse.penalties.support.output_gradients import Columns
from lightning_collapse.projections.base import UpdateProjection, raise_together
from lightning_collapse.spectral.precision import accumulation_dtype
from lightning_collapse.spectral.row_space import row_space
from lightning_collapse.utilities.arguments import require_whole
from lightning_collapse.utilities.distributed import all_gather_rows, from_first_process
from lightning_collapse.utilities.loaders import Loader
from lightning_collapse.utilities.module_tree import clean_name
from lightning_collapse.utilities.private_torch import foreach
from lightning_collapse.utilities.targets import targets_of

RESOLUTION = 1e-6
"""Directions that are shorter beside the longest are rounding."""


class OGD(UpdateProjection):
    r"""Keeps an orthonormal basis of gradients of old outputs with respect to all parameters [1].

    Of every sample that is read the gradient of the output of its class is kept (OGD-GTL, the authors' choice), of
    samples without a class that of the largest output. Updates are projected off all of them, so that these outputs do
    not change to first order. Nothing is frozen.

    Memory is the number of parameters times that of directions: for small networks, in one optimizer and not sharded.

    Args:
        n_samples: How many samples of a task are kept; 200 in [1].
        max_directions: How many of all tasks; later samples are left out.

    Raises:
        ValueError: If an argument is no positive integer.

    References:
        [1] Farajtabar et al., *Orthogonal Gradient Descent for Continual Learning*, AISTATS 2020.
        https://arxiv.org/abs/1910.07104

    Example::

        trainer = Trainer(callbacks=[Projection(OGD(n_samples=100))])
    """

    joint = True

    def __init__(self, n_samples: int = 200, max_directions: int = 1000) -> None:
        super().__init__(n_samples)
        require_whole(1, max_directions=max_directions)
        self.max_directions = max_directions
        self.bases: dict[str, Tensor] = {}  # rows of a parameter, (numbers, directions)

    @override
    def _cover(self, model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, parameter in named.items():
            if hasattr(parameter, "full_tensor"):
                raise ValueError(f"`{name}` is sharded, and `OGD` needs whole gradients. Use `GPM`, or DDP.")
            if self.bases and len(self.bases.get(name, ())) != parameter.numel():
                raise ValueError(f"`{name}` has another size than when a task was learned. Begin with a new `OGD`.")
        if not named:
            raise ValueError("no parameter is trained.")
        return dict(named)

    @override
    def learn(self, model: nn.Module, loader: Loader, outputs: Outputs | None = None) -> None:
        over = FisherPass(model, loader, outputs, n_samples=self.n_samples)
        over.parameters = {n: p for n, p in over.parameters.items() if clean_name(n) in self.parameters}
        zeros, count = {name: zero.flatten().unsqueeze(0) for name, zero in over.zeros().items()}, 0
        found = [torch.cat(list(zeros.values()), dim=1)[:0]]
        problem = None
        try:
            with over.engine() as engine:
                for batch, values, rows in over.each(engine.forward):
                    columns = engine.by_rule(values, _told(values, batch), rows)
                    parts = {name: g.rows(0, rows).flatten(1) for of in columns for name, g in of}
                    whole = [parts.get(name, zero.expand(rows, -1)) for name, zero in zeros.items()]
                    found.append(torch.cat(whole, dim=1))
                    count += rows
        except Exception as error:
            problem = error
        raise_together(problem, over.device)
        if slow := [name for name, method in over.agreed(engine.methods).items() if method in ("vmap", "loop")]:
            raise ValueError(f"no gradients of single samples are known of {slow}. Leave them out with `layers=[...]`")
        over.reduced([], count)
        gathered, mask = all_gather_rows(torch.cat(found))
        names = [clean_name(name) for name in zeros]
        known = torch.cat([self.bases[name] for name in names]) if self.bases else gathered.T[:, :0]
        basis = self._extended(known.to(gathered), gathered[mask])
        sizes = [zero.numel() for zero in zeros.values()]
        self.bases = dict(zip(names, torch.split(basis, sizes), strict=True))
        self.learned += 1

    @override
    @torch.no_grad()
    def project_(self, now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        names = [name for name in now if name in self.bases]
        if not names:
            return
        moved = [now[name] for name in names]
        self.bases |= {name: self.bases[name].to(now[name]) for name in names}
        bases = [self.bases[name] for name in names]
        backward = [before[name] for name in names]
        foreach.sub_(backward, moved)
        along = torch.stack([c.flatten() @ b for c, b in zip(backward, bases, strict=True)]).sum(dim=0)
        for weight, basis in zip(moved, bases, strict=True):
            weight.add_((basis @ along).view(weight.shape))

    @override
    def readings(self) -> dict[str, dict[str, float]]:
        size = sum(map(len, self.bases.values()))
        rank = next(iter(self.bases.values())).shape[1] if size else 0
        return {"all": {"rank": float(rank), "capacity_left": 1.0 - rank / max(size, 1)}}

    @override
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.parameters.values()) * (self.max_directions + 2)

    @override
    def state_dict(self) -> dict[str, Any]:
        bases = {name: basis.to("cpu", copy=True) for name, basis in self.bases.items()}
        return {"learned": self.learned, "bases": bases}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.learned = state_dict["learned"]
        self.bases = {name: basis.clone() for name, basis in state_dict["bases"].items()}

    def _extended(self, basis: Tensor, rows: Tensor) -> Tensor:
        """An orthonormal basis of old directions and new rows, the same on every process."""
        rows = rows[rows.isfinite().all(dim=1)][: max(self.max_directions - basis.shape[1], 0)]
        double = accumulation_dtype(rows.device)
        length = torch.linalg.matrix_norm(rows.to(double)) if len(rows) else 1.0
        union = torch.cat([basis.T.to(double) * length, rows.to(double)])
        joined = row_space(union, RESOLUTION / max(union.shape)) if len(union) else union.T
        return from_first_process(joined[:, joined.any(dim=0)].to("cpu", basis.dtype)).to(basis.device)


def _told(outputs: Tensor, batch: Any) -> Columns:
    """One for every sample at the output of its class."""
    flat, labels = outputs.detach().flatten(1), targets_of(batch)
    known = (
        labels is not None and not labels.is_floating_point() and labels.shape == flat.shape[:1] and outputs.ndim == 2
    )
    at = labels.to(flat.device).clamp(0, flat.shape[1] - 1) if known and labels is not None else flat.argmax(dim=1)
    column = torch.zeros_like(flat, dtype=torch.promote_types(flat.dtype, torch.float32)).scatter_(1, at[:, None], 1.0)
    return Columns(1, lambda _: column.view(outputs.shape).clone())
