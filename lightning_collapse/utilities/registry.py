"""Registry: tables of what the package knows; one decorated function is one curve, one decorated class one loss."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, overload

from torch import Tensor, nn

MeasureFn = TypeVar("MeasureFn", bound=Callable[..., Tensor])
LossClass = TypeVar("LossClass", bound=type[nn.Module])
PenaltyClass = TypeVar("PenaltyClass", bound=type)
LayerClass = TypeVar("LayerClass", bound=type[nn.Module])


@dataclass(frozen=True)
class Measure:
    """A registered measure and what its reader must know.

    Attributes:
        name: Name of the function, and of the curve.
        fn: ``kind="spectrum"``: maps singular values ``(..., K)``, descending, to ``(...)``;
            ``kind="rows"``: maps features ``(N, D)`` and an optional boolean mask ``(N,)`` to a scalar;
            ``kind="pairs"``: maps two feature matrices ``(N, D)`` to a scalar, and is not for monitors;
            ``kind="weights"``: maps a weight matrix ``(O, I)``, one row per unit, to a scalar.
        kind: What ``fn`` reads.
        record: Whether ``fn`` wants the whole ``Spectrum`` record, which also knows n and d.
        from_spectrum: For ``kind="rows"``: the same value from the count, mean and variance of the ``Spectrum`` record
            of centered features, where these are all there is to know; then monitors need no rows for it.
        statistic: For ``kind="rows"``: maps features and mask to a vector that adds up over disjoint sets of rows, as
            long for any number of them; then several processes need not bring their rows together.
        from_statistic: The value from such a sum.
        batched: Whether ``statistic`` and ``from_statistic`` take several layers of one shape at once, features
            ``(..., N, D)`` and sums ``(..., S)``; monitors read them in the time of one then.
        from_gram: For ``kind="spectrum"``: the same value from the Gram matrix ``(..., K, K)`` of the features and its
            ``Spectrum`` record without singular values; then monitors need no decomposition for it.
        spectrum: Which singular values ``fn`` reads: of ``"centered"`` or of ``"raw"`` features.
        range: Smallest and largest value in words.
        collapsed: What a collapsed representation reads.
        source: Authors, year, identifier.
        null: What isotropic noise reads, as a function of ``(n, d)``; for spectral measures ``None`` stands for the
            Marchenko-Pastur law, see :func:`~lightning_collapse.functional.expected_under_isotropy`.
        sketchable: Whether the value keeps its meaning on a random projection of the features.
        scale_free: Whether multiplying the features by a constant leaves the value as it is.
        key: What the curve is called if not ``name``, for measures whose settings must be told with the value.
        flops: For ``kind="weights"``: floating-point operations for a matrix ``(O, I)``, if they are more than a few
            per weight; then monitors that keep a budget count them.
    """

    name: str
    fn: Callable[..., Tensor]
    kind: Literal["spectrum", "rows", "pairs", "weights"] = "spectrum"
    record: bool = False
    from_spectrum: Callable[[Any], Tensor] | None = None
    statistic: Callable[..., Tensor] | None = None
    from_statistic: Callable[[Tensor], Tensor] | None = None
    batched: bool = False
    from_gram: Callable[[Tensor, Any], Tensor] | None = None
    spectrum: Literal["centered", "raw"] = "centered"
    range: str = ""
    collapsed: str = ""
    source: str = ""
    null: Callable[[int, int], float] | None = None
    sketchable: bool = True
    scale_free: bool = True
    key: str = ""
    flops: Callable[[int, int], float] | None = None

    @property
    def family(self) -> str:
        """First part of the names of its curves."""
        return "weights" if self.kind == "weights" else "collapse"

    @property
    def curve(self) -> str:
        """Last part of the curve's name."""
        return self.key or self.name

    @property
    def reads(self) -> str:
        """What it is computed from, in a few words."""
        return f"{self.spectrum} spectrum" if self.kind == "spectrum" else self.kind

    def of_spectrum(self, spectrum: Any) -> Tensor:
        """Evaluate ``fn`` on a ``Spectrum`` record."""
        return self.fn(spectrum if self.record else spectrum.singular_values)


@dataclass(frozen=True)
class Curve:
    """A curve that a monitor draws from something other than the features of a layer, and what its reader must know.

    Attributes:
        name: Last part of the curve's name, ``{family}/{layer}/{name}``.
        reads: What it is computed from, in a few words.
        range: Smallest and largest value in words.
        collapsed: What it reads when things go wrong.
        source: Authors, year, identifier.
        family: First part of the name; empty for that of the monitor that declares it.

    Example:
        >>> Curve("root_mean_square", "norms of rows", "0 to infinity", "near 0").line
        '- ``root_mean_square``: norms of rows; 0 to infinity; ill: near 0.'
    """

    name: str
    reads: str = ""
    range: str = ""
    collapsed: str = ""
    source: str = ""
    family: str = ""

    @property
    def line(self) -> str:
        """The curve in one line of a docstring."""
        facts = "; ".join(
            fact for fact in (self.reads, self.range, self.collapsed and f"ill: {self.collapsed}") if fact
        )
        return f"- ``{self.name}``: {facts}.".replace("|", r"\|")  # which begins a substitution there


