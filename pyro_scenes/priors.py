"""Priors: components that a model is given, each with a method that returns a distribution.

``PRIORS`` has by name those that may take the place of a model's own, and ``make`` makes one of
them from its text, such as "uniform:4-5".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from torch import Tensor, nn

from pyro_scenes.distributions import USED, OneHotPlace
from pyro_scenes.errors import UserError

# log of the mass of a presence that cannot be, nats, where a product with -inf would be NaN. No
# image costs as much for another reason, see `evaluate.IMPOSSIBLE`.
NEVER = -1e30
# Of a flow: hidden units of its networks, bins of its splines, and how far these reach, in
# standard deviations.
HIDDEN, BINS, BOUND = 64, 8, 5.0
ROUNDS = 20  # of expectation maximisation, before a mixture's gradients
LEAST = 1e-3  # standard deviation of values that a prior is fitted to
LARGEST = 1000  # number in the text of a prior


class Count(dist.Categorical):
    """A distribution over numbers of objects, with log_prob -inf for those beyond its logits."""

    support = constraints.nonnegative_integer

    def log_prob(self, value: Tensor) -> Tensor:
        largest = self.logits.shape[-1] - 1
        return super().log_prob(value.clamp(max=largest)).masked_fill(value > largest, -math.inf)


class Fitted(nn.Module):
    """A prior that can be fitted to values: by ``begin``, and from there, if it has parameters, by
    maximum likelihood. Its parameters may be learned with a model's in place of that.
    """

    def begin(self, values: Tensor) -> None:
        """:param values: (N, ...), counts or draws of appearances."""
        raise NotImplementedError(f"{type(self).__name__} has no begin")


class LearnedCount(nn.Module):
    """p(n) = Cat(a) over 0..M with a learned (LAVAE, eq. 2). It starts uniform."""

    def __init__(self, limit: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(limit + 1))  # (M + 1,)

    def forward(self) -> Count:
        return Count(logits=self.logits)


class UniformCount(nn.Module):
    """p(n) uniform over ``low..high``, both included (LAVAE, figure 9)."""

    def __init__(self, low: int, high: int):
        super().__init__()
        if not 0 <= low <= high:
            raise UserError(f"a uniform count needs 0 <= low <= high, not {low}-{high}")
        masses = torch.zeros(high + 1)
        masses[low:] = 1.0
        self.masses = nn.Buffer(masses)  # (high + 1,)

    def forward(self) -> Count:
        # Not probs=masses: torch raises those to 1e-7, and the mass elsewhere would not be 0.
        return Count(logits=self.masses.log())


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

    def forward(self) -> Count:
        return Count(logits=self.masses.log())


class FittedCount(Fitted):
    """p(n) as often as n occurs, with each of 0..M counted once more than that.

    So is a count without any mass avoided: of N images, one that does not occur has the mass
    1 / (N + M + 1), and an image that shows it a finite bound.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.masses: Tensor = nn.Buffer(torch.full((limit + 1,), 1 / (limit + 1)))  # (M + 1,)

    def begin(self, values: Tensor) -> None:
        """:param values: (N,) long, in 0..M."""
        counted = values.bincount(minlength=len(self.masses)) + 1.0
        self.masses = counted / counted.sum()

    def forward(self) -> Count:
        return Count(logits=self.masses.log())


def presence_logits(count: dist.Categorical, steps: int) -> Tensor:
    """log p(z_pres_t = 0 and 1, given t objects before), (T, 2), of any prior over counts.

    What has no mass is at NEVER in place of -inf.

    :raises UserError: if the prior gives mass to more objects than there are steps.
    """
    masses = count.logits.exp()
    if len(masses) > steps + 1 and masses[steps + 1 :].sum() > 1e-6:
        raise UserError(f"the prior allows more objects than the model's {steps} steps")
    masses = torch.cat([masses, masses.new_zeros(steps + 1)])[: steps + 1]
    tail = masses.flip(0).cumsum(0).flip(0)  # P(n >= t)
    stop = torch.where(tail[:-1] > 0, masses[:-1] / tail[:-1].clamp(min=1e-30), 1.0)
    more = torch.where(tail[:-1] > 0, tail[1:] / tail[:-1].clamp(min=1e-30), 0.0)
    return torch.stack([stop, more], -1).log().clamp(min=NEVER)


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


class GaussianMixture(Fitted):
    """p(z_app), a mixture of K diagonal Gaussians of L dimensions."""

    def __init__(self, size: int, components: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))  # (K,)
        # (K, L); near N(0, I), yet not alike: alike they would stay so.
        self.means = nn.Parameter(0.3 * torch.randn(components, size))
        self.log_scales = nn.Parameter(torch.zeros(components, size))  # (K, L)

    @torch.no_grad()
    def begin(self, values: Tensor) -> None:
        """Expectation maximisation, from means at values far from each other (k-means++).

        :param values: (N, L).
        """
        chosen = values[torch.randint(len(values), (1,), device=values.device)]
        while len(chosen) < len(self.means):
            # A little more than 0: the values may be fewer than the components.
            squares = torch.cdist(values, chosen).amin(1).square() + 1e-9
            chosen = torch.cat([chosen, values[squares.multinomial(1)]])
        self.means.copy_(chosen)
        self.log_scales.copy_(values.std(0, correction=0).clamp(min=LEAST).log())
        for _ in range(ROUNDS):
            parts = self._parts().log_prob(values.unsqueeze(1)) + self.logits  # (N, K)
            shares = parts.softmax(1)
            sizes = shares.sum(0) + 1e-6  # (K,)
            means, squares = (shares.T @ v / sizes.unsqueeze(1) for v in (values, values.square()))
            self.logits.copy_(sizes.log())
            self.means.copy_(means)
            self.log_scales.copy_(0.5 * (squares - means.square()).clamp(min=LEAST**2).log())

    def forward(self) -> dist.TorchDistribution:
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), self._parts())

    def _parts(self) -> dist.TorchDistribution:
        return dist.Normal(self.means, self.log_scales.exp()).to_event(1)


