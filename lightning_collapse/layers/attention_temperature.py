"""Attention temperature (TempScale): logits of self-attention are divided by a temperature before the softmax."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_collapse.layers.conversion import Start, chosen_modules, convert_modules, unreadable
from lightning_collapse.layers.reparametrized import Reparametrized
from lightning_collapse.utilities.arguments import require_finite, require_positive
from lightning_collapse.utilities.attention_projections import AttentionProjections, find_projections
from lightning_collapse.utilities.module_tree import is_transposed
from lightning_collapse.utilities.registry import register_layer

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_head")
_TABLE = "relative_attention_bias"
_ADDED = re.compile(r"rel(ative)?_?(pos|position|attention)\w*bias|bias_table|^[qv]_bias$")
_CROSS = re.compile(r"cross|encdec|enc_dec|encoder_attn")
_DECODER = re.compile(r"(?<!Encoder)Decoder(Layer|Block)?$")
_MASKS = ("bias", "mask", "causal_mask", "tril")
_TO_ASK = "`decoders=True` converts it all the same"


@register_layer
class AttentionTemperature(Reparametrized):
    r"""What makes the queries of self-attention, divided by a temperature :math:`\tau`.

    .. math:: A = \operatorname{softmax}\Big(\frac{Q K^\top}{\tau \sqrt d}\Big)

    Attention is a low-pass filter over tokens, the more so the longer the text, and embeddings of long texts become
    alike; below 1 the temperature weakens that without training. It is put on the rows of the weight and bias that make
    queries, or on the gain and bias of a norm that follows them, so fused attention kernels stay as they are, and
    :meth:`revert_` writes it into these.

    The published claim is about encoders: decoders and cross-attention are refused unless asked for. A causal mask that
    only the forward pass knows is not seen here.

    Attributes:
        tau: τ, shape ``(1,)``: a parameter if it is learned, else a buffer.

    References:
        Zhou et al., *Length-Induced Embedding Collapse in PLM-based Models*, ACL 2025.
        https://arxiv.org/abs/2410.24200, code at https://github.com/Yuqi-Zhou/Length_Collapse; 0.5 to 0.8 there.

    Example:
        >>> encoder = nn.TransformerEncoderLayer(8, nhead=2, batch_first=True)
        >>> AttentionTemperature.convert_(encoder, tau=0.7)
        ['self_attn']
        >>> AttentionTemperature.revert_(encoder)
        ['self_attn']
    """

    adds = ("tau", "queries", "columns")
    converts = "what makes queries of self-attention"
    resists = "embeddings of long inputs becoming alike"
    cost = "a product with the weight per pass; none after `revert_`"
    source = "Zhou et al. 2025, arXiv 2410.24200"
    tau: Tensor
    queries: int
    columns: bool

    @classmethod
    def convert_(
        cls,
        model: nn.Module,
        tau: float = 1.0,
        learn: bool = False,
        decoders: bool = False,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> list[str]:
        """Convert in place what makes queries, found by the names that models have for it.

        ``nn.MultiheadAttention``, one projection of queries, keys and values in this order (timm's ``qkv``), separate
        ones (``q_proj``, ``query``, ``to_q`` ...), and norms of queries. Of T5 the position bias is converted with
        them.

        Args:
            model: Changed in place.
            tau: Of all of them, above 0; 1 changes nothing.
            learn: Whether each is a parameter, which an optimizer made later trains.
            decoders: Whether causal and cross-attention is meant too.
            include: Names of modules, or glob patterns of them, each with all inside it; all by default.
            exclude: The same, of those that stay as they are.

        Returns:
            Names of the modules that were converted.

        Raises:
            ValueError: If an argument is wrong, or there is nothing to convert.
            ConversionError: If attention is one of a decoder, or its logits do not scale with these weights.
        """
        require_positive(tau=tau)
        require_finite(tau=tau)
        chosen = {id(module) for _, module in chosen_modules(model, include, exclude)}
        targets = _targets(model, partial(_start, tau=tau, learn=learn), learn, decoders, chosen)
        return convert_modules(model, cls, lambda _, module: targets.get(id(module)), include, exclude)

    def effective(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter with the part that makes queries divided by τ."""
        axis = -1 if self.columns else 0
        outputs = parameter.shape[axis]
        inverse = 1 / self.tau.to(parameter.dtype)
        rest = inverse.new_ones(max(outputs - self.queries, 0))
        factors = torch.cat([inverse.expand(outputs - len(rest)), rest])
        return parameter * (factors if self.columns else factors.view(-1, *[1] * (parameter.ndim - 1)))


def _start(layer: Any, queries: int, columns: bool, tau: float, learn: bool) -> None:
    layer.queries, layer.columns = queries, columns
    value = next(layer.parameters()).detach().new_full((1,), tau)
    if learn:
        layer.tau = nn.Parameter(value)
    else:
        layer.register_buffer("tau", value)


def _targets(model: nn.Module, start: Any, learn: bool, decoders: bool, chosen: set[int]) -> dict[int, Start | str]:
    """By identity, the modules whose parameters are divided, and how, or why they cannot be."""
    found: dict[int, Start | str] = {}
    everyone = find_projections(nn.ModuleList([model]))  # it may be attention itself
    decoding = {id(m) for part in model.modules() if _DECODER.search(type(part).__name__) for m in part.modules()}
    for projections in everyone:
        module = projections.module
        reason = "" if decoders else _why_no_encoder(projections, id(module) in decoding)
        try:
            target, queries = _target(projections)
        except ValueError as error:
            target, queries, reason = module, 0, reason or str(error)
        table = getattr(module, _TABLE, None)
        if isinstance(table, nn.Embedding):
            reason = reason or _why_not_all(projections, everyone, learn, chosen)
            found[id(table)] = reason or partial(start, queries=table.num_embeddings, columns=False)
        found[id(target)] = reason or partial(start, queries=queries, columns=is_transposed(target))
    return found


def _why_not_all(projections: AttentionProjections, everyone: Sequence[Any], learn: bool, chosen: set[int]) -> str:
    """Why the position bias of a stack, which its first layer makes for all, cannot be divided."""
    stack = re.split(r"(?<=.)\.\d+(?:\.|$)", projections.name.removeprefix("0."))[0]
    others = [p for p in everyone if p.name.removeprefix("0.").startswith(stack) and hasattr(p.module, f"has_{_TABLE}")]
    if learn:
        return f"its `{_TABLE}` is added to logits of several layers, and cannot follow a τ of each. Leave `learn` out"
    left = [p.name.removeprefix("0.") for p in others if id(p.module) not in chosen]
    return f"its `{_TABLE}` is added to the logits of `{left[0]}` too. Convert all layers or none" if left else ""


def _why_no_encoder(projections: AttentionProjections, decoding: bool) -> str:
    module: Any = projections.module
    last = ".".join(projections.name.lower().split(".")[-2:])
    other = isinstance(module, nn.MultiheadAttention) and {module.kdim, module.vdim} != {module.embed_dim}
    if _CROSS.search(last) or other or getattr(module, "is_cross_attention", False) is True:
        return f"it is cross-attention. {_TO_ASK}"
    parts = (module, getattr(module, "config", None))
    flagged = any(getattr(part, flag, False) is True for part in parts for flag in ("is_causal", "is_decoder"))
    if decoding or flagged or any(name in _MASKS for name, _ in module.named_buffers(recurse=False)):
        return f"it is part of a decoder. {_TO_ASK}"
    return ""


def _target(projections: AttentionProjections) -> tuple[nn.Module, int]:
    """The module whose parameters make the queries, and how many of its outputs are queries.

    Raises:
        ValueError: If the logits do not scale with them.
    """
    module: Any = projections.module
    names = [name for name, _ in [*module.named_parameters(recurse=False), *module.named_children()]]
    if added := next((name for name in names if _ADDED.search(name) and name != _TABLE), ""):
        raise ValueError(f"its `{added}` is added to logits, and does not scale with queries")
    if projections.query_norm:
        norm: Any = module.get_submodule(projections.query_norm)
        if not _is_proportional(norm):
            raise ValueError(f"its `{projections.query_norm}` is not proportional to a gain and a bias")
        return norm, norm.weight.numel()
    if projections.reason:
        raise ValueError(projections.reason)
    if isinstance(module, nn.MultiheadAttention):
        return module, module.embed_dim
    target: Any = module.get_submodule(projections.query)
    inputs, outputs = target.weight.shape if is_transposed(target) else reversed(target.weight.shape)
    if projections.query != projections.key:
        return target, outputs
    if outputs == 3 * inputs:
        return target, inputs
    heads, width = (
        next((getattr(module, n) for n in names if hasattr(module, n)), None) for names in (_HEADS, _WIDTHS)
    )
    if heads is None or width is None:
        raise ValueError(f"how many of the {outputs} outputs of `{projections.query}` are queries is not known")
    return target, projections.parts(heads, width)[0].size


@torch.no_grad()
def _is_proportional(norm: Any) -> bool:
    """Whether half of its parameters make half of what it returns: a gain that is added to 1 is no such one."""
    own = dict(norm.named_parameters(recurse=False))
    if "weight" not in own or unreadable(own["weight"]):
        return "weight" in own
    probe = torch.linspace(-1.0, 2.0, own["weight"].numel()).to(own["weight"])[None]
    half = torch.func.functional_call(norm, {name: parameter / 2 for name, parameter in own.items()}, (probe,))
    return torch.allclose(2 * half, norm(probe), rtol=1e-3)
