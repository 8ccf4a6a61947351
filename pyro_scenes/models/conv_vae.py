"""A fully convolutional VAE: latent variables on a grid, no objects (LAVAE, appendix B).

    p(x, z) = N(z; 0, I) prod_d Bernoulli(x_d; f(z)_d),    q(z | x) = N(z; mu(x), diag sigma(x)^2)

========  ===================  ==========================================================
symbol    shape                meaning
========  ===================  ==========================================================
x         (B, C, H, W)         image
z         (B, K, H / s, W / s) latent grid, s = 2 ** stages
========  ===================  ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_scenes.likelihoods import BernoulliImage
from pyro_scenes.models.base import GenerativeModel
from pyro_scenes.nets import ConvBlock, ResidualBlock


@dataclass(frozen=True)
class ConvVAEConfig:
    """Settings; the defaults are those of LAVAE's warm-up."""

    grid_latent: int = 4  # K, latent channels a cell
    grid_stages: int = 2  # halvings of the image
    grid_width: int = 32  # channels


class ConvVAE(GenerativeModel):
    """See the module's docstring. :param image_shape: (C, H, W)."""

    def __init__(self, config: ConvVAEConfig, image_shape: tuple[int, int, int]):
        super().__init__()
        self.config, self.image_shape = config, image_shape
        channels, width, stages = image_shape[0], config.grid_width, config.grid_stages
        self.likelihood = BernoulliImage()
        # parameters of q(z | x)
        self.encoder = nn.Sequential(
            # Even kernels: the centre of what a cell sees is the centre of the cell.
            ConvBlock(channels, width, kernel=4, stride=2),
            *(ConvBlock(width, width, kernel=4, stride=2) for _ in range(stages - 1)),
            ResidualBlock(width),
            nn.Conv2d(width, 2 * config.grid_latent, 1),
        )
        # the mean of p(x | z)
        self.decoder = nn.Sequential(
            ConvBlock(config.grid_latent, width),
            ResidualBlock(width),
            nn.Conv2d(width, channels * 4**stages, 1),
            nn.PixelShuffle(2**stages),
            nn.Sigmoid(),
        )

    @pyro_method
    def model(self, x: Tensor) -> None:
        """:param x: (B, C, H, W) in [0, 1]; sites z, x."""
        stride = 2**self.config.grid_stages
        shape = self.config.grid_latent, x.shape[-2] // stride, x.shape[-1] // stride
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(shape), x.new_ones(shape)).to_event(3))
            mean = self.decoder(z.flatten(0, -4)).view(*z.shape[:-3], *x.shape[1:])
            pyro.sample("x", self.likelihood(mean), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        with pyro.plate("images", len(x), dim=-1):
            mean, scale = self.posterior(x)
            pyro.sample("z", dist.Normal(mean, scale).to_event(3))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x), each (B, K, H / s, W / s)."""
        mean, log_variance = self.encoder(x).float().chunk(2, 1)
        return mean, (0.5 * log_variance.clamp(-14.0, 4.0)).exp()

    @torch.no_grad()
    def kl_map(self, x: Tensor) -> Tensor:
        """KL(q(z | x) || p(z)) of each cell, nats, (B, H / s, W / s)."""
        mean, scale = self.posterior(x)
        return (0.5 * (mean**2 + scale**2 - 1) - scale.log()).sum(1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        return self.decoder(self.posterior(x)[0])
