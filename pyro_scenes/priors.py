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
from pyro.distributions import TorchDistribution, constraints, transforms
from torch import Tensor, nn

from pyro_scenes.distributions import USED, OneHotPlace
from pyro_scenes.errors import UserError

# log of the mass of a presence that cannot be, nats, where a product with -inf would be NaN. No
# image costs as much for another reason, see `bounds.IMPOSSIBLE`.
NEVER = -1e30
# Of a flow: hidden units of its networks, bins of its splines, and how far these reach, in
# standard deviations.
HIDDEN, BINS, BOUND = 64, 8, 5.0
# Of expectation maximisation: its rounds, unless one gains less than ENOUGH nats a value before,
# and the values times components that are in memory at a time.
ROUNDS, ENOUGH, HELD = 20, 1e-2, 2**21
# Of a mixture of more than MANY components the last is as wide as all values, with a mass of
# UNLIKE: a value unlike all that it is fitted to must not cost the square of its distance in small
# scales.
MANY, UNLIKE = 100, 0.02
NEAREST = 4  # components of a mixture that are gone through by differences
TOGETHER = 500  # means drawn at a time, at most, before that
LEAST = 1e-3  # standard deviation of values that a prior is fitted to
LARGEST = 1000  # number in the text of a prior
COMPONENTS = 50_000  # of a mixture, at most
SCENES = 4000  # that a prior is fitted to


class Count(dist.Categorical):
    """A distribution over numbers of objects, with log_prob -inf for those beyond its logits."""

    support = constraints.nonnegative_integer

    def log_prob(self, value: Tensor) -> Tensor:
        largest = self.logits.shape[-1] - 1
        return super().log_prob(value.clamp(max=largest)).masked_fill(value > largest, -math.inf)


class Fitted(nn.Module):
    """A prior that can be fitted to values: by ``begin``, and from there, if it ``climbs``, by the
    gradient of the likelihood. Its parameters may be learned with a model's in place of that.

    :ivar scenes: how many it takes to fit it.
    """

    climbs = True
    scenes = SCENES

    def begin(self, values: Tensor, scales: Tensor | None = None) -> None:
        """:param values: (N, ...), counts, or means of normal distributions of appearances.
        :param scales: the standard deviations of these, of which None are 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has no begin")


class LearnedCount(nn.Module):
    """p(n) = Cat(a) over 0..M with a learned (LAVAE, eq. 2). It starts uniform."""

    def __init__(self, limit: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(limit + 1))  # (M + 1,)

    def forward(self) -> Count:
        return Count(logits=self.logits)


class UniformCount(nn.Module):
    """p(n) uniform over ``low..high``, both included (LAVAE, figure 9).

    :raises UserError: unless 0 <= low <= high.
    """

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
    """p(n) in proportion to ``more ** n`` up to the limit, which takes the tail (Discrete-AIR,
    appendix A).

    :param more: probability of one more object, in (0, 1).
    :raises UserError: if it is not.
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

    climbs = False

    def __init__(self, limit: int):
        super().__init__()
        self.masses: Tensor = nn.Buffer(torch.full((limit + 1,), 1 / (limit + 1)))  # (M + 1,)

    def begin(self, values: Tensor, scales: Tensor | None = None) -> None:
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
    """p(z_cat) uniform over K categories (Discrete-AIR, appendix C.2, which says categorical)."""

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
    """p(z_app) = N(0, I) of L dimensions (LAVAE, after eq. 3)."""

    def __init__(self, size: int):
        super().__init__()
        self.zero = nn.Buffer(torch.zeros(size))  # (L,); a buffer follows the device

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.zero, torch.ones_like(self.zero)).to_event(1)


