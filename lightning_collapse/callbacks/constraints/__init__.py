"""Constraints: what is done to weights right after each step of the optimizer that has moved them."""
