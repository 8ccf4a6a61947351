"""What each training's estimator gives on average, against the exact gradient; finite differences.

The exact gradient is of an ELBO that is a sum (over the places of LAVAE, over what AIR and
Discrete-AIR may find), a one-dimensional integral, or known in closed form (convolutional VAE).
An estimator without bias must agree within its error; the bias of the others is what their
docstrings say it is. The score of AIR's z_pres alone is in test_air.py.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from test_air import (
    DISCRETE,
    DISCRETE_PAPER,
    PLAIN,
    SHAPE,
    Nudged,
    case,
    density,
    exact_gradient,
    presences,
)
from test_bounds import Fixed, Prior, tiny
from test_conv_vae import SIGMA, STRIDE, linear_gaussian
from torch import Tensor
from torch.autograd import gradcheck

from pyro_scenes import affine, attention
from pyro_scenes.likelihoods import BernoulliImage
from pyro_scenes.models.air import AIR
from pyro_scenes.models.discrete_air import DiscreteAIR
from pyro_scenes.models.lavae import LAVAE, Encoded
from pyro_scenes.objectives.air import OrderedGraph_ELBO
from pyro_scenes.objectives.conv_vae import ConvVAEObjective, ConvVAESchedule
from pyro_scenes.spatial import crops, place_sprites


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def alike(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """The cosine of two gradients, and the length of the first in units of the second's."""
    found, exact = found.flatten(), exact.flatten()
    return (torch.cosine_similarity(found, exact, dim=0).item(),
            (found.norm() / exact.norm()).item())


# --- LAVAE: the gradient of a place --------------------------------------------------------------

SPRITE = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.8, 0.6], [0.3, 0.4, 0.0]]).view(1, 1, 3, 3)
SIDE = 8
COPIES = 20_000


def one_sprite(hard: bool, **likelihood) -> tuple[LAVAE, Tensor]:
    """A LAVAE that always draws SPRITE, and an image (1, 1, 8, 8) of it."""
    model = tiny((SIDE, SIDE), straight_through=hard, **likelihood)
    model.sprite_net, model.appearance_net = Fixed(SPRITE), Prior()
    x = torch.zeros(1, 1, SIDE, SIDE)
    x[..., 1:4, 0:3] = (SPRITE > 0.5).float()
    return model, x


class Given(torch.nn.Module):
    """A location network that says the same of all images."""

    stride = 1

    def __init__(self, heights: Tensor):
        super().__init__()
        self.heights = heights

    def forward(self, x: Tensor) -> Tensor:
        return self.heights.expand(len(x), -1, -1)


def exact_of_places(model: LAVAE, x: Tensor) -> Tensor:
    """The ELBO's gradient for each height, one object drawn: a sum over places, (H, W)."""
    heights = model.encode(x).heights.detach().double().requires_grad_()
    places = SIDE**2
    log_q = model._logits(Encoded(heights, torch.tensor([1]))).log_softmax(-1)[0]
    with torch.no_grad():
        drawn = place_sprites(
            SPRITE.expand(places, -1, -1, -1), torch.eye(places), torch.arange(places),
            (places, SIDE, SIDE),
        )
        log_likelihood = model.likelihood(drawn).log_prob(x).double()  # (D,)
    elbo = (log_q.exp() * (log_likelihood - math.log(places) - log_q)).sum()
    return torch.autograd.grad(elbo, heights)[0][0]


def estimates_of_places(model: LAVAE, x: Tensor) -> Tensor:
    """The same by the training's estimator, (COPIES, H, W)."""
    heights = model.encode(x).heights.detach().repeat(COPIES, 1, 1).requires_grad_()
    encoded = Encoded(heights, torch.ones(COPIES, dtype=torch.long))
    with pyro.validation_enabled(False):
        loss = Trace_ELBO().differentiable_loss(
            model.model, lambda x: model.guide(x, encoded), x.repeat(COPIES, 1, 1, 1)
        )
    return -torch.autograd.grad(loss, heights)[0].double()


