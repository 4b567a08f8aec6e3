"""A pass over data in the middle of a fit that must not notice."""
