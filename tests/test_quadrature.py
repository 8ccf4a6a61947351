"""AIR and Discrete-AIR with nothing pinned: log p(x) of one object at most, by numerical integrals.

p(x) is that of the empty canvas, and the integral over the object's scale, its place in x and y
and its appearance, summed over categories: Gauss-Hermite for the first and the last, trapezoids
for the place, along which bilinear windows have kinks. Windows are drawn by numpy. The guide is as
wide as the prior, so that it covers the posterior and its weights have a mean.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_air import DISCRETE, DISCRETE_PAPER, PLAIN, PLAIN_PAPER, SHAPE, density, draw, presences
from torch import Tensor, nn

from pyro_scenes import bounds, nets
from pyro_scenes.models.air import AIR
from pyro_scenes.models.attend import Attend
from pyro_scenes.models.discrete_air import SPREAD, DiscreteAIR
from pyro_scenes.priors import UniformCount

ONE = {"max_objects": 1, "sigma": 0.6, "more": 0.4}
WIDE = {"angle_deviation": 0.0, "angles": 0, **ONE}  # an angle that turns nothing
SIDE, WINDOW = SHAPE[1], 4  # of an image and of a template, pixels


def air(config=PLAIN) -> AIR:
    model = AIR(replace(config, latent=1, **ONE), SHAPE).eval()
    with torch.no_grad():
        model.decoder.net[-1].weight.mul_(5)
        model.where_head.bias[3:] = 13.0  # a deviation of 0.1 softplus(12) = 1.2
        model.encoder[-1].bias[1] = 1.84
    return model


def discrete(config=DISCRETE) -> DiscreteAIR:
    model = DiscreteAIR(replace(config, **WIDE), SHAPE).eval()
    with torch.no_grad():
        model.where_head.bias[5:] = 13.0
        model.attribute.weight.mul_(5)
        if config.networks == "fast":
            model.attributes_head.bias.view(model.classes, 2)[:, 1] = 1.84
        else:  # with networks that cost less
            model.decoder = nets.SpriteMLP(model.config.code, 1, WINDOW, (5,))
            model.encoder = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
            model.code = nn.Linear((model.config.window // 8) ** 2, model.code.out_features)
            model.code.bias[-1] = 1.84
    return model


def hats(centre: np.ndarray, scale: np.ndarray, cells: int) -> np.ndarray:
    """What each of a window's cells weighs at each pixel of a line, (..., SIDE, cells)."""
    u = (np.arange(SIDE) + 0.5) * 2 / SIDE - 1
    inside = (u - centre[..., None]) / scale[..., None]  # -1 to 1 across the window
    place = ((inside + 1) * cells - 1) / 2
    return np.clip(1 - np.abs(place[..., None] - np.arange(cells)), 0, None)


def log_evidence(model: Attend, x: np.ndarray, fine: int = 1) -> float:
    """log p(x) of (SIDE, SIDE), see the module's docstring; ``fine`` multiplies the nodes."""
    c = model.config
    z, mass = np.polynomial.hermite_e.hermegauss(9 * fine)
    mass = mass / mass.sum()
    line = np.linspace(-4.5, 4.5, 40 * fine + 1)
    of_line = np.exp(-0.5 * line**2)
    of_line /= of_line.sum()
    kinds: Sequence | np.ndarray
    if isinstance(model, DiscreteAIR):
        # Of two scales the mean counts, N(0, 1/2).
        part = 1 / (1 + np.exp(-z * math.sqrt(0.5)))
        scales = c.scale_least + (c.scale_most - c.scale_least) * part
        kinds, deviation = np.eye(c.classes), SPREAD
    else:
        scales, kinds = c.scale_mean * np.exp(c.scale_deviation * z), [None]
        deviation = c.place_deviation
    total = (1 - c.more) * np.exp(log_normal(x, np.zeros((SIDE, SIDE)), c.sigma))
    for kind in kinds:
        with torch.no_grad():
            drawn = model.templates(
                None if kind is None else torch.tensor(kind).float().expand(len(z), -1),
                torch.tensor(z[:, None]).float(),
            ).double().numpy()[:, 0]  # (nodes, S, S)
        for scale, of_scale in zip(scales, mass):
            weigh = hats(deviation * line, np.full(len(line), scale), drawn.shape[-1])
            for template, of_what in zip(drawn, mass):
                canvas = np.einsum("yri,ij,xcj->yxrc", weigh, template, weigh, optimize=True)
                density = np.exp(log_normal(x, canvas, c.sigma))
                inner = (of_line[:, None] * of_line * density).sum()
                total += c.more / len(kinds) * of_scale * of_what * inner
    return math.log(total)