class Flow(Fitted):
    """p(z_app), a normalising flow: N(0, I) of L dimensions, bent by layers one after the other.

    A layer is an affine autoregressive transform and a monotonic spline of each dimension; in one
    dimension it is the spline alone. It starts near the identity. The autoregressive transforms
    are inverted, so that densities are fast, and draws take one pass for each dimension.
    """

    def __init__(self, size: int, layers: int):
        super().__init__()
        # The values' mean and standard deviation, (L,): splines bend what is within BOUND alone.
        self.shift: Tensor = nn.Buffer(torch.zeros(size))
        self.scale: Tensor = nn.Buffer(torch.ones(size))
        # Each with an order of the dimensions of its own.
        self.mixing = nn.ModuleList(
            transforms.affine_autoregressive(size, [HIDDEN, HIDDEN])
            for _ in range(layers if size > 1 else 0)
        )
        self.splines = nn.ModuleList(_identity_spline(size) for _ in range(layers))

    @torch.no_grad()
    def begin(self, values: Tensor) -> None:
        """:param values: (N, L)."""
        self.shift = values.mean(0)
        self.scale = values.std(0, correction=0).clamp(min=LEAST)

    def forward(self) -> dist.TorchDistribution:
        for module in (*self.mixing, *self.splines):
            module.clear_cache()  # of values under earlier parameters
        layers: list = []
        for mixing, spline in zip_longest(self.mixing, self.splines):
            layers += [spline] if mixing is None else [mixing.inv, spline]
        layers.append(transforms.AffineTransform(self.shift, self.scale, event_dim=1))
        base = dist.Normal(torch.zeros_like(self.shift), torch.ones_like(self.scale)).to_event(1)
        return dist.TransformedDistribution(base, layers)


class BoundedSpline(transforms.Spline):
    """Pyro's spline, which sees nothing beyond its bounds.

    There it is the identity, but Pyro's goes through the formula of the last bin first, which has
    a pole somewhere out there: a value near it makes all gradients NaN.
    """

    def spline_op(self, x: Tensor, **options) -> tuple[Tensor, Tensor]:
        outside = x.abs() > self.bound
        y, log_slope = super().spline_op(x.masked_fill(outside, 0.0), **options)
        return torch.where(outside, x, y), log_slope.masked_fill(outside, 0.0)


def _identity_spline(size: int) -> BoundedSpline:
    spline = BoundedSpline(size, BINS, BOUND)
    for parameter in spline.parameters():
        nn.init.zeros_(parameter)  # bins of one width and height
    # Softplus makes it the slope between bins: 1.
    nn.init.constant_(spline.unnormalized_derivatives, math.log(math.e - 1))
    return spline


# --- by name -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A prior by name: an example of how it is written, and how it is made.

    ``make`` is given the text after the colon, and a size: the most objects that a count goes to
    where its text does not say it, or the dimensions of an appearance. It raises ValueError.
    """

    example: str
    make: Callable[[str, int], nn.Module]


def _uniform(argument: str, limit: int) -> nn.Module:
    low, dash, high = argument.partition("-")
    return UniformCount(_whole(low, 0), _whole(high if dash else low, 0))


def _geometric(argument: str, limit: int) -> nn.Module:
    return GeometricCount(float(argument), limit)


def _fitted_count(argument: str, limit: int) -> nn.Module:
    _nothing(argument)
    return FittedCount(limit)


def _normal(argument: str, size: int) -> nn.Module:
    _nothing(argument)
    return StandardNormal(size)


def _mixture(argument: str, size: int) -> nn.Module:
    return GaussianMixture(size, _whole(argument, 1))


def _flow(argument: str, size: int) -> nn.Module:
    return Flow(size, _whole(argument, 1))


PRIORS = {
    "count": {
        "uniform": Kind("uniform:4-5", _uniform),
        "geometric": Kind("geometric:0.5", _geometric),
        "fit": Kind("fit", _fitted_count),
    },
    "appearance": {
        "normal": Kind("normal", _normal),
        "mixture": Kind("mixture:10", _mixture),
        "flow": Kind("flow:4", _flow),
    },
}


def make(name: str, text: str, size: int) -> nn.Module:
    """A prior from its text, not fitted to anything yet.

    :param name: what it is of, count or appearance. :param size: see ``Kind``.
    :raises UserError: if there is none of that text.

    >>> make("count", "uniform:1-2", 3)().log_prob(torch.tensor([0, 1, 2, 3])).exp().tolist()
    [0.0, 0.5, 0.5, 0.0]
    >>> make("appearance", "mixture:10", 8)().event_shape
    torch.Size([8])
    """
    if name not in PRIORS:
        raise UserError(f"no prior is called {name!r:.60}; there are {', '.join(PRIORS)}")
    kind, _, argument = text.partition(":")
    if kind not in PRIORS[name]:
        examples = ", ".join(known.example for known in PRIORS[name].values())
        raise UserError(f"{name} has no prior {kind!r:.60}; there are, for example, {examples}")
    try:
        return PRIORS[name][kind].make(argument, size)
    except ValueError as error:
        example = PRIORS[name][kind].example
        raise UserError(f"{name}={text}: {error}; write it like {name}={example}") from None


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= LARGEST:
        raise ValueError(f"{text!r} is not a whole number from {least} to {LARGEST:,}")
    return int(text)


def _nothing(argument: str) -> None:
    if argument:
        raise ValueError(f"it takes no {argument!r}")
