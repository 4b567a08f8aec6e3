"""Networks that make images: failures with their twins, and healthy runs that look like one."""

from . import bottleneck, codebook, conv_vae, denoiser, gan, healthy, latents

GENERATIVE = (
    bottleneck.SPECIMEN,
    conv_vae.SPECIMEN,
    gan.SPECIMEN,
    *codebook.SPECIMENS,
    denoiser.SPECIMEN,
    *healthy.SPECIMENS,
    *latents.SPECIMENS,
)