@pytest.mark.parametrize("hard, limits, floor, cosine, length", [
    (False, False, 0.2, 0.99, 1.04),  # the paper's relaxed places
    (False, False, 0.03, 0.99, 1.4),
    (True, False, 0.2, 0.99, 1.14),
    (True, False, 0.03, 0.98, 3.1),  # a linearisation, at an ink pixel that is not covered
    (True, False, 0.003, 0.98, 18.0),
    (True, True, 0.2, 0.98, 1.04),  # the fast preset's
    (True, True, 0.03, 0.98, 0.72),
    (True, True, 0.003, 0.96, 0.45),
])
def test_the_bias_of_a_place_is_what_lavae_says(hard, limits, floor, cosine, length) -> None:
    model, x = one_sprite(hard, likelihood_floor=floor)
    exact = exact_of_places(model, x)
    model.temperature = 0.5
    if limits:
        model.slope, model.reach = 5.0, 5
    found = estimates_of_places(model, x)
    mean, error = found.mean(0), found.std(0) / math.sqrt(COPIES)
    assert error.norm() < 0.1 * mean.norm()  # the figures below are no noise
    one, other = alike(mean, exact)
    assert one > cosine - 0.005
    assert other == pytest.approx(length, rel=0.1)


@pytest.mark.parametrize("peak, cosine, length", [
    (0.0, 0.98, 0.65), (2.0, 0.996, 0.28), (4.0, -0.987, 0.36),
])
def test_the_bias_of_a_place_in_a_normal_image(peak, cosine, length) -> None:
    """By the fast preset's limits, of a sprite that fits, as its place becomes sure."""
    model, x = one_sprite(True, likelihood="normal", sigma=0.3)
    x[..., 1:4, 0:3] = SPRITE
    heights = model.location_net(x)
    heights[0, 2, 1] += peak
    model.location_net = Given(heights)
    exact = exact_of_places(model, x)
    model.temperature, model.slope, model.reach = 0.5, 5.0, 5
    found = estimates_of_places(model, x)
    mean, error = found.mean(0), found.std(0) / math.sqrt(COPIES)
    one, other = alike(mean, exact)
    assert error.norm() < 0.2 * mean.norm()
    assert one == pytest.approx(cosine, abs=0.01) and other == pytest.approx(length, rel=0.1)


# --- Discrete-AIR: the gradient of z_pres --------------------------------------------------------


def presence_gradients(c, temperature: float, copies: int = 2000) -> tuple[Tensor, Tensor]:
    """Mean and standard error of the ELBO's gradient for the logits of z_pres, (B, T) each."""
    model = c.model
    model.temperature = temperature
    model.presence_head = nudged = Nudged(model.presence_head, copies * len(c.x), model.steps)
    with pyro.validation_enabled(False):
        Trace_ELBO().loss_and_grads(model.model, model.guide, c.x.repeat(copies, 1, 1, 1))
    found = -nudged.nudge.grad.view(copies, len(c.x), -1).double()
    return found.mean(0), found.std(0) / math.sqrt(copies)


@pytest.mark.parametrize("config, temperature, length", [
    (DISCRETE, 1.0, 0.80), (DISCRETE, 0.5, 0.95),
    (DISCRETE_PAPER, 1.0, 0.69), (DISCRETE_PAPER, 0.5, 0.87),
], ids=["fast, 1", "fast, 0.5", "paper, 1", "paper, 0.5"])
def test_the_bias_of_a_relaxed_presence_is_what_discrete_air_says(
    config, temperature, length
) -> None:
    c = case(DiscreteAIR(config, SHAPE).eval())
    with c.pinned:
        exact = exact_gradient(c)  # (B, T)
        mean, error = presence_gradients(c, temperature)
    assert error.norm() < 0.04 * exact.norm()
    cosine, ratio = alike(mean, exact)
    assert cosine > 0.98 and ratio == pytest.approx(length, rel=0.07)
    # The image without an object: objects are to be drawn less than the relaxation says.
    assert (mean[0] > exact[0] + 3 * error[0]).all()
    assert (exact[0] < 0).all() and (exact[1:] > 0).all()


