"""Priors: components that a model is given, each with a method that returns a distribution."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scenes.distributions import USED, OneHotPlace
from pyro_scenes.errors import UserError


class LearnedCount(nn.Module):
    """p(n) = Cat(a) over 0..M with a learned (LAVAE, eq. 2). It starts uniform."""

    def __init__(self, limit: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(limit + 1))  # (M + 1,)

    def forward(self) -> dist.Categorical:
        return dist.Categorical(logits=self.logits)


class UniformCount(nn.Module):
    """p(n) uniform over ``low..high``, both included (LAVAE, figure 9)."""

    def __init__(self, low: int, high: int):
        super().__init__()
        if not 0 <= low <= high:
            raise UserError(f"a uniform count needs 0 <= low <= high, not {low}-{high}")
        masses = torch.zeros(high + 1)
        masses[low:] = 1.0
        self.masses = nn.Buffer(masses)  # (high + 1,)

    def forward(self) -> dist.Categorical:
        # Not probs=masses: torch raises those to 1e-7, and the mass elsewhere would not be 0.
        return dist.Categorical(logits=self.masses.log())


class UniformPlaces(nn.Module):
    """Places drawn uniformly without replacement (LAVAE, eq. 3)."""

    def forward(self, used: Tensor) -> OneHotPlace:
        """:param used: (..., D), 1 at the places already taken; the mass there is exactly 0."""
        return OneHotPlace(used.detach() * USED)


class StandardNormal(nn.Module):
    """p(z_app) = N(0, I) of L dimensions (LAVAE, eq. 1)."""

    def __init__(self, size: int):
        super().__init__()
        self.zero = nn.Buffer(torch.zeros(size))  # (L,); a buffer follows the device

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.zero, torch.ones_like(self.zero)).to_event(1)
