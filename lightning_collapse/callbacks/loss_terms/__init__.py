"""Terms that are added to the loss of any module, without a change to its code."""