@pytest.mark.parametrize("config", [DISCRETE, DISCRETE_PAPER], ids=["fast", "paper"])
def test_straight_through_presences_mind_a_superfluous_object_more(config) -> None:
    """Of the last object, on which no later draw depends, the mean is nearer to the exact one."""
    found, errors = {}, {}
    for straight in (False, True):
        torch.manual_seed(0)
        c = case(DiscreteAIR(replace(config, straight_through=straight), SHAPE).eval())
        with c.pinned:
            exact = exact_gradient(c)[:, -1]
            mean, error = presence_gradients(c, 0.5)
        found[straight], errors[straight] = mean[:, -1] - exact, error[:, -1]
    superfluous = {straight: difference[0].item() for straight, difference in found.items()}
    assert superfluous[False] > 3 * errors[False][0] and superfluous[True] > -3 * errors[True][0]
    assert superfluous[True] < 0.6 * superfluous[False]


# --- AIR: score and path together ----------------------------------------------------------------


def by_quadrature(model: AIR, x: Tensor, offset: Tensor, nodes: int = 40) -> Tensor:
    """The ELBO of T = 1 whose z_where is pinned, summed over images: a sum and an integral."""
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    mass = torch.from_numpy(weights / weights.sum())
    values = presences(model, [0] * len(x))
    absent = [density(f, x, values).double() for f in (model.guide, model.model)]
    total = (absent[0].exp() * (absent[1] - absent[0])).sum()
    values = presences(model, [1] * len(x))
    for node, part in zip(z.tolist(), mass):
        noise = torch.full((len(x), 1), node)
        values["z_what_0"] = offset[:1] + torch.nn.functional.softplus(offset[1:] - 1) * noise
        q, p = (density(f, x, values).double() for f in (model.guide, model.model))
        # q(z_what) is in the mass of the nodes; what is left of q is that of z_pres.
        here = 1 - absent[0].exp()
        total = total + part * (here * (p - q)).sum()
    return total


class Told(torch.nn.Module):
    """An encoder of windows that says the same of all: mean and spread of z_what."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor([0.3, 0.5]))

    def forward(self, window: Tensor) -> Tensor:
        return self.offset.expand(len(window), 2)


def test_score_and_path_of_air_have_the_exact_gradient_on_average() -> None:
    """Of the presence's bias and of the mean and spread of z_what at once."""
    c = case(AIR(replace(PLAIN, max_objects=1, latent=1), SHAPE).eval())
    model, x = c.model, c.x
    del c.pinned.values["z_what_0"]
    model.encoder = Told()
    floor = 1e-3
    wanted = [model.presence_head.bias, model.encoder.offset]
    with c.pinned:
        exact = torch.autograd.grad(by_quadrature(model, x, model.encoder.offset), wanted)
        found: list[list[Tensor]] = [[], []]
        for _ in range(100):
            model.zero_grad()
            OrderedGraph_ELBO().loss_and_grads(
                model.model, model.guide, x.repeat(100, 1, 1, 1))
            for parts, parameter in zip(found, wanted):
                parts.append(-parameter.grad.double() / 100)
    for parts, truth in zip(found, exact):
        draws = torch.stack(parts)
        error = draws.std(0) / math.sqrt(len(draws))
        assert ((draws.mean(0) - truth).abs() < 4 * error + floor * truth.abs()).all()
        assert (error < 0.1 * truth.abs()).all()  # a wrong term would show


# --- the convolutional VAE: the path -------------------------------------------------------------


def test_the_path_of_the_convolutional_vae_has_the_exact_gradient_on_average() -> None:
    """Of encoder and decoder, where image and guide are Gaussian: the ELBO in closed form."""
    weight = 0.3 * torch.randn(2, 1, STRIDE, STRIDE)
    model = linear_gaussian(weight, 0.2 * torch.randn(2, STRIDE**2), torch.tensor([0.3, 1.5]))
    x = torch.randn(2, 1, 8, 4, dtype=torch.double)
    mean, log_variance = model.encoder(x).chunk(2, 1)
    scale = (0.5 * log_variance).exp()
    squares = (x - model.decode(mean)).square().sum((1, 2, 3))
    # Cells do not overlap: a variance adds its pattern's length to the squares, in every cell.
    spread = (scale.square() * model.decoder.weight.square().sum((1, 2, 3))[:, None, None])
    divergence = (0.5 * (mean**2 + scale**2 - 1) - scale.log()).sum((1, 2, 3))
    expected = (0.5 * (squares + spread.sum((1, 2, 3))) / SIGMA**2 + divergence).mean()
    exact = torch.autograd.grad(expected, list(model.parameters()))

    schedule = ConvVAESchedule(beta_full=0.0)
    objective = ConvVAEObjective(schedule, model, 1)
    found: list[list[Tensor]] = [[] for _ in exact]
    for _ in range(100):
        model.zero_grad()
        objective.backward(model, x.repeat(100, 1, 1, 1), 1)
        for parts, parameter in zip(found, model.parameters(), strict=True):
            parts.append(parameter.grad.clone())
    for parts, truth in zip(found, exact, strict=True):
        draws = torch.stack(parts)
        error = draws.std(0) / math.sqrt(len(draws))
        assert ((draws.mean(0) - truth).abs() < 5 * error + 1e-9).all()
        assert error.norm() < 0.02 * truth.norm()


