"""Attention projections: which rows of which weights make the queries and the keys of each head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_collapse.utilities.module_tree import is_transposed, named_modules, own_weight
from lightning_collapse.utilities.modules import clean_name
from lightning_collapse.utilities.parameters import why_no_number

_PAIRS = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("to_q", "to_k"),
    ("wq", "wk"),
    ("w_q", "w_k"),
    ("q", "k"),
    ("q_lin", "k_lin"),
    ("q_linear", "k_linear"),
    ("linear_q", "linear_k"),
    ("query_proj", "key_proj"),
)
_FUSED = ("qkv", "qkv_proj", "to_qkv", "wqkv", "c_attn", "in_proj", "attn_qkv")
_PACKED = ("query_key_value",)
_LATENT = re.compile(r"^(w?kv|q)_(a|b|down|up|lora)(_|$)|^w?kv_a_proj|compress")
_OF_QUERY = re.compile(r"(^|_)q(uery|ueries)?(_|(layer)?norm|$)")
_BETWEEN = {"q", "k", "qk", "query", "key", "queries", "keys"}


class Part(NamedTuple):
    """Outputs of a projection, as a slice of its weight.

    Attributes:
        weight: The parameter.
        bias: The parameter, if there is one.
        transposed: Whether outputs are columns of the weight, as in Hugging Face's ``Conv1D``.
        first: Where they begin.
        size: How many there are.
    """

    weight: Tensor
    bias: Tensor | None
    transposed: bool
    first: int
    size: int

    @property
    def rows(self) -> Tensor:
        """The part of the weight, ``(size, d)``, in the same memory."""
        weight = self.weight.detach().mT if self.transposed else self.weight.detach()
        return weight[self.first : self.first + self.size]

    @property
    def offset(self) -> Tensor | None:
        """The part of the bias, ``(size,)``, in the same memory."""
        return None if self.bias is None else self.bias.detach()[self.first : self.first + self.size]

    def heads(self, number: int) -> Tensor:
        """The part of the weight by head, ``(number, d, size / number)``."""
        return self.rows.reshape(number, -1, self.rows.shape[1]).mT

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply the outputs of every head by a factor of its own, ``(number,)``; by 1 changes no bit."""
        rows = factors.repeat_interleave(self.size // len(factors)).to(self.weight.dtype)
        self.rows.mul_(rows.unsqueeze(1))
        if self.offset is not None:
            self.offset.mul_(rows)


@dataclass(frozen=True)
class AttentionProjections:
    """The projections of one attention module.

    Attributes:
        name: Of the module.
        module: The module.
        query: Name of the submodule that makes queries, empty for the module itself.
        key: Name of the submodule that makes keys; the same where one makes both, and values.
        reason: Why logits do not scale with these weights; empty if they do.
        query_norm: Name of the submodule that normalizes queries after their projection, empty if there is none.
    """

    name: str
    module: nn.Module
    query: str = ""
    key: str = ""
    reason: str = ""
    query_norm: str = ""

    @property
    def weights(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameter that makes queries and that which makes keys; one and the same where it makes both."""
        module: Any = self.module
        if not isinstance(module, nn.MultiheadAttention):
            query, key = (module.get_submodule(name).weight for name in (self.query, self.key))
        elif module.in_proj_weight is not None:
            query = key = module.in_proj_weight
        else:
            query, key = module.q_proj_weight, module.k_proj_weight
        return query, key

    def parts(self, heads: int, width: int | None = None) -> tuple[Part, Part]:
        """What makes the queries of ``heads`` heads of this width, and what makes the keys.

        Without a width it is that of as many heads as the queries have; one projection of all three makes as many keys.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if isinstance(self.module, nn.MultiheadAttention):
            return _of_multi_head(self.module)
        if self.query == self.key:
            weight, bias, transposed = _matrix(self.module.get_submodule(self.query))
            outputs = weight.shape[1 if transposed else 0]
            width = outputs // (3 * heads) if width is None else width
            size = heads * width
            keys, rest = divmod(outputs - size, 2)
            if rest or not _fits(size, keys, width):
                raise ValueError(f"`{self.query}` has {outputs} outputs for {heads} heads of width {width}")
            return Part(weight, bias, transposed, 0, size), Part(weight, bias, transposed, size, keys)
        query, key = (_matrix(self.module.get_submodule(name)) for name in (self.query, self.key))
        queries, keys = (weight.shape[1 if transposed else 0] for weight, _, transposed in (query, key))
        width = queries // heads if width is None else width
        if queries != heads * width or not _fits(queries, keys, width):
            raise ValueError(
                f"`{self.query}` and `{self.key}` have {queries} and {keys} outputs for {heads} heads of width {width}"
            )
        return Part(*query, 0, queries), Part(*key, 0, keys)


def find_projections(root: nn.Module) -> list[AttentionProjections]:
    """Every module that projects queries and keys, by the names that models have for it.

    Found are ``nn.MultiheadAttention``, one projection of queries, keys and values in this order (timm's ``qkv``,
    GPT-2's ``c_attn``), and separate ones (``q_proj``, ``query``, ``to_q`` ...). A reason stands with those whose
    logits are not what the product of these weights makes.

    Example:
        >>> attention = nn.Module()
        >>> attention.q_proj, attention.k_proj = nn.Linear(8, 8), nn.Linear(8, 4)
        >>> [found] = find_projections(nn.Sequential(attention))
        >>> found.name, found.key, [part.size for part in found.parts(heads=4, width=2)]
        ('0', 'k_proj', [8, 4])
    """
    found: list[AttentionProjections] = []
    seen: set[int] = set()
    for name, module in named_modules(root):
        projections = None if id(module) in seen else _look(clean_name(name), module)
        if projections is not None:
            seen.add(id(module))
            found.append(projections)
    return found


def _look(name: str, module: nn.Module) -> AttentionProjections | None:
    if isinstance(module, nn.MultiheadAttention):
        weights = [module.in_proj_weight] if module.in_proj_weight is not None else []
        weights = weights or [module.q_proj_weight, module.k_proj_weight]
        reasons = [_unusable(weight) for weight in weights]
        if not all(isinstance(weight, nn.Parameter) for weight in weights):
            reasons.append("its weights are computed from others")
        return AttentionProjections(name, module, reason=next(filter(None, reasons), ""))
    kids = {child.lower(): child for child, _ in module.named_children()}
    fused = next((kids[child] for child in _FUSED if child in kids), None)
    pair = next(((kids[q], kids[k]) for q, k in _PAIRS if q in kids and k in kids), None)
    latent = [kids[child] for child in kids if _LATENT.search(child)]
    packed = [kids[child] for child in _PACKED if child in kids]
    if latent and _makes(module, latent[0]):
        why = f"`{latent[0]}` makes keys by way of a latent that all heads share (multi-head latent attention)"
        return AttentionProjections(name, module, reason=why)
    if packed:
        return AttentionProjections(name, module, reason=f"the order of heads in `{packed[0]}` is not known")
    if pair is None and fused is None:
        return None
    query, key = pair or (fused or "", fused or "")
    if not (_makes(module, query) and _makes(module, key)):
        return None
    reasons = [_unusable(own_weight(module.get_submodule(child))) for child in (query, key)]
    between = [child for child, kid in module.named_children() if _is_norm_between(child, kid)]
    if between:
        reasons.insert(0, f"`{between[0]}` stands between the projection and the product")
    if any(_is_computed(module.get_submodule(child)) for child in (query, key)):
        reasons.insert(len(between[:1]), f"the weight of `{query}` is computed from others")
    of_query = next((child for child in between if _OF_QUERY.search(child.lower())), "")
    return AttentionProjections(name, module, query, key, next(filter(None, reasons), ""), of_query)


def _makes(module: nn.Module, child: str) -> bool:
    """Whether a child is a projection: it has one, or wraps one."""
    kid = module.get_submodule(child)
    return isinstance(kid, nn.Linear) or is_transposed(kid) or isinstance(getattr(kid, "base_layer", None), nn.Module)


def _is_computed(kid: nn.Module) -> bool:
    """Whether the weight is no parameter, or another tensor is read in its place."""
    return dict(kid.named_parameters(recurse=False)).get("weight") is not own_weight(kid) or own_weight(kid) is None


def _is_norm_between(name: str, kid: nn.Module) -> bool:
    words = set(re.split(r"[_.]", name.lower()))
    is_norm = "norm" in type(kid).__name__.lower()
    named = bool(words & _BETWEEN) or bool(re.match(r"(q|k|qk)(_?)(layer)?norm", name.lower()))
    return is_norm and named


def _unusable(weight: Any) -> str:
    if not isinstance(weight, Tensor):
        return "a weight is no tensor"
    if hasattr(weight, "to_local"):
        return "its weights are sharded (DTensor)"
    no_number = why_no_number(weight)
    return f"its weights are {no_number}" if no_number else ""


def _matrix(projection: nn.Module) -> tuple[Tensor, Tensor | None, bool]:
    weight: Any = projection.weight
    bias: Any = getattr(projection, "bias", None)
    return weight, bias, is_transposed(projection)


def _fits(queries: int, keys: int, width: int) -> bool:
    return width > 0 and 0 < keys <= queries and keys % width == 0 and queries % keys == 0


def _of_multi_head(module: nn.MultiheadAttention) -> tuple[Part, Part]:
    size, bias = module.embed_dim, module.in_proj_bias
    if module.in_proj_weight is not None:
        weight = module.in_proj_weight
        return Part(weight, bias, False, 0, size), Part(weight, bias, False, size, size)
    # biases are one tensor all the same: parts of weight and bias begin at different places
    query = Part(module.q_proj_weight, None if bias is None else bias[:size], False, 0, size)
    key = Part(module.k_proj_weight, None if bias is None else bias[size : 2 * size], False, 0, size)
    return query, key
