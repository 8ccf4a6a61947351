"""A fully convolutional VAE: latent variables on a grid, no objects (LAVAE, appendix B).

The joint density, for D = C * H * W pixels and channels::

    p(x, z) = N(z; 0, I) prod_d Bernoulli(x_d; f(z)_d)

and the guide::

    q(z | x) = N(z; mu(x), diag sigma(x)^2)

========  ===================  ==========================================================
symbol    shape                meaning
========  ===================  ==========================================================
x         (B, C, H, W)         binary image, C = 1 or 3
z         (B, K, H / s, W / s) latent grid, s = 2 ** stages, of d = K H W / s^2 numbers
mu,       like z               mean and standard deviation, from the encoder
sigma
f(z)      (B, C, H, W)         mean of the image, from the decoder
========  ===================  ==========================================================

Any site may have a particle dimension to the left of B. The paper's d is 1024 for 64 x 64 images:
K = 16 on a grid of 8 x 8. Its beta, which weighs z's divergence, belongs to the training: the
density here has none, see objectives/conv_vae.py.

Four pairs of networks: the baseline's of the paper; the fast preset's, `gated`, which have the same
grid and about as many parameters, yet work at an eighth and a quarter of the image's sides alone;
`fast`, the same with norms over the whole image in place of gates; and a small pair with a finer
grid, the auxiliary VAE of LAVAE's warm-up. The paper leaves the sizes of kernels open: they are 3
here, and 4 where the stride is 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import BernoulliImage
from pyro_scenes.models.base import GenerativeModel
from pyro_scenes.nets import ConvBlock, GatedBlock, ResidualBlock

BLOCKS = 4  # residual blocks on each side of the paper's networks
DRAWS = 8  # of a reconstruction


@dataclass(frozen=True)
class ConvVAEConfig:
    """Settings; the defaults are those of LAVAE's warm-up."""

    grid_latent: int = 4  # K, latent channels a cell
    grid_stages: int = 2  # halvings of the image
    grid_width: int = 32  # channels
    networks: str = "auxiliary"  # auxiliary, gated, fast or paper


PRESETS = {
    "fast": ConvVAEConfig(grid_latent=16, grid_stages=3, grid_width=96, networks="gated"),
    "paper": ConvVAEConfig(grid_latent=16, grid_stages=3, grid_width=64, networks="paper"),
}


class GridNormal(nn.Module):
    """p(z) = N(0, I) on a grid of cells with K numbers each."""

    def __init__(self, latent: int):
        super().__init__()
        # (K, 1, 1); a buffer follows the device
        self.zero = nn.Buffer(torch.zeros(latent, 1, 1), persistent=False)

    def forward(self, rows: int, columns: int) -> dist.TorchDistribution:
        zero = self.zero.expand(-1, rows, columns)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(3)


class Means(nn.Module):
    """Logits -> means of Bernoulli pixels, float32: bfloat16 knows none between 0.996 and 1."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()


class ConvVAE(GenerativeModel):
    """See the module's docstring.

    :param image_shape: (C, H, W).
    :raises UserError: for sizes that the networks do not accept.
    """

    def __init__(self, config: ConvVAEConfig, image_shape: tuple[int, int, int]):
        super().__init__()
        self.config, self.image_shape = config, image_shape
        if config.networks not in NETWORKS:
            raise UserError(f"networks must be one of {', '.join(NETWORKS)}")
        if config.networks != "auxiliary":  # LAVAE makes one, used or not, whatever the images
            self.check(torch.zeros(1, *image_shape))
        self.latent_prior: nn.Module = GridNormal(config.grid_latent)
        self.likelihood = BernoulliImage()
        # parameters of q(z | x), and the mean of p(x | z)
        self.encoder, self.decoder = NETWORKS[config.networks](config, image_shape[0])

    @pyro_method
    def model(self, x: Tensor) -> None:
        """:param x: (B, C, H, W) in [0, 1]; sites z, x."""
        rows, columns = (side // 2**self.config.grid_stages for side in x.shape[-2:])
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", self.latent_prior(rows, columns))  # (B, K, H / s, W / s)
            mean = self.decode(z.flatten(0, -4)).view(*z.shape[:-3], *x.shape[1:])
            pyro.sample("x", self.likelihood(mean), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        with pyro.plate("images", len(x), dim=-1):
            mean, scale = self.posterior(x)
            pyro.sample("z", dist.Normal(mean, scale).to_event(3))

    def decode(self, z: Tensor) -> Tensor:
        """f(z), (N, K, H / s, W / s) -> (N, C, H, W) in [0, 1]."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.autocast):
            return self.decoder(z)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | x), each (B, K, H / s, W / s)."""
        self.check(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            encoded = self.encoder(x)
        mean, log_variance = encoded.to(x.dtype).chunk(2, 1)
        return mean, (0.5 * log_variance.clamp(-14.0, 4.0)).exp()

    @torch.no_grad()
    def kl_map(self, x: Tensor) -> Tensor:
        """KL(q(z | x) || N(0, I)) of each cell, nats, (B, H / s, W / s)."""
        mean, scale = self.posterior(x)
        return (0.5 * (mean**2 + scale**2 - 1) - scale.log()).sum(1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E_q[f(z)] by a few draws, the same for an image whenever it is asked for.

        Not f(mu): among 1,024 numbers no draw is near its mean, and the decoder knows draws alone.
        Where an image is black, mu is 0 and f(mu) may be anything.
        """
        mean, scale = self.posterior(x)
        noise = torch.randn(DRAWS, *mean.shape[1:], generator=torch.Generator().manual_seed(0))
        drawn = (self.decode(mean + scale * draw) for draw in noise.to(mean))
        return torch.stack(list(drawn)).mean(0)

    def check(self, x: Tensor) -> None:
        super().check(x)
        stride = 2**self.config.grid_stages
        if any(side % stride for side in x.shape[-2:]):
            raise UserError(f"the sides of an image must be multiples of {stride}")


