"""Routers of mixtures of experts: which modules score experts, found by what they stand beside."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_collapse.utilities.module_tree import clean_name, own_weight
from lightning_collapse.utilities.modules import curve_name

_EXPERTS, _SHARED = re.compile(r"expert"), re.compile(r"shared")
_ROUTER = re.compile(r"router|gating|switch|(^|_)gate(_|$)|(^|_)gate$|wg$|w_g$|gate$")
_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_CHOICES = ("top_k", "topk", "k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "n_activated_experts")


class Router(NamedTuple):
    """A router.

    Attributes:
        name: For curves.
        module: What is called to choose experts.
        scorer: The module in it, or itself, whose weight has a row per expert; ``None`` if there is none.
        experts: How many experts there are, 0 if that is not known.
        k: Experts per token, as a module says it; 0 if none does.
    """

    name: str
    module: nn.Module
    scorer: nn.Module | None
    experts: int
    k: int = 0


def find_routers(root: nn.Module) -> list[Router]:
    """Routers by their place: children called gate or router, or of such a class, beside one called experts.

    The weight of a router has as many rows as there are experts; where nothing is called so, the only child with as
    many rows is one. Those of Mixtral, Qwen-MoE, DeepSeek, OLMoE, Switch, GPT-OSS, Llama 4, DBRX and Jamba in Hugging
    Face's library are found, and what is written by hand alike.

    Args:
        root: The model.

    Example:
        >>> experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> net = nn.ModuleDict({"moe": nn.ModuleDict({"gate": nn.Linear(4, 3), "experts": experts})})
        >>> [(router.name, router.experts) for router in find_routers(net)]
        [('moe.gate', 3)]
    """
    found: dict[int, Router] = {}
    for name, block in root.named_modules():
        experts = [kid for key, kid in block.named_children() if _is_experts(key)]
        number = next((count for kid in experts if (count := _count(block, kid))), 0)
        if not experts:
            continue
        kids = [(key, kid) for key, kid in block.named_children() if not _EXPERTS.search(key)]
        named = [(key, kid) for key, kid in kids if _ROUTER.search(f"{key}".lower()) or _is_router(type(kid).__name__)]
        chosen = [(key, kid, scorer) for key, kid in named if (scorer := scorer_of(kid, number)) is not None]
        if not chosen and number > 1:
            alike = [(key, kid, scorer) for key, kid in kids if (scorer := scorer_of(kid, number)) is not None]
            chosen = alike if len(alike) == 1 else []
        for key, kid, scorer in chosen:
            whole = curve_name(clean_name(f"{name}.{key}" if name else key))
            k = next((k for module in (kid, block) if (k := _number(module, _CHOICES))), 0)
            found.setdefault(id(kid), Router(whole, kid, scorer, _rows(scorer), k))
    return list(found.values())


def router_at(name: str, module: nn.Module) -> Router:
    """A router that somebody has named."""
    scorer = scorer_of(module, 0)
    return Router(name, module, scorer, 0 if scorer is None else _rows(scorer), _number(module, _CHOICES))


def scorer_of(module: nn.Module, experts: int) -> nn.Module | None:
    """The last module in it, or itself, with a weight of as many rows, at least two; of any number if that is 0."""
    scorers = [part for part in module.modules() if _rows(part) > 1 and experts in (0, _rows(part))]
    return scorers[-1] if scorers else None


def _rows(module: nn.Module) -> int:
    weight = own_weight(module)
    usable = isinstance(weight, Tensor) and not nn.parameter.is_lazy(weight) and weight.ndim == 2
    return weight.shape[0] if usable and isinstance(weight, Tensor) else 0


def _is_experts(key: str) -> bool:
    return bool(_EXPERTS.search(key)) and not _SHARED.search(key)


def _is_router(name: str) -> bool:
    return name.endswith(("Router", "Gate", "Gating", "TopKGating"))


def _count(block: nn.Module, experts: nn.Module) -> int:
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(experts)
    told = next((n for module in (experts, block) if (n := _number(module, _COUNTS)) > 1), 0)
    return told or next((p.shape[0] for p in _stacks(experts)), 0)


def _stacks(experts: nn.Module) -> Iterator[Tensor]:
    return (p for p in experts.parameters() if not nn.parameter.is_lazy(p) and p.ndim == 3)


def _number(module: Any, names: tuple[str, ...]) -> int:
    numbers = (getattr(module, name, None) for name in names)
    return next((n for n in numbers if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)
