"""What several penalties share: per-sample gradients, passes over a loader, sharded state."""
