"""Evaluation on data in the middle of a fit that must not notice."""