# --- the networks: image -> means and log variances of z, and z -> means of pixels ----------------


def _auxiliary(config: ConvVAEConfig, channels: int) -> tuple[nn.Module, nn.Module]:
    width, stages = config.grid_width, config.grid_stages
    encoder = nn.Sequential(
        # Even kernels: the centre of what a cell sees is the centre of the cell.
        ConvBlock(channels, width, kernel=4, stride=2),
        *(ConvBlock(width, width, kernel=4, stride=2) for _ in range(stages - 1)),
        ResidualBlock(width),
        nn.Conv2d(width, 2 * config.grid_latent, 1),
    )
    decoder = nn.Sequential(
        ConvBlock(config.grid_latent, width),
        ResidualBlock(width),
        nn.Conv2d(width, channels * 4**stages, 1),
        nn.PixelShuffle(2**stages),
        Means(),
    )
    return encoder, decoder


def _fast(
    config: ConvVAEConfig, channels: int, norm: str, block: Callable[[int], nn.Module], blocks: int
) -> tuple[nn.Module, nn.Module]:
    """Pixels become channels: a convolution at the image's own resolution would cost most."""
    width, fine, side = config.grid_width, config.grid_width // 2, 2 ** (config.grid_stages - 1)
    encoder = nn.Sequential(
        nn.PixelUnshuffle(side),
        ConvBlock(channels * side**2, fine, norm=norm),
        ConvBlock(fine, width, kernel=4, stride=2, norm=norm),
        block(width),
        nn.Conv2d(width, 2 * config.grid_latent, 1),
    )
    pixels = nn.Conv2d(fine, channels * side**2, 1)
    # Images start dark, as they are.
    nn.init.constant_(pixels.bias, -3.0)  # type: ignore[arg-type]
    decoder = nn.Sequential(
        ConvBlock(config.grid_latent, width, norm=norm),
        *(block(width) for _ in range(blocks)),
        nn.Conv2d(width, 4 * fine, 1),
        nn.PixelShuffle(2),
        nn.SiLU(),
        block(fine),
        pixels,
        nn.PixelShuffle(side),
        Means(),
    )
    return encoder, decoder


def _paper(config: ConvVAEConfig, channels: int) -> tuple[nn.Module, nn.Module]:
    """Strided convolutions between the first pairs of blocks, mirrored by transposed ones."""
    width, act = config.grid_width, nn.LeakyReLU
    between = config.grid_stages - 1
    if between >= BLOCKS:
        raise UserError(f"the paper's networks halve an image {BLOCKS} times at most")
    down: list[nn.Module] = [ConvBlock(channels, width, 4, 2, "batch", act)]
    up: list[nn.Module] = [ConvBlock(config.grid_latent, width, norm="batch", activation=act)]
    for i in range(BLOCKS):
        down.append(ResidualBlock(width, "batch", act))
        up.append(ResidualBlock(width, "batch", act))
        if i < between:
            down.append(nn.Conv2d(width, width, 4, 2, 1))
        if i >= BLOCKS - 1 - between and i < BLOCKS - 1:
            up.append(nn.ConvTranspose2d(width, width, 4, 2, 1))
    down.append(nn.Conv2d(width, 2 * config.grid_latent, 3, padding=1))
    up += [
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(width, channels, 3, padding=1),
        Means(),
    ]
    return nn.Sequential(*down), nn.Sequential(*up)


NETWORKS: dict[str, Callable[[ConvVAEConfig, int], tuple[nn.Module, nn.Module]]] = {
    "auxiliary": _auxiliary,
    "gated": partial(_fast, norm="none", block=GatedBlock, blocks=2),
    "fast": partial(_fast, norm="group", block=ResidualBlock, blocks=1),
    "paper": _paper,
}
