"""A healthy network with a path that carries one number: a denoising U-Net that is told how much noise there is."""

import torch
from torch import Tensor, nn

from examples.zoo.material import Learner, loader, mlp
from examples.zoo.specimen import Habitat, Specimen
from examples.zoo.vision.parts import block, patches
from lightning_collapse import CollapseMonitor, SpectralAlignmentMonitor

TIMES = 50


class UNet(nn.Module):
    """Two scales with skip connections; an embedding of the time is added at both."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(mlp(8, 32, 32), nn.ReLU())
        self.shift = nn.ModuleList([nn.Linear(32, width), nn.Linear(32, 2 * width)])
        self.down1, self.down2 = block(3, width, 2, "group"), block(width, 2 * width, 2, "group")
        self.middle = block(2 * width, 2 * width, 1, "group")
        self.up1 = block(3 * width, width, 1, "group")
        self.out = nn.Conv2d(width + 3, 3, 3, padding=1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        """The noise in the images."""
        angles = (times / TIMES).unsqueeze(1) * 2.0 ** torch.arange(4)
        embedded = self.time_embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        fine = self.down1(images) + self.shift[0](embedded)[:, :, None, None]
        coarse = self.middle(self.down2(fine) + self.shift[1](embedded)[:, :, None, None])
        up = self.up1(torch.cat([nn.functional.interpolate(coarse, scale_factor=2.0), fine], dim=1))
        noise: Tensor = self.out(torch.cat([nn.functional.interpolate(up, scale_factor=2.0), images], dim=1))
        return noise


class Denoiser(Learner):
    """Denoising diffusion of patches of photographs."""

    def __init__(self) -> None:
        super().__init__(rate=3e-3)
        self.net = UNet()

    def loss(self, images: Tensor) -> Tensor:
        """Squared error of the noise, 1 for who says nothing."""
        times, noise = torch.randint(TIMES, (len(images),)), torch.randn_like(images)
        signal = (torch.pi / 2 * (times + 0.5) / TIMES).cos()[:, None, None, None]
        noisy = signal * images + (1 - signal.square()).sqrt() * noise
        error: Tensor = self.net(noisy, times) - noise
        return error.square().mean()

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Of a batch."""
        return self.loss(batch[0])


def make(seed: int) -> Habitat:
    """Patches of photographs."""
    train, test = patches(seed)
    model = Denoiser()

    def held_out() -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return 1 - float(model.loss(test))

    monitors = [CollapseMonitor(), SpectralAlignmentMonitor()]
    batches = [loader(train, size=32, seed=seed)]
    return Habitat(model, batches, monitors, 400, embedding=model.net.middle, held_out=held_out, every=10)


SPECIMEN = Specimen("denoising", make, "an embedding of one number", family="diffusion")
