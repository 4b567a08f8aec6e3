"""Convolutional networks and vision transformers: failures with their twins, and healthy runs that look like one."""

from . import (
    clusters,
    curriculum,
    decay,
    decorrelation,
    dense,
    dino,
    early_dip,
    fine_tuning,
    no_skip,
    odd_layers,
    odd_tables,
    schedules,
    simsiam,
    temperature,
    triplets,
    two_towers,
)

VISION = (
    simsiam.SPECIMEN,
    dino.SPECIMEN,
    *decorrelation.SPECIMENS,
    clusters.SPECIMEN,
    temperature.SPECIMEN,
    triplets.SPECIMEN,
    two_towers.SPECIMEN,
    no_skip.SPECIMEN,
    decay.SPECIMEN,
    fine_tuning.SPECIMEN,
    *schedules.SPECIMENS,
    *dense.SPECIMENS,
    *odd_layers.SPECIMENS,
    *odd_tables.SPECIMENS,
    curriculum.SPECIMEN,
    early_dip.SPECIMEN,
)
