"""A fully convolutional VAE: latent variables on a grid, no objects (LAVAE, appendix B).

The joint density, for D = C * H * W pixels and channels, and cells drawn in phases i::

    p(x, z) = prod_i p(z_i | z_<i)  prod_d p(x_d | f(z)_d)

and the guide::

    q(z | x) = prod_i q(z_i | z_<i, h(x))

Each factor is a normal with a diagonal covariance. The paper's networks, and LAVAE's auxiliary VAE,
draw all cells at once, from N(0, I). The fast preset's draw one of each 2 x 2 cells at a time, in
four phases, and both sides know the cells that have been drawn. An object covers several cells:
drawn at once, they all tell of it, and are all paid for (RUNS.md). This prior is learned, and yet
the model is one whose codes are N(0, I): take e_i of z_i = m_i(z_<i) + s_i(z_<i) e_i for the codes,
and this for the first layer of the decoder.

========  ===================  ==========================================================
symbol    shape                meaning
========  ===================  ==========================================================
x         (B, C, H, W)         image, C = 1 or 3, binary if p(x_d | f(z)_d) is Bernoulli
z         (B, K, H / s, W / s) latent grid, s pixels a cell, of d = K H W / s^2 numbers
z_i       (B, K, r, c)         its cells of phase i
h(x)      (B, F, H / s, W / s) what the encoder makes of the image
f(z)      (B, C, H, W)         mean of the image, from the decoder
========  ===================  ==========================================================

Any site may have a particle dimension to the left of B. The paper's d is 1024 for 64 x 64 images:
K = 16 on a grid of 8 x 8. Its beta, which weighs z's divergence, belongs to the training: the
density here has none, see objectives/conv_vae.py.

Four sets of networks: the baseline's of the paper; the fast preset's, which have the same grid and
1.2 million parameters, yet work at an eighth and a quarter of the image's sides alone; and two for
the auxiliary VAE of LAVAE's warm-up, the paper's, with 11 x 11 x 8 latent variables of 64 x 64
images and three residual blocks, and a small one with a finer grid, of the fast preset. The paper
leaves the sizes of kernels open: in its networks they are 3 here, and 4 where the stride is 2. Nor
does it say how 64 pixels become 11 cells: here by strides of 3 and 2, after a border of a pixel.

A prior is called as latent_prior(i, z), where z has 0 in cells that are not drawn yet, and returns
the distribution of z_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import likelihood
from pyro_scenes.models.base import GREY, GenerativeModel
from pyro_scenes.nets import PHASES, ConvBlock, GatedBlock, PhaseNet, ResidualBlock, cells, widened

BLOCKS = 4  # residual blocks on each side of the paper's networks
DRAWS = 8  # of a reconstruction
WARMUP = 6  # pixels a cell of the paper's auxiliary VAE


@dataclass(frozen=True)
class ConvVAEConfig:
    """Settings; the defaults are those of LAVAE's warm-up."""

    grid_latent: int = 4  # K, latent channels a cell
    grid_stages: int = 2  # halvings of the image
    grid_width: int = 32  # channels
    networks: str = "auxiliary"  # auxiliary, paper-auxiliary, fast or paper
    likelihood: str = "bernoulli"  # normal or bernoulli
    sigma: float = 0.3  # of the normal likelihood


PRESETS = {
    "fast": ConvVAEConfig(grid_latent=16, grid_stages=3, grid_width=96, networks="fast"),
    "paper": ConvVAEConfig(grid_latent=16, grid_stages=3, grid_width=64, networks="paper"),
}
# LAVAE's preset -> its auxiliary VAE
AUXILIARY = {
    "fast": ConvVAEConfig(), "paper": ConvVAEConfig(grid_latent=8, networks="paper-auxiliary"),
}
# preset -> data set -> what suits it
SUITED = dict.fromkeys(PRESETS, GREY)


class GridNormal(nn.Module):
    """p(z) = N(0, I), of cells that are drawn in so many phases, 1 or 4."""

    def __init__(self, phases: int):
        super().__init__()
        self.phases = phases

    def forward(self, phase: int, z: Tensor) -> dist.TorchDistribution:
        """:param z: (..., K, R, C)."""
        zero = torch.zeros_like(cells(z, phase, self.phases))
        return dist.Normal(zero, torch.ones_like(zero)).to_event(3)


class GridPhases(nn.Module):
    """p(z_i | z_<i), a normal with mean and variance from a network; N(0, I) as it begins."""

    def __init__(self, latent: int, hidden: int):
        super().__init__()
        self.net = PhaseNet(latent, 0, hidden)
        nn.init.zeros_(self.net.last.weight)
        nn.init.zeros_(self.net.last.bias)  # type: ignore[arg-type]

    def forward(self, phase: int, z: Tensor) -> dist.TorchDistribution:
        """:param z: (..., K, R, C)."""
        return normal(self.net(phase, z))


