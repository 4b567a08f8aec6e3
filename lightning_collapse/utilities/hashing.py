"""Random bits that depend on a counter alone: equal on all processes, and no random number of the training."""

from torch import Tensor

# the finalizer of SplitMix64 (Steele, Lea & Flood, 2014), its constants as signed numbers
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def hashed(x: Tensor) -> Tensor:
    """A hash of each 64-bit integer, of which all bits may be used; multiply counters by ``GOLDEN`` before."""
    for shift, factor in zip((30, 27), MIX, strict=True):
        x = (x ^ _shift(x, shift)) * factor
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros; that of signed numbers fills with their sign."""
    shifted: Tensor = x >> bits & (2 ** (64 - bits) - 1)
    return shifted
