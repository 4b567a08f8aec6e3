"""Cost of a spectrum, and so how many rows a budget buys."""


def spectrum_flops(rows: int, width: int) -> float:
    """Cost of a spectrum by the smaller side, in floating-point operations of a training step.

    A double-precision Gram matrix and its eigenvalues, in units of the single-precision matrix products that a training
    step is made of; the two constants were fitted to timings on a CPU for widths from 64 to 512.
    """
    side = min(rows, width)
    return 4.5 * rows * width * side + 10 * side**3


def rows_within(flops: float, width: int, per_feature: int = 4, least: int = 64) -> int:
    """The most rows whose spectrum costs no more than ``flops``.

    Args:
        flops: The budget.
        width: Number of features ``D``.
        per_feature: Never more than this many rows per feature: beyond it a rank hardly changes with ``n``.
        least: Never fewer than this, whatever it costs.

    Returns:
        Number of rows.

    Example:
        >>> rows_within(1e12, width=256), rows_within(1e7, width=256), rows_within(0.0, width=256)
        (1024, 72, 64)
    """
    low, high = least, max(per_feature * width, least)
    while low < high:  # the largest affordable number: cost grows with it
        middle = (low + high + 1) // 2
        low, high = (middle, high) if spectrum_flops(middle, width) <= flops else (low, middle - 1)
    return low
