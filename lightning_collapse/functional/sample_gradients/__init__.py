"""Sample gradients: what they have in common."""

from lightning_collapse.functional.sample_gradients.rank_one import rank_one_share

__all__ = ["rank_one_share"]
