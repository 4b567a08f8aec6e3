"""Collapse guard: from curves to a verdict, and what is done about it."""
