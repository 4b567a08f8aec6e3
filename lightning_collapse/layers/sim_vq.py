"""SimVQ: a frozen codebook behind one linear map, so that every step moves every code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from lightning_collapse.layers.conversion import Start, convert_modules
from lightning_collapse.layers.reparametrized import Reparametrized
from lightning_collapse.layers.vector_quantizer import VectorQuantizer
from lightning_collapse.spectral.precision import full_precision
from lightning_collapse.utilities.arguments import check_layers, require_one_of
from lightning_collapse.utilities.modules import find_modules
from lightning_collapse.utilities.registry import register_layer

Init = Literal["identity", "published"]


@register_layer
class SimVQ(Reparametrized):
    r"""A codebook :math:`C W^\top + b` of frozen codes :math:`C` and one linear layer that is trained.

    Of a plain codebook a step moves the codes that were chosen; here it moves :math:`W`, and so all of them. What is
    converted is the table, ``nn.Embedding``: distances read ``codebook.weight`` and decoders look indices up, and both
    get the projected codes. (In the authors' code ``get_codebook_entry`` looks up those that are not.) Their loss is
    that of :class:`~lightning_collapse.layers.VectorQuantizer` at its defaults.

    Attributes:
        projection: :math:`W`, shape ``(D, D)``.
        shift: :math:`b`, shape ``(D,)``.

    References:
        Zhu et al., *Addressing Representation Collapse in Vector Quantized Models with One Linear Layer*, ICCV 2025.
        https://arxiv.org/abs/2411.02038, code at https://github.com/youngsheen/SimVQ.

    Example:
        >>> from lightning_collapse.layers import VectorQuantizer
        >>> quantizer = VectorQuantizer(codes=64, dim=8)
        >>> SimVQ.convert_(quantizer, init="published"), list(SimVQ.added_parameters(quantizer))
        (['codebook'], ['codebook.projection', 'codebook.shift'])
        >>> quantized, indices, loss = quantizer(torch.randn(5, 8))
        >>> torch.equal(quantized, quantizer.get_codebook_entry(indices))
        True
        >>> SimVQ.revert_(quantizer)  # a plain codebook of the projected codes
        ['codebook']
    """

    adds = ("projection", "shift")
    converts = "codebooks of vector quantizers"
    resists = "codes that are never chosen"
    cost = "a product of the codebook with a `D x D` matrix per pass; none after `revert_`"
    source = "Zhu et al. 2025, arXiv 2411.02038"
    projection: nn.Parameter
    shift: nn.Parameter

    @classmethod
    def convert_(
        cls,
        model: nn.Module,
        init: Init = "identity",
        codebooks: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> list[str]:
        """Convert codebooks in place, before the optimizer is made, and before ``fully_shard`` or DDP.

        Args:
            model: Changed in place.
            init: ``"identity"``: :math:`W = I`, :math:`b = 0` and the codes that there are, so that no output changes:
                for a codebook that is trained. ``"published"``: codes anew from a Gaussian of variance ``1 / D``, and
                :math:`W` and :math:`b` as a new ``nn.Linear`` has them: for training from the beginning.
            codebooks: Names of tables, or glob patterns, in quantizers of others; by default those of every
                :class:`~lightning_collapse.layers.VectorQuantizer`.
            exclude: Names of modules, or glob patterns of them, each with all inside it, that stay as they are.

        Returns:
            Names of the tables that were converted.

        Raises:
            ValueError: If an argument is wrong, or there is nothing to convert.
            ConversionError: If it is no ``nn.Embedding``, is not trained by the gradient (running means), or is cut to
                a ``max_norm``; and see :func:`~lightning_collapse.layers.convert_modules`.
        """
        require_one_of(get_args(Init), init=init)
        check_layers(codebooks, "those of every VectorQuantizer", "codebooks")
        if codebooks is None:
            tables: list[nn.Module] = [m.codebook for m in model.modules() if isinstance(m, VectorQuantizer)]
        else:
            tables = list(find_modules(model, codebooks).values())
        chosen, begun = {id(table) for table in tables}, []

        def start(table: Any) -> None:
            table.begin(init)
            begun.append(table)

        def look(name: str, module: nn.Module) -> Start | str | None:
            return (_why_no_codebook(module) or start) if id(module) in chosen else None

        names = convert_modules(model, cls, look, exclude=exclude)
        for table in begun:  # when nothing can fail any more
            table.raw.requires_grad_(False)
        return names

    @property
    def raw(self) -> Tensor:
        """The frozen codes, sharded if they are."""
        return self._parameters["weight"]  # type: ignore[return-value]

    @torch.no_grad()
    def begin(self, init: Init) -> None:
        """Add the linear map."""
        like, dim = self.raw, self.raw.shape[1]
        if init == "identity":
            projection, shift = torch.eye(dim, dtype=like.dtype, device=like.device), like.new_zeros(dim)
        else:
            like.normal_(std=dim**-0.5)
            projection, shift = (like.new_empty(shape).uniform_(-(dim**-0.5), dim**-0.5) for shape in ((dim, dim), dim))
        self.projection, self.shift = nn.Parameter(projection), nn.Parameter(shift)

    def effective(self, name: str, parameter: Tensor) -> Tensor:
        """All projected codes."""
        return _project(parameter, self.projection, self.shift).to(parameter.dtype)

    def forward(self, indices: Tensor) -> Tensor:
        """Projected codes ``(..., D)`` of indices ``(...)``."""
        codes = embedding(indices, self.raw)  # of the table itself, so that monitors know it
        return _project(codes, self.projection, self.shift).to(codes.dtype)

    def fold(self) -> None:
        """Have the table hold the projected codes, and be trained again."""
        super().fold()
        self.raw.requires_grad_(True)


def _why_no_codebook(module: nn.Module) -> str:
    if not isinstance(module, nn.Embedding):
        return f"it is a `{type(module).__name__}`, and no table of codes (`nn.Embedding`)"
    weight = module._parameters.get("weight")
    if weight is None or not weight.requires_grad:
        return "no gradient trains its codes: they are running means, or frozen already. Use a `VectorQuantizer`"
    return "its codes are cut to a `max_norm` where they are looked up. Leave that out" if module.max_norm else ""


@full_precision
def _project(codes: Tensor, projection: Tensor, shift: Tensor) -> Tensor:
    return linear(codes, projection, shift)