# --- finite differences --------------------------------------------------------------------------


def values(*shape: int, least: float = -1.0, most: float = 1.0) -> Tensor:
    return (least + (most - least) * torch.rand(*shape, dtype=torch.double)).requires_grad_()


def pose() -> tuple[Tensor, ...]:
    """Scale, angle, shear and translation of three windows."""
    return (values(3, 2, least=0.3, most=0.8), values(3, least=-2, most=2), values(3, 2),
            values(3, 2, least=-0.4, most=0.4))


def upright(function: Callable) -> Callable:
    return lambda source, scale, place: function(source, scale, place, (6, 5))


def turned(transform: Callable) -> Callable:
    return lambda source, *arguments: affine.warp(source, transform(*arguments), (6, 5))


def several(source: Tensor, *arguments: Tensor) -> Tensor:
    return affine.windows(source[:1], affine.to_image(*arguments)[None], 4)


def placed(kind: type, config) -> Callable:
    """Templates on canvases by a model's own reading of z_where."""
    model = kind(config, SHAPE).double()
    return lambda templates, z_where: model.write(templates, z_where, SHAPE[1:])


@pytest.mark.parametrize("function, arguments", [
    (affine.to_image, pose),
    (affine.to_window, pose),
    (turned(affine.to_image), lambda: (values(3, 2, 7, 8), *pose())),
    (turned(affine.to_window), lambda: (values(3, 2, 7, 8), *pose())),
    (several, lambda: (values(1, 2, 7, 8), *pose())),
    (upright(affine.read), lambda: (values(3, 1, 7, 8), *pose()[::3])),
    (upright(affine.read), lambda: (values(3, 2, 7, 8), *pose()[::3])),
    (upright(affine.write), lambda: (values(3, 1, 7, 8), *pose()[::3])),
    (upright(affine.write), lambda: (values(3, 2, 7, 8), *pose()[::3])),
    (lambda x, place: attention.glimpse(x, place, 5), lambda: (values(3, 2, 7, 8), pose()[3])),
    (lambda x: crops(x, torch.tensor([0, 9, 55]), 3, torch.tensor([0, 2, 1])),
     lambda: (values(3, 2, 7, 8),)),
    (placed(AIR, PLAIN), lambda: (values(3, 1, 4, 4), values(3, 3))),
    (placed(DiscreteAIR, replace(DISCRETE, shear=True, isotropic=False)),
     lambda: (values(3, 1, 4, 4), values(3, 7))),
    (lambda mean: BernoulliImage(0.01)(mean).log_prob(torch.eye(3).double().expand(2, 1, 3, 3)),
     lambda: (values(2, 1, 3, 3, least=0.1, most=0.9),)),
], ids=["to_image", "to_window", "warp by to_image", "warp by to_window", "windows", "read",
        "read, colour", "write", "write, colour", "glimpse", "crops", "AIR's pose",
        "Discrete-AIR's pose", "Bernoulli"])
def test_every_transform_against_finite_differences(function, arguments) -> None:
    inputs = arguments()
    assert gradcheck(function, inputs)
    outcome = function(*inputs)
    for gradient in torch.autograd.grad(outcome.square().sum(), inputs):
        assert gradient.abs().max() > 1e-3  # it was differentiated where it has a slope
