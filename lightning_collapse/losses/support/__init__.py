"""What several losses share: rows and moments of the global batch, whitening, directions, permutations, state."""