MONITORS: dict[str, type] = {}
MEASURES: dict[str, Measure] = {}
CURVES: dict[str, Curve] = {}
LOSSES: dict[str, type[nn.Module]] = {}
PENALTIES: dict[str, type] = {}
LAYERS: dict[str, type[nn.Module]] = {}


@overload
def register_measure(fn: MeasureFn) -> MeasureFn: ...
@overload
def register_measure(**facts: Any) -> Callable[[MeasureFn], MeasureFn]: ...
def register_measure(fn: MeasureFn | None = None, **facts: Any) -> MeasureFn | Callable[[MeasureFn], MeasureFn]:
    """Make a measure known by name to every monitor: ``CollapseMonitor(measures=["<fn name>"])``.

    One of ``kind="weights"`` is for ``WeightSpectrumMonitor(measures=["<fn name>"])``. Also known then to the
    dashboard and to ``python -m lightning_collapse measures``.

    Args:
        fn: The measure; its function name is the curve's name.
        facts: Fields of :class:`Measure` other than ``name`` and ``fn``; their defaults fit a function of the
            singular values of centered features.

    Returns:
        ``fn`` itself, or a decorator if only ``facts`` are given.

    Raises:
        ValueError: If the name is taken.

    Example:
        >>> @register_measure(range="0 to 1", collapsed="1")
        ... def top_share(singular_values):
        ...     return singular_values[..., 0] / singular_values.sum(dim=-1)
        >>> get_measure("top_share").collapsed
        '1'
        >>> del MEASURES["top_share"]
    """

    def register(fn: MeasureFn) -> MeasureFn:
        _add(MEASURES, fn.__name__, Measure(name=fn.__name__, fn=fn, **facts))
        return fn

    return register if fn is None else register(fn)


def register_curve(family: str, name: str, **facts: str) -> None:
    """Make a curve ``{family}/{layer}/{name}`` known to the dashboard and to the legend.

    Args:
        family: First part of the curve's name.
        name: Last part of it.
        facts: The other fields of :class:`Curve`.

    Example:
        >>> register_curve("length", "root_mean_square", reads="norms of rows")
        >>> CURVES.pop("length/root_mean_square").reads
        'norms of rows'
    """
    CURVES[f"{family}/{name}"] = Curve(name, family=family, **facts)


def register_monitor(cls: type, family: str, curves: Iterable[Curve]) -> None:
    """Make a monitor known to the contract tests and the tables, and its curves to the dashboard and to the legend."""
    known = MONITORS.get(cls.__name__)
    if known is None or known.__module__ == cls.__module__:  # another one of that name is the user's own business
        MONITORS[cls.__name__] = cls
    for curve in curves:
        CURVES[f"{curve.family or family}/{curve.name}"] = replace(curve, family=curve.family or family)


def register_loss(cls: LossClass) -> LossClass:
    """Make a loss known to the contract tests and the tables, under its class name.

    Example:
        >>> @register_loss
        ... class Length(nn.Module): ...
        >>> LOSSES.pop("Length") is Length
        True
    """
    _add(LOSSES, cls.__name__, cls)
    return cls


def register_penalty(cls: PenaltyClass) -> PenaltyClass:
    """Make a penalty on weights known to the contract tests and the tables, under its class name."""
    _add(PENALTIES, cls.__name__, cls)
    return cls


def register_layer(cls: LayerClass) -> LayerClass:
    """Make a layer that modules are converted into known to the contract tests and the tables, under its class name."""
    _add(LAYERS, cls.__name__, cls)
    return cls


def get_measure(name: str) -> Measure:
    """Look a measure up by name.

    Raises:
        ValueError: If there is none of that name; the message lists what there is.
    """
    try:
        return MEASURES[name]
    except KeyError:
        raise ValueError(f"Unknown measure {name!r}. Choose from: {', '.join(sorted(MEASURES))}.") from None


def _origin(item: Any) -> tuple[str, str]:
    item = item.fn if isinstance(item, Measure) else item
    return item.__module__, item.__qualname__


def _add(table: dict[str, Any], name: str, item: object) -> None:
    if name in table and _origin(table[name]) != _origin(item):  # a notebook cell may run twice
        raise ValueError(f"`{name}` is already registered. Choose another name.")
    table[name] = item
