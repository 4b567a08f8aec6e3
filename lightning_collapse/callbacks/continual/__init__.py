"""Continual learning: a sequence of tasks, what is forgotten between them, and what is done when one ends."""
