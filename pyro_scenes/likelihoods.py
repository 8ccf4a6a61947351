"""Likelihoods of an image given its mean."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn


class BernoulliImage(nn.Module):
    """Independent Bernoulli pixels and channels (LAVAE, eq. 12).

    :param floor: means are mapped from [0, 1] to [floor, 1 - floor], because sprites add up to
        exactly 0 where there are none, which no stray pixel would survive. A training may raise
        it for a time; the configured value is the model's.
    """

    def __init__(self, floor: float = 1e-5):
        super().__init__()
        self.floor = floor

    def forward(self, mean: Tensor) -> dist.TorchDistribution:
        """:param mean: (..., C, H, W). The event is the whole image."""
        mean = self.floor + (1.0 - 2.0 * self.floor) * mean.clamp(0.0, 1.0)
        return dist.Bernoulli(mean, validate_args=False).to_event(3)
