"""A registry of a few measures and a curve, in place of all."""

import torch

from lightning_collapse.utilities.registry import Curve, Measure

FACTS = {
    "effective_rank": Measure("effective_rank", torch.sum, range="1 to K", collapsed="1", source="Roy & Vetterli 2007"),
    "eigenvalue_effective_rank": Measure("eigenvalue_effective_rank", torch.sum, spectrum="raw", range="|x| to K"),
    "uniformity": Measure("uniformity", torch.sum, kind="rows", collapsed="0, all\n    points   equal"),
    "alignment": Measure("alignment", torch.sum, kind="pairs"),
}

GLOW = Curve("glow", family="tube", reads="a tube", range="0 to 1", collapsed="0", source="Crookes 1875")