class NormalMixture(TorchDistribution):
    """A mixture of K diagonal normal distributions of L dimensions; draws have no gradient.

    A density takes a product of matrices, where `dist.MixtureSameFamily` makes K L numbers a value.
    That product is a difference of squares, which float32 does not know well many scales from 0:
    the NEAREST components are gone through again by differences.

    :param logits: (K,). :param means: (K, L). :param scales: (K, L).
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.real_vector

    def __init__(
        self, logits: Tensor, means: Tensor, scales: Tensor, shape=torch.Size(),
        product: tuple[Tensor, Tensor] | None = None,
    ):
        self.logits, self.means, self.scales = logits, means, scales
        self.product = product or _product(means, scales)
        super().__init__(shape, means.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None) -> NormalMixture:
        shape = torch.Size(batch_shape)
        return NormalMixture(self.logits, self.means, self.scales, shape, self.product)

    def sample(self, sample_shape=torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)[:-1]
        part = dist.Categorical(logits=self.logits).sample(shape)
        return torch.normal(self.means[part], self.scales[part])

    def log_prob(self, value: Tensor) -> Tensor:
        """:param value: (..., L). :return: (...)."""
        z, weights = value.reshape(-1, value.shape[-1]), self.logits.log_softmax(-1)
        constant, factors = self.product
        parts = _parts(z, z**2, (constant + weights, factors))  # (N, K)
        near = parts.topk(min(NEAREST, len(weights)), sorted=False).indices
        scales = self.scales[near]  # (N, k, L)
        distances = (z.unsqueeze(1) - self.means[near]) / scales
        squares = distances**2 + 2 * scales.log() + math.log(2 * math.pi)
        exact = weights[near] - 0.5 * squares.sum(-1)
        return parts.scatter(1, near, exact).logsumexp(-1).view(value.shape[:-1])


def _product(means: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) and (2 L, K), by which (z, z^2) becomes log N(z; means_k, scales_k^2)."""
    precision = scales**-2
    constant = (-scales.log() - 0.5 * means**2 * precision - 0.5 * math.log(2 * math.pi)).sum(-1)
    return constant, torch.cat([means * precision, -0.5 * precision], -1).T


def normal_parts(values: Tensor, spread: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """The mean of log N(z; means_k, scales_k^2) over z ~ N(values, spread^2), (N, K).

    :param values, spread: (N, L). :param means, scales: (K, L).
    """
    return _parts(values, values**2 + spread**2, _product(means, scales))


def _parts(z: Tensor, squares: Tensor, product: tuple[Tensor, Tensor]) -> Tensor:
    """log N(z; means_k, scales_k^2), (N, K), of z and z^2 or of their means, (N, L) each."""
    constant, factors = product
    return torch.addmm(constant, torch.cat([z, squares], -1), factors)


class GaussianMixture(Fitted):
    """p(z_app), a mixture of K diagonal Gaussians of L dimensions.

    Objects of a finite number of kinds, such as the digits of a pool, have about as many separate
    posteriors. With a component for each, p(z_app) is nearly their mean, which is the best of all
    priors for them (the aggregate posterior); an object then costs little more than to name it.
    """

    climbs = False

    def __init__(self, size: int, components: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))  # (K,)
        # (K, L); near N(0, I), yet not alike: alike they would stay so.
        self.means = nn.Parameter(0.3 * torch.randn(components, size))
        self.log_scales = nn.Parameter(torch.zeros(components, size))  # (K, L)
        self.scenes = max(SCENES, 2 * components)

    @torch.no_grad()
    def begin(self, values: Tensor, scales: Tensor | None = None) -> None:
        """:param values: (N, L), means of q(z). :param scales: their deviations, (N, L)."""
        spread = torch.zeros_like(values) if scales is None else scales
        many = len(self.means) > MANY
        logits, means, deviations = maximised(values, spread, len(self.means) - many)
        if many:
            mass = logits.logsumexp(0) + math.log(UNLIKE / (1 - UNLIKE))
            logits = torch.cat([logits, mass[None]])
            means = torch.cat([means, values.mean(0, keepdim=True)])
            deviations = torch.cat([deviations, _deviation(values, spread)[None]])
        self.logits.copy_(logits)
        self.means.copy_(means)
        self.log_scales.copy_(deviations.log())

    def forward(self) -> dist.TorchDistribution:
        return NormalMixture(self.logits, self.means, self.log_scales.exp())


