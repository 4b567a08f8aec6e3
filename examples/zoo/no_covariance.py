"""Dimensional collapse: every feature is kept spread, and nothing keeps them from being the same one."""

from .joint_embedding import joint_embedding
from .specimen import Specimen

SPECIMEN = Specimen(
    "VICReg without covariance",
    joint_embedding,
    "no penalty on features that repeat each other",
    kind="dimensional_collapse",
    setting="covariance",
    healthy=1.0,
    sick=0.0,
    layers=("encoder*", "projector*"),
    family="joint embedding",
    claims=("partial_collapse",),
)
