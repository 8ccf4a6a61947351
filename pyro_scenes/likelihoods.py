"""Likelihoods of an image given its mean: components with a `name` for what is printed."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_scenes.errors import UserError

FLOOR = 1e-5  # Bernoulli means are kept this far from 0 and 1, unless told otherwise


class BernoulliImage(nn.Module):
    """Independent Bernoulli pixels and channels (LAVAE, eq. 12).

    :param floor: means are mapped from [0, 1] to [floor, 1 - floor], because sprites add up to
        exactly 0 where there are none, which no stray pixel would survive. A training may raise
        it for a time; the configured value is the model's.
    """

    name = "bernoulli"
    binary = True  # of grey values it is no density

    def __init__(self, floor: float = FLOOR):
        super().__init__()
        self.floor = floor

    def forward(self, mean: Tensor) -> TorchDistribution:
        """:param mean: (..., C, H, W). The event is the whole image."""
        mean = self.floor + (1.0 - 2.0 * self.floor) * mean.clamp(0.0, 1.0)
        return BernoulliPixels(mean).to_event(3)


class NormalImage(nn.Module):
    """Independent normal pixels and channels of one standard deviation (Discrete-AIR, eq. 4)."""

    binary = False

    def __init__(self, sigma: float = 0.3):
        super().__init__()
        self.sigma = sigma

    @property
    def name(self) -> str:
        return f"normal, sigma {self.sigma:g}"

    def forward(self, mean: Tensor) -> TorchDistribution:
        """:param mean: (..., C, H, W). The event is the whole image."""
        return NormalPixels(mean, self.sigma).to_event(3)


def likelihood(kind: str, sigma: float, floor: float = FLOOR) -> BernoulliImage | NormalImage:
    """A likelihood by name. :raises UserError: for another."""
    if kind == "normal":
        return NormalImage(sigma)
    if kind == "bernoulli":
        return BernoulliImage(floor)
    raise UserError(f"likelihood must be normal or bernoulli, not {kind!r:.60}")


class NormalPixels(dist.Normal):
    """Normal with one standard deviation: torch's takes its logarithm for each pixel."""

    def __init__(self, mean: Tensor, sigma: float):
        self.sigma = sigma
        super().__init__(mean, sigma)

    def expand(self, batch_shape, _instance=None) -> NormalPixels:
        return NormalPixels(self.loc.expand(batch_shape), self.sigma)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        constant = math.log(self.sigma) + 0.5 * math.log(2 * math.pi)
        return -0.5 * ((value - self.loc) / self.sigma).square() - constant


class BernoulliPixels(TorchDistribution):
    """Bernoulli given means inside (0, 1): two logarithms, where torch's goes by way of logits.

    This is the widest tensor of a step. A grey value x in [0, 1] gets x log m + (1 - x) log(1 - m),
    the usual training loss, which is no density.
    """

    arg_constraints = {"mean": constraints.unit_interval}
    support = constraints.unit_interval
    has_enumerate_support = False

    def __init__(self, mean: Tensor):
        self._mean = mean
        super().__init__(mean.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._mean

    def expand(self, batch_shape, _instance=None) -> BernoulliPixels:
        return BernoulliPixels(self._mean.expand(batch_shape))

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        return torch.bernoulli(self._mean.expand(self._extended_shape(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.lerp(torch.log1p(-self._mean), self._mean.log(), value)
