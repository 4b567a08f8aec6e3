"""Console: sentences for a person, without the path of a file in front."""

import logging

from lightning_utilities.core.rank_zero import rank_zero_only

LOGGER = "lightning_collapse"
"""Name of the logger; without a handler for it Python writes its messages to ``stderr`` as they are."""


@rank_zero_only
def rank_zero_say(message: str) -> None:
    """Say something about the run on the first process: as a warning of the logger, and not of :mod:`warnings`.

    A warning of Python's is about code, and is printed with the file and the line that raised it; what is said here is
    about the data. It can be captured, formatted or silenced as every logger can.

    Example:
        >>> import logging
        >>> said = []
        >>> handler = logging.Handler()
        >>> handler.emit = lambda record: said.append(record.getMessage())
        >>> logging.getLogger("lightning_collapse").addHandler(handler)
        >>> rank_zero_say("All inputs are mapped to nearly one point in `encoder`.")
        >>> logging.getLogger("lightning_collapse").removeHandler(handler)
        >>> said
        ['All inputs are mapped to nearly one point in `encoder`.']
    """
    logging.getLogger(LOGGER).warning("%s", message)
