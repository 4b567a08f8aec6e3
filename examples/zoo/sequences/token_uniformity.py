"""Token uniformity: representations of tokens become equal over the depth of a transformer."""

from typing import Literal

from examples.zoo.specimen import Habitat, Specimen

from .tagger import Tagger, tagging


def without_residual(seed: int, residual: bool) -> Habitat:
    """Six blocks."""
    return tagging(seed, Tagger(residual=residual))


def deep_post_norm(seed: int, norm: Literal["pre", "post"]) -> Habitat:
    """Twelve blocks at a rate that LayerNorm behind the residual does not stand without a warm-up."""
    return tagging(seed, Tagger(depth=12, norm=norm, rate=1e-2), steps=240)


SPECIMENS = (
    Specimen(
        "blocks without residual",
        without_residual,
        "attention without residuals makes all tokens alike",
        kind="complete_collapse",
        setting="residual",
        healthy=True,
        sick=False,
        layers=("blocks*",),
        claims=("token_collapse",),
        develops=False,
    ),
    Specimen(
        "deep post-norm",
        deep_post_norm,
        "no gradient reaches the lower blocks, and tokens become alike",
        kind="complete_collapse",
        setting="norm",
        healthy="pre",
        sick="post",
        layers=("blocks*",),
        claims=("token_collapse",),
    ),
)