def log_normal(x: np.ndarray, mean: np.ndarray, sigma: float) -> np.ndarray:
    squares = (((x - mean) / sigma) ** 2).sum((-2, -1))
    return -0.5 * squares - x.size * math.log(sigma * math.sqrt(2 * math.pi))


COPIES = 20
SLACK = 5e-3  # of the quadrature, nats


def image() -> Tensor:
    x = 0.3 * torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    x[2:5, 3:6] += 0.6
    return x


CASES: dict[str, Callable[[], Attend]] = {
    "air": air,
    "air, paper": lambda: air(PLAIN_PAPER),
    "discrete-air": discrete,
    "discrete-air, paper": lambda: discrete(
        replace(DISCRETE_PAPER, isotropic=True)),
}


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> Attend:
    torch.manual_seed(0)
    return CASES[request.param]()


def test_the_quadrature_has_converged() -> None:
    torch.manual_seed(0)
    for build in (air, discrete):
        found = build()
        coarse, fine = (log_evidence(found, image().double().numpy(), n) for n in (1, 2))
        assert coarse == pytest.approx(fine, abs=SLACK)


def weighed(model: Attend, x: Tensor) -> Tensor:
    """Log weights of 1,000 particles of as many copies of the image, (1000, COPIES)."""
    torch.manual_seed(1)
    return bounds.log_weights(model, x.expand(COPIES, 1, SIDE, SIDE), 1000, chunk=1000).double()


def test_the_bound_rises_to_the_integral_and_stays_below(model) -> None:
    """And the mean weight is the integral: every density is in the weights once."""
    x = image()
    truth = log_evidence(model, x.double().numpy())
    weights = weighed(model, x) - truth
    relative = weights.exp().flatten()
    error = relative.std() / math.sqrt(len(relative))
    assert error < 0.02 and abs(relative.mean() - 1) < 4 * error + SLACK
    means, errors = [], []
    for size in (1, 10, 100, 1000):
        found = (weights.view(-1, size, COPIES).logsumexp(1) - math.log(size)).flatten()
        means.append(found.mean().item())
        errors.append(found.std().item() / math.sqrt(len(found)))
        assert means[-1] < 3 * errors[-1] + SLACK
    assert means[0] < -0.1 and abs(means[-1]) < 0.05
    assert all(b > a - 3 * e for a, b, e in zip(means, means[1:], errors))
    assert means[1] > means[0] + 3 * errors[0] and means[2] > means[1]


def test_a_wrong_density_would_show(model) -> None:
    """A guide that says that it is a tenth wider than it draws moves the mean weight too far."""
    x = image()
    truth = log_evidence(model, x.double().numpy())
    relative = (weighed(model, x) - truth + math.log(1.1)).exp().flatten()
    error = relative.std() / math.sqrt(len(relative))
    assert abs(relative.mean() - 1) > 4 * error + SLACK


# --- more steps than objects ---------------------------------------------------------------------

LONGER = {
    "air": (lambda steps: AIR(replace(PLAIN, max_objects=steps), SHAPE)),
    "air, paper": (lambda steps: AIR(replace(PLAIN_PAPER, max_objects=steps), SHAPE)),
    "discrete-air": (lambda steps: DiscreteAIR(replace(DISCRETE, max_objects=steps), SHAPE)),
    "discrete-air, paper": (
        lambda steps: DiscreteAIR(replace(DISCRETE_PAPER, max_objects=steps), SHAPE)
    ),
}


@pytest.mark.parametrize("name", LONGER)
def test_steps_beyond_the_last_object_change_no_figure(name) -> None:
    """Of models of 2 and of 5 steps with one prior over counts, at the same draws."""
    torch.manual_seed(0)
    short, long = (LONGER[name](steps).eval() for steps in (2, 5))
    long.load_state_dict(short.state_dict())
    counts = [0, 1, 0, 1]
    x = torch.rand(len(counts), *SHAPE)
    values = draw(long, x, presences(long, counts))
    for prior in (UniformCount(0, 2), UniformCount(0, 1)):
        with short.priors(count=prior), long.priors(count=prior), torch.no_grad():
            for part in ("model", "guide"):
                few, many = (
                    density(getattr(model, part), x,
                            {k: v for k, v in values.items() if int(k[-1]) < model.steps})
                    for model in (short, long)
                )
                assert torch.allclose(few, many, rtol=1e-6)
    # Where all steps of the short one are taken, the long one must say that it stops.
    both = draw(long, x, presences(long, [2] * len(x)))
    with torch.no_grad():
        few, many = (
            density(model.guide, x, {k: v for k, v in both.items() if int(k[-1]) < model.steps})
            for model in (short, long)
        )
    assert (many < few).all()