def normal(raw: Tensor) -> dist.TorchDistribution:
    """Of cells' means and log variances, (..., 2 K, r, c)."""
    mean, log_variance = widened(raw).chunk(2, -3)
    return dist.Normal(mean, (0.5 * log_variance.clamp(-14.0, 4.0)).exp()).to_event(3)


class Means(nn.Module):
    """Logits -> means of pixels, float32: bfloat16 knows none between 0.996 and 1."""

    def forward(self, logits: Tensor) -> Tensor:
        """Any shape -> the same."""
        return widened(logits).sigmoid()


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
        whole = config.networks != "paper-auxiliary"
        self.cell = 2**config.grid_stages if whole else WARMUP  # s
        if config.networks in PRESETS:  # LAVAE makes one, used or not, whatever the images
            self.check(torch.zeros(1, *image_shape))
        self.phases = len(PHASES) if config.networks == "fast" else 1
        self.latent_prior: nn.Module = GridNormal(self.phases)
        self.likelihood = likelihood(config.likelihood, config.sigma)
        # h(x) and the mean of p(x | z)
        self.encoder, self.decoder = NETWORKS[config.networks](config, image_shape[0])
        # parameters of q(z_i | z_<i, h); of a single phase they are h(x) themselves
        self.latent_head: PhaseNet | None = None
        if self.phases > 1:
            width, hidden = config.grid_width, config.grid_width * 4 // 3
            self.latent_prior = GridPhases(config.grid_latent, hidden)
            self.latent_head = PhaseNet(config.grid_latent, width, hidden)

    @pyro_method
    def model(self, x: Tensor) -> None:
        """:param x: (B, C, H, W) in [0, 1]; sites z_0, z_1 ..., x."""
        with pyro.plate("images", len(x), dim=-1):
            z = self._drawn(x, lambda i, z: pyro.sample(f"z_{i}", self._prior(i, z)))
            mean = self.decode(z.flatten(0, -4), x.shape[-2:]).view(*z.shape[:-3], *x.shape[1:])
            pyro.sample("x", self.likelihood(mean), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        h = self.encode(x)
        with pyro.plate("images", len(x), dim=-1):
            self._drawn(x, lambda i, z: pyro.sample(f"z_{i}", self.posterior(h, i, z)))

    def _drawn(self, x: Tensor, draw: Callable[[int, Tensor], Tensor]) -> Tensor:
        """z, (..., K, H / s, W / s).

        :param draw: phase and z, 0 where nothing is drawn yet -> z_i, (..., K, r, c).
        """
        rows, columns = (math.ceil(side / self.cell) for side in x.shape[-2:])
        z = x.new_zeros(self.config.grid_latent, rows, columns)
        for i in range(self.phases):
            if cells(z, i, self.phases).numel():  # a grid of one row has two phases
                drawn = draw(i, z)
                lead = torch.broadcast_shapes(z.shape[:-3], drawn.shape[:-3])
                z = z.expand(*lead, -1, -1, -1).clone()
                cells(z, i, self.phases).copy_(drawn)
        return z

    def encode(self, x: Tensor) -> Tensor:
        """h(x), (B, F, H / s, W / s)."""
        self.check(x)
        top, left = (-side % self.cell for side in x.shape[-2:])  # beyond the image's edges
        if top or left:
            x = F.pad(x, (left // 2, left - left // 2, top // 2, top - top // 2))
        with self._precision(x):
            return self.encoder(x)

    def decode(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """f(z), (N, K, H / s, W / s) -> (N, C, H, W) in [0, 1].

        :param size: H and W, where cells reach beyond the image's edges.
        """
        with self._precision(z):
            mean = self.decoder(z)
        height, width = size or mean.shape[-2:]
        if (height, width) == mean.shape[-2:]:
            return mean
        top, left = (mean.shape[-2] - height) // 2, (mean.shape[-1] - width) // 2
        return mean[..., top : top + height, left : left + width]

    def posterior(self, h: Tensor, phase: int, z: Tensor) -> dist.TorchDistribution:
        """q(z_i | z_<i, h), of what the encoder made of the images, and z as above."""
        with self._precision(z):
            found = h if self.latent_head is None else self.latent_head(phase, z, h)
        return normal(found)

    def _prior(self, phase: int, z: Tensor) -> dist.TorchDistribution:
        with self._precision(z):
            found = self.latent_prior(phase, z)
        wanted = cells(z, phase, self.phases).shape[-3:]
        if found.event_shape != wanted:
            raise UserError(
                f"the prior of phase {phase} is to draw cells of shape {tuple(wanted)},"
                f" not {tuple(found.event_shape)}"
            )
        return found

    def _precision(self, like: Tensor) -> torch.autocast:
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.autocast)

    @torch.no_grad()
    def kl_map(self, x: Tensor) -> Tensor:
        """KL(q(z_i | z_<i, h) || p(z_i | z_<i)) of each cell, nats, (B, H / s, W / s).

        With z_<i at their means; of a single phase it is the divergence.
        """
        h, found = self.encode(x), {}

        def mean(phase: int, z: Tensor) -> Tensor:
            q, p = self.posterior(h, phase, z), self._prior(phase, z)
            # Of two normals; exactly as for N(0, I) alone where that is the prior.
            apart, ratio = (q.mean - p.mean) / p.stddev, q.stddev / p.stddev
            divergence = 0.5 * (apart**2 + ratio**2 - 1) - ratio.log()
            found[phase] = divergence.sum(-3, keepdim=True)
            return q.mean

        z = self._drawn(x, mean)
        divergence = z.new_zeros(len(x), 1, *z.shape[-2:])
        for phase, part in found.items():
            cells(divergence, phase, self.phases).copy_(part)
        return divergence.squeeze(1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E_q[f(z)] by a few draws, the same for an image whenever it is asked for.

        Not f at the mean: among 1,024 numbers no draw is near its mean, and the decoder knows draws
        alone. Where an image is black, the mean is the prior's and f of it may be anything.
        """
        self.check_values(x)
        if not len(x):
            return torch.zeros_like(x)
        h = self.encode(x)
        shape = DRAWS, self.config.grid_latent, *h.shape[-2:]

        def drawn(noise: Tensor) -> Tensor:
            def draw(phase: int, z: Tensor) -> Tensor:
                q = self.posterior(h, phase, z)
                return q.mean + q.stddev * cells(noise, phase, self.phases)

            return self.decode(self._drawn(x, draw), x.shape[-2:])

        # One draw after the other: all at once take as many times the memory.
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(x)
        return torch.stack([drawn(one) for one in noise]).mean(0)

    def check(self, x: Tensor) -> None:
        super().check(x)
        if self.config.networks != "paper-auxiliary":
            self.check_sides(x, self.cell)


# --- the networks: image -> h(x), of one phase means and log variances; z -> means of pixels ------


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


def _paper_auxiliary(config: ConvVAEConfig, channels: int) -> tuple[nn.Module, nn.Module]:
    """Three residual blocks, with convolutions of strides 3 and 2 between them, mirrored."""
    width, act = config.grid_width, nn.LeakyReLU

    def block() -> nn.Module:
        return ResidualBlock(width, "batch", act)

    encoder = nn.Sequential(
        ConvBlock(channels, width, norm="batch", activation=act), block(),
        nn.Conv2d(width, width, 3, 3), block(),
        nn.Conv2d(width, width, 4, 2, 1), block(),
        nn.Conv2d(width, 2 * config.grid_latent, 3, padding=1),
    )
    decoder = nn.Sequential(
        ConvBlock(config.grid_latent, width, norm="batch", activation=act), block(),
        nn.ConvTranspose2d(width, width, 4, 2, 1), block(),
        nn.ConvTranspose2d(width, width, 3, 3), block(),
        nn.Conv2d(width, channels, 3, padding=1), Means(),
    )
    return encoder, decoder


def _fast(config: ConvVAEConfig, channels: int) -> tuple[nn.Module, nn.Module]:
    """Pixels become channels: a convolution at the image's own resolution would cost most."""
    width, fine, side = config.grid_width, config.grid_width // 2, 2 ** (config.grid_stages - 1)
    encoder = nn.Sequential(
        nn.PixelUnshuffle(side),
        ConvBlock(channels * side**2, fine, norm="none"),
        ConvBlock(fine, width, kernel=4, stride=2, norm="none"),
        GatedBlock(width),
    )
    pixels = nn.Conv2d(fine, channels * side**2, 1)
    # Images start dark, as they are.
    nn.init.constant_(pixels.bias, -3.0)  # type: ignore[arg-type]
    decoder = nn.Sequential(
        ConvBlock(config.grid_latent, width, norm="none"),
        GatedBlock(width),
        GatedBlock(width),
        nn.Conv2d(width, 4 * fine, 1),
        nn.PixelShuffle(2),
        nn.SiLU(),
        GatedBlock(fine),
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
    "auxiliary": _auxiliary, "paper-auxiliary": _paper_auxiliary, "fast": _fast, "paper": _paper
}