def _deviation(values: Tensor, spread: Tensor) -> Tensor:
    """The standard deviation (L,) of draws of many N(values, spread^2), both (N, L)."""
    return (values.var(0, correction=0) + spread.square().mean(0)).sqrt().clamp(min=LEAST)


def maximised(
    values: Tensor, spread: Tensor, components: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixture of the largest E_q[log p(z)] for many q, by expectation maximisation.

    It starts from means at values far from each other. A component's variance is as if it had one
    value more, at its mean, of the mean spread.

    :param values: (N, L), means of q(z). :param spread: their standard deviations, (N, L).
    :return: logits (K,), means (K, L) and standard deviations (K, L).
    """
    means, away = _far_apart(values, components)
    deviations = (away.mean() / values.shape[1] + spread.square().mean(0)).sqrt()
    deviations = deviations.clamp(min=LEAST).expand_as(means)
    logits, before = values.new_zeros(components), -math.inf
    for _ in range(ROUNDS):
        sizes, bound = torch.zeros_like(logits), 0.0
        first, second = torch.zeros_like(means), torch.zeros_like(means)
        rows = max(1, HELD // components)
        for z, s in zip(values.split(rows), spread.split(rows), strict=True):
            parts = normal_parts(z, s, means, deviations) + logits.log_softmax(-1)  # (n, K)
            log_density = parts.logsumexp(-1, keepdim=True)
            bound += float(log_density.sum()) / len(values)
            shares = parts.sub_(log_density).exp_()
            sizes += shares.sum(0)
            first += shares.T @ z
            second += shares.T @ (z**2 + s**2)
        number = sizes.unsqueeze(1)
        # One without values stays where it is.
        means = torch.where(number > 1e-3, first / number.clamp(min=1e-6), means)
        squares = (second - 2 * means * first + means**2 * number).clamp(min=0)
        deviations = (squares + spread.square().mean(0)) / (number + 1)
        deviations = deviations.sqrt().clamp(min=LEAST)
        logits = (sizes + 1 / components).log()
        if bound - before < ENOUGH:
            break
        before = bound
    return logits, means, deviations


def _far_apart(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """So many of the values (N, L), each drawn by its squared distance from those before; and the
    squared distance of each value from the nearest of them, (N,).

    As k-means++ draws them, but for as many at a time as are a quarter of those before.
    """
    chosen = values[torch.randint(len(values), (1,), device=values.device)]
    squares = torch.cdist(values, chosen).amin(1).square()
    while len(chosen) < number:
        several = min(1 + len(chosen) // 4, number - len(chosen), TOGETHER)
        # A little more than 0: the values may be fewer than the components.
        new = values[(squares + 1e-9).multinomial(several, replacement=True)]
        squares = torch.minimum(squares, torch.cdist(values, new).amin(1).square())
        chosen = torch.cat([chosen, new])
    return chosen, squares


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
    def begin(self, values: Tensor, scales: Tensor | None = None) -> None:
        """:param values: (N, L), means. :param scales: standard deviations, (N, L)."""
        spread = torch.zeros_like(values) if scales is None else scales
        self.shift, self.scale = values.mean(0), _deviation(values, spread)

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
    return GaussianMixture(size, _whole(argument, 1, COMPONENTS))


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


def _whole(text: str, least: int, largest: int = LARGEST) -> int:
    if not text.isdecimal() or not least <= int(text) <= largest:
        raise ValueError(f"{text!r} is not a whole number from {least} to {largest:,}")
    return int(text)


def _nothing(argument: str) -> None:
    if argument:
        raise ValueError(f"it takes no {argument!r}")
