"""What everything else stands on: the registry, layer outputs as rows, layer choice, trainer facts, sums over ranks."""
