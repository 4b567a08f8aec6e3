"""Healthy autoencoders that look ill: a head for logarithms of variances, and a codebook that begins with one code."""

import torch

from examples.zoo.generative.codebook import watched
from examples.zoo.generative.conv_vae import VAE, told
from examples.zoo.generative.parts import generative
from examples.zoo.generative.quantizer import Codebook
from examples.zoo.specimen import Habitat, Specimen
from lightning_collapse import LatentMonitor


def log_variances(seed: int) -> Habitat:
    """A light prior: means tell much, and variances of all codes are nearly the same."""
    model = VAE(0.02)
    return generative(model, seed, model.log_variance, lambda test: told(model, test), monitors=(LatentMonitor(),))


def one_code_at_first(seed: int) -> Habitat:
    """Codes begin on one side, where a single one is the nearest of all rows; restarts spread them."""
    codebook = Codebook(restarts=True)
    with torch.no_grad():
        codebook.codes.add_(2.0)
    return watched(seed, codebook)


SPECIMENS = (
    Specimen("log-variances", log_variances, "a head that says nearly the same of all images", family="autoencoder"),
    Specimen("one code at first", one_code_at_first, "a codebook at its start", family="vector quantization"),
)
