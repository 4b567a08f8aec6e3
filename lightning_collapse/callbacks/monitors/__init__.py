"""Monitors: they choose layers, call functional code and declare curves."""
