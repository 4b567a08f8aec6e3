"""Helpers of several losses: rows and moments of the global batch, whitening, directions, permutations, state."""
