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


class GeometricCount(nn.Module):
    """p(n) in proportion to ``more ** n`` up to the limit, which takes the tail (AIR, section 2).

    :param more: probability of one more object, in (0, 1).
    """

    def __init__(self, more: float, limit: int):
        super().__init__()
        if not 0 < more < 1:
            raise UserError(f"the probability of one more object lies in (0, 1), not at {more:g}")
        masses = more ** torch.arange(limit + 1.0)
        masses[:-1] *= 1 - more
        self.masses = nn.Buffer(masses, persistent=False)  # (limit + 1,)

    def forward(self) -> dist.Categorical:
        return dist.Categorical(logits=self.masses.log())


def presence_logits(count: dist.Categorical, steps: int) -> Tensor:
    """log p(z_pres_t = 0 and 1, given t objects before), (T, 2), of any prior over counts.

    :raises UserError: if the prior gives mass to more objects than there are steps.
    """
    masses = count.logits.exp()
    if len(masses) > steps + 1 and masses[steps + 1 :].sum() > 1e-6:
        raise UserError(f"the prior allows more objects than the model's {steps} steps")
    masses = torch.cat([masses, masses.new_zeros(steps + 1)])[: steps + 1]
    tail = masses.flip(0).cumsum(0).flip(0)  # P(n >= t)
    stop = torch.where(tail[:-1] > 0, masses[:-1] / tail[:-1].clamp(min=1e-30), 1.0)
    more = torch.where(tail[:-1] > 0, tail[1:] / tail[:-1].clamp(min=1e-30), 0.0)
    # Finite: a one-hot vector times a logarithm of 0 would be NaN.
    return torch.stack([stop, more], -1).log().clamp(min=USED)


class UniformCategory(nn.Module):
    """p(z_cat) uniform over K categories (Discrete-AIR, section 2)."""

    def __init__(self, classes: int):
        super().__init__()
        self.logits = nn.Buffer(torch.zeros(classes), persistent=False)

    def forward(self) -> dist.OneHotCategorical:
        return dist.OneHotCategorical(logits=self.logits)


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
