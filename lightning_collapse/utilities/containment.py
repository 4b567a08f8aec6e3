"""Containment: what torch or Lightning calls in our name never ends a run."""

from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from lightning_utilities.core.rank_zero import rank_zero_warn


class Containment:
    """Runs code inside ``with containment("hook of `encoder`"):``, warns once for each place that fails, and goes on.

    Construction and ``on_fit_start`` raise; everything that runs later runs inside one of these: hooks, measures,
    drawing, every call of a logger. The warning names its owner and the place, so that the user knows what is missing
    from then on. Nothing but :class:`Exception` is caught: an interrupt ends the run.

    Args:
        owner: Whose work it is, such as the name of the callback's class.

    Attributes:
        failed: Places that have failed, in order; whoever owns one asks here and leaves it out from then on.

    Example:
        >>> import warnings
        >>> containment = Containment("CollapseMonitor")
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     for _ in range(2):
        ...         with containment("layer `encoder`", "its curves end here"):
        ...             1 / 0
        >>> len(said), "layer `encoder`" in containment.failed
        (1, True)
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.failed: dict[str, str] = {}

    def __call__(
        self, place: str, consequence: str = "it is left out from now on", drop: Callable[[], object] | None = None
    ) -> "_Contained":
        """A context manager for one use.

        Args:
            place: What is run, in words; one warning is given for each.
            consequence: What the user loses by the failure, in words.
            drop: Called once after the first failure, to take away what failed; what it raises is lost.
        """
        return _Contained(self, place, consequence, drop)

    def catch(self, place: str, consequence: str, error: Exception, drop: Callable[[], object] | None = None) -> None:
        """Take note of a failure; for callers on a path where a context manager costs too much."""
        if place in self.failed:
            return
        self.failed[place] = repr(error)
        if drop is not None:
            with suppress(Exception):
                drop()
        rank_zero_warn(f"`{self.owner}`: {place} failed with {error!r:.400}; {consequence}. Training goes on.")


class _Contained:
    def __init__(self, owner: Containment, *how: object) -> None:
        self._owner, self._how = owner, how

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        place, consequence, drop = self._how
        self._owner.catch(place, consequence, error, drop)  # type: ignore[arg-type]
        return True
