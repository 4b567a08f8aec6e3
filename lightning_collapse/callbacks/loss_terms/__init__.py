"""Auxiliary losses and weight penalties: terms of the loss of any module, without a change to its code."""
