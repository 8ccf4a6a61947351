"""Likelihood bounds against log p(x): by enumeration, and of a linear Gaussian model.

On a canvas of a few pixels log p(x) is a sum over every count and every ordered tuple of places,
times an integral over z_app of one dimension, which Gauss-Hermite quadrature does. The guide's
count is a point mass, so E_q[p(x, z) / q(z | x)] is the part of that sum that has its count.

Of the linear Gaussian model log p(x), the ELBO and each divergence are known in closed form.
"""

import itertools
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pyro.nn import pyro_method
from scipy import stats
from torch import Tensor, nn

from pyro_scenes import bounds, calibration, checkpoint, cli, machine, plots, report, swaps
from pyro_scenes.data import SceneData
from pyro_scenes.likelihoods import NormalImage
from pyro_scenes.models.base import GenerativeModel
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig
from pyro_scenes.pictures import changed
from pyro_scenes.priors import NEVER, UniformCount

FLOOR = 0.2  # high, so that no weight is worth a thousand others
CONFIG = LAVAEConfig(
    max_objects=2, latent=1, sprite=3, crop=3, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=6, sprite_hidden=(6,), count_window=3, blocked_window=1,
    count_threshold=2.0, logit_scale=0.5, likelihood_floor=FLOOR, sigma=0.7,
)
SQUARE, WIDE = (4, 4), (4, 8)


class Uneven(nn.Module):
    """A location network with moderate heights that do not depend on the image."""

    stride = 1

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        heights = torch.rand(height, width, generator=torch.Generator().manual_seed(1))
        return heights.expand(len(x), height, width)


def tiny(size: tuple[int, int] = SQUARE, **changes) -> LAVAE:
    """An untrained model, yet with uneven places, counts and appearances."""
    torch.manual_seed(0)
    model = LAVAE(replace(CONFIG, **changes), (1, *size)).eval()
    model.location_net = Uneven()
    with torch.no_grad():
        model.count_prior.logits.copy_(torch.tensor([0.2, -0.5, 0.9]))
        model.sprite_net.net[-1].weight.mul_(4)
        for layer in (0, 2, 4):
            model.appearance_net.convolutions[layer].weight.mul_(3)
        # q(z_app) is wider than the prior, so that its weights are bounded.
        model.appearance_net.head[-1].bias.copy_(torch.tensor([0.3, 0.4]))
    return model


class Fixed(nn.Module):
    """A sprite decoder that ignores z_app."""

    def __init__(self, sprite: Tensor):
        super().__init__()
        self.register_buffer("sprite", sprite)

    def forward(self, z: Tensor) -> Tensor:
        return self.sprite.expand(len(z), -1, -1, -1)


class Prior(nn.Module):
    """An appearance network whose q(z_app | z_loc, x) is the prior, N(0, 1)."""

    def forward(self, x: Tensor, places: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.zeros(len(places), 1),) * 2


def with_counts(model: LAVAE, count: int) -> LAVAE:
    """Make the guide see that many objects."""
    encode = model.encode
    model.encode = lambda x, probed=None: replace(encode(x), count=torch.full((len(x),), count))
    return model


def log_joint(model: LAVAE, x: np.ndarray, count: int, allowed: Callable = lambda *places: True,
              nodes: int = 20) -> float:
    """log of the sum over places and the integral over z_app of p(x, z, n = count), by numpy.

    :param x: (H, W). :param allowed: which ordered tuples of (row, column) to sum over.
    """
    (height, width), half = x.shape, 1
    logits = model.count_prior.logits.detach().double().numpy()
    log_count = logits[count] - np.log(np.exp(logits).sum())
    z, mass = np.polynomial.hermite_e.hermegauss(nodes)
    mass = mass / mass.sum()
    with torch.no_grad():
        sprites = model.sprite_net(torch.tensor(z[:, None], dtype=torch.float32)).double().numpy()
    cells = list(itertools.product(range(height), range(width)))
    drawn = {}  # (row, column) -> the sprite there, for each node, (Q, H, W)
    for row, column in cells:
        canvas = np.zeros((nodes, height + 2 * half, width + 2 * half))
        canvas[:, row:row + 3, column:column + 3] = sprites[:, 0]
        drawn[row, column] = canvas[:, half:half + height, half:half + width]
    total, tuples = 0.0, 0
    for places in itertools.permutations(cells, count):
        tuples += 1
        if not allowed(*places):
            continue
        mean, weight = np.zeros((1, height, width)), np.ones(1)
        for place in places:  # the outer product of the objects' nodes
            mean = (mean[:, None] + drawn[place][None]).reshape(-1, height, width)
            weight = np.outer(weight, mass).ravel()
        if model.config.likelihood == "normal":
            likelihood = stats.norm.pdf(x, mean, CONFIG.sigma).prod((1, 2))
        else:
            mean = FLOOR + (1 - 2 * FLOOR) * np.clip(mean, 0, 1)
            likelihood = np.where(x == 1, mean, 1 - mean).prod((1, 2))
        total += (weight * likelihood).sum()
    return float(log_count + np.log(total / tuples))


def image(size: tuple[int, int]) -> Tensor:
    """Two sprites' worth of ink, one of them cut by a corner."""
    x = torch.zeros(size)
    x[0:2, 0:2] = 1
    x[1:4, 2:4] = 1
    x[2, 2] = 0
    return x


def repeated(x: Tensor, times: int) -> Tensor:
    return x.expand(times, 1, *x.shape)


def not_near(one: tuple[int, int], two: tuple[int, int]) -> bool:
    return max(abs(one[0] - two[0]), abs(one[1] - two[1])) > 1


def agrees(log_weights: Tensor, truth: float, precision: float = 0.01) -> None:
    """The mean of exp(log_weights) is exp(truth): within 4 standard errors, and those are small."""
    weights = (log_weights.double() - truth).exp().flatten()
    error = weights.std() / math.sqrt(len(weights))
    assert error < precision
    assert abs(weights.mean() - 1) < 4 * error


# --- E_q[p / q] ----------------------------------------------------------------------------------


def test_the_quadrature_has_converged() -> None:
    x = image(SQUARE).numpy()
    for count in (1, 2):
        coarse, fine = (log_joint(tiny(), x, count, nodes=nodes) for nodes in (14, 20))
        assert coarse == pytest.approx(fine, abs=1e-4)


def test_without_objects_the_weight_is_exact() -> None:
    model, x = with_counts(tiny(), 0), image(SQUARE)
    weights = bounds.log_weights(model, repeated(x, 3), 2)
    truth = log_joint(model, x.numpy(), 0)
    assert weights.tolist() == [[pytest.approx(truth, rel=1e-5)] * 3] * 2


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
@pytest.mark.parametrize("size, count, blocked, allowed", [
    (SQUARE, 1, 1, lambda place: True),
    (SQUARE, 2, 1, lambda *places: True),
    (SQUARE, 2, 3, not_near),  # such a guide covers a part of the posterior
    (SQUARE, 2, 13, lambda *places: True),  # no place is out of the window: the nearest serve
    (WIDE, 1, 1, lambda place: True),
])
def test_mean_weights_are_the_exact_likelihood(size, count, blocked, allowed, likelihood) -> None:
    model = with_counts(tiny(size, blocked_window=blocked, likelihood=likelihood), count)
    x = image(size) if likelihood == "bernoulli" else 0.7 * image(size) + 0.1  # grey
    torch.manual_seed(1)
    weights = bounds.log_weights(model, repeated(x, 20), 5000, chunk=20_000)
    agrees(weights, log_joint(model, x.numpy(), count, allowed))
    assert weights.std() > 0.5  # the guide is not so good that anything would pass


def test_a_guide_that_covers_a_part_gives_a_smaller_mean() -> None:
    x = image(SQUARE).numpy()
    assert log_joint(tiny(), x, 2, not_near) < log_joint(tiny(), x, 2) - 0.1


def test_a_normal_mean_is_the_sum_of_sprites_also_beyond_1() -> None:
    model = with_counts(tiny(likelihood="normal", sigma=0.7), 2)
    model.sprite_net, model.appearance_net = Fixed(torch.full((1, 1, 3, 3), 0.9)), Prior()
    x = 2 * image(SQUARE)
    torch.manual_seed(2)
    weights = bounds.log_weights(model, repeated(x, 20), 5000, chunk=20_000)
    agrees(weights, log_joint(model, x.numpy(), 2, nodes=1), 0.03)


@pytest.mark.parametrize("size", [SQUARE, WIDE])
def test_other_sizes_than_the_trained_one(size) -> None:
    """Made for 4 x 8 and 4 x 4, evaluated on the other; sprites add up beyond 1 here."""
    model = with_counts(tiny(WIDE if size == SQUARE else SQUARE), 2)
    sprite = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.8, 0.6], [0.3, 0.4, 0.0]]).view(1, 1, 3, 3)
    model.sprite_net, model.appearance_net = Fixed(sprite), Prior()
    x = image(size)
    torch.manual_seed(2)
    weights = bounds.log_weights(model, repeated(x, 20), 5000, chunk=20_000)
    agrees(weights, log_joint(model, x.numpy(), 2, nodes=1), 0.02)


def test_only_the_gradient_of_places_is_relaxed() -> None:
    """The temperature of a training leaves the figures as they are."""
    model, x = with_counts(tiny(), 2), repeated(image(SQUARE), 5)
    torch.manual_seed(3)
    exact = bounds.log_weights(model, x, 10)
    model.temperature = 0.5
    torch.manual_seed(3)
    assert torch.equal(bounds.log_weights(model, x, 10), exact)


# --- the bound -----------------------------------------------------------------------------------


def test_the_bound_rises_to_the_exact_likelihood_and_stays_below() -> None:
    model, x = with_counts(tiny(), 2), image(SQUARE)
    truth = log_joint(model, x.numpy(), 2)
    torch.manual_seed(4)
    means = []
    for particles, repeats in ((1, 4000), (10, 2000), (100, 1000), (1000, 200)):
        found = bounds.iwae(model, repeated(x, repeats), particles, chunk=20_000).double()
        assert found.shape == (repeats,)
        error = found.std() / math.sqrt(repeats)
        assert found.mean() < truth + 3 * error
        means.append((found.mean().item(), error.item()))
    for (before, _), (after, spread) in zip(means, means[1:]):
        assert after > before + 3 * spread
    assert truth - means[0][0] > 0.3 and abs(truth - means[-1][0]) < 0.02


def test_the_bound_is_one_for_the_whole_likelihood() -> None:
    """What the guide's count leaves out of the sum makes the figure worse, never better."""
    x = image(SQUARE)
    parts = [log_joint(tiny(), x.numpy(), count) for count in range(3)]
    torch.manual_seed(5)
    found = [bounds.iwae(with_counts(tiny(), n), repeated(x, 20), 500, 8000) for n in range(3)]
    whole = np.logaddexp.reduce(parts)
    for bound, part in zip(found, parts):
        assert bound.mean().item() == pytest.approx(part, abs=0.05)
        assert bound.mean().item() < whole - 0.1


@pytest.mark.parametrize("chunk", [1, 7, 50, 10_000])
def test_chunks_do_not_change_the_estimator(chunk, monkeypatch) -> None:
    # Nothing is random but the place, of which there are two: every weight is one of two numbers.
    model, x = with_counts(tiny(), 1), image(SQUARE)
    model.sprite_net, model.appearance_net = Fixed(torch.full((1, 1, 3, 3), 0.6)), Prior()
    heights = torch.zeros(SQUARE)
    heights[0, 0], heights[2, 3] = 20.0, 20.0 + 0.5 / math.log(4)  # gamma = 0.5 log(16) = log 4
    encode = model.encode
    model.encode = lambda x, probed=None: replace(
        encode(x), heights=heights.expand(len(x), *SQUARE))
    seen = []
    plain = bounds._terms
    monkeypatch.setattr(bounds, "_terms", lambda m, x, k: seen.append(k) or plain(m, x, k))
    torch.manual_seed(6)
    weights = bounds.log_weights(model, repeated(x, 4), 100, chunk)
    assert weights.shape == (100, 4) and sum(seen) == 100
    assert max(seen) * 4 <= max(chunk, 4)
    # The logits differ by one half, so q is 1 : e^0.5.
    q = {(0, 0): 1 / (1 + math.exp(0.5)), (2, 3): 1 / (1 + math.exp(-0.5))}
    expected = [
        log_joint(model, x.numpy(), 1, lambda at, place=place: at == place) - math.log(mass)
        for place, mass in q.items()
    ]
    first, second = (torch.isclose(weights, torch.tensor(w), atol=1e-4) for w in expected)
    assert (first ^ second).all()
    assert first.float().mean() == pytest.approx(q[0, 0], abs=0.08)


def test_the_bound_is_the_mean_of_the_weights() -> None:
    model, x = with_counts(tiny(), 2), repeated(image(SQUARE), 3)
    torch.manual_seed(7)
    weights = bounds.log_weights(model, x, 11).double().exp()
    torch.manual_seed(7)
    bound = bounds.iwae(model, x, 11)
    assert bound.dtype == x.dtype
    assert np.allclose(bound, weights.mean(0).log(), rtol=1e-5)


# --- a linear Gaussian model ---------------------------------------------------------------------


class Linear(GenerativeModel):
    """x = A (z_0, z_1, w) + noise of deviation 0.5, with a guide that is a little too wide.

    :param wide: how many times the deviation of the exact posterior's marginals the guide's is.
    """

    image_shape = (1, 2, 2)

    def __init__(self, wide: float = 1.3):
        super().__init__()
        self.likelihood = NormalImage(0.5)
        weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight.double())  # A
        covariance = torch.linalg.inv(torch.eye(3) + weight.T @ weight / 0.25).double()
        self.read = nn.Buffer(covariance @ weight.T.double() / 0.25)  # x -> mean of the posterior
        self.scale = nn.Buffer(wide * covariance.diagonal().sqrt())

    @pyro_method
    def model(self, x: Tensor) -> None:
        with pyro.plate("images", len(x), dim=-1):
            names = "z_0", "z_1", "w"
            z = [pyro.sample(name, dist.Normal(x.new_zeros(1), 1.0).to_event(1)) for name in names]
            mean = torch.cat(z, -1) @ self.weight.T
            pyro.sample("x", self.likelihood(mean.unflatten(-1, self.image_shape)), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        mean = self.posterior(x)
        with pyro.plate("images", len(x), dim=-1):
            for i, name in enumerate(("z_0", "z_1", "w")):
                site = dist.Normal(mean[:, i : i + 1], self.scale[i]).to_event(1)
                pyro.sample(name, site)

    def posterior(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.read.T

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x), (B,)."""
        covariance = self.weight @ self.weight.T + 0.25 * torch.eye(4)
        return dist.MultivariateNormal(x.new_zeros(4), covariance).log_prob(x.flatten(1)).detach()

    def divergences(self, x: Tensor) -> Tensor:
        """KL(q || p) of each latent number, (B, 3)."""
        return (self.posterior(x) ** 2 + self.scale**2 - 1) / 2 - self.scale.log()

    def elbo(self, x: Tensor) -> Tensor:
        """E log p(x | z) is its value at the mean less what the variances add to the squares."""
        at_mean = (self.posterior(x) @ self.weight.T).view(x.shape)
        log_prob = self.likelihood(at_mean).log_prob(x)
        spread = (self.weight**2 @ self.scale**2).sum() / 0.5
        return (log_prob - spread - self.divergences(x).sum(-1)).detach()


def seen(images: int) -> Tensor:
    x = torch.randn(images, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return 1.5 * x.double()


def by_hand(weights: np.ndarray, size: int) -> np.ndarray:
    """The bound at K = size of log weights (K, B): the mean over groups of those in turn."""
    groups = [weights[i : i + size] for i in range(0, len(weights) - size + 1, size)]
    return np.mean([np.log(np.exp(group).mean(0)) for group in groups], 0)


@pytest.mark.parametrize("particles, sizes", [
    (1, (1,)), (2, (1, 2)), (10, (1, 10)), (11, (1, 10, 11)), (100, (1, 10, 100)),
    (137, (1, 10, 100, 137)), (2000, (1, 10, 100, 1000, 2000)),
])
def test_the_bound_is_taken_at_powers_of_ten_and_all(particles, sizes) -> None:
    assert bounds.sizes(particles) == sizes


def test_bounds_of_one_pass_rise_to_the_evidence_and_stay_below() -> None:
    model, x = Linear(), seen(1).expand(400, 1, 2, 2)
    torch.manual_seed(0)
    found = bounds.estimate(model, x, 1000, chunk=40_000)
    truth, elbo = model.log_evidence(x)[0], model.elbo(x)[0]
    assert found.particles == (1, 10, 100, 1000) and found.bounds.shape == (4, 400)
    means, errors = found.bounds.mean(1), found.bounds.std(1) / 20
    assert truth - elbo > 5 and errors.max() < 0.03
    assert abs(means[0] - elbo) < 4 * errors[0]
    assert (means.diff() > 3 * errors[1:]).all()
    assert (means < truth + 3 * errors).all() and truth - means[-1] < 0.01


def test_a_bound_at_small_k_varies_less_than_one_of_so_many_particles() -> None:
    """And has the same expectation."""
    model, x = Linear(), seen(1).expand(2000, 1, 2, 2)
    torch.manual_seed(0)
    grouped = bounds.estimate(model, x, 100, chunk=50_000).bounds[1]
    alone = bounds.iwae(model, x, 10, chunk=50_000)
    assert alone.std() / grouped.std() == pytest.approx(math.sqrt(10), rel=0.15)
    assert abs(alone.mean() - grouped.mean()) < 4 * alone.std() / math.sqrt(2000)


@pytest.mark.parametrize("chunk", [6, 20, 50, 100_000])
def test_streaming_is_the_computation_at_once(chunk) -> None:
    """Groups of 10 and 100 begin and end inside chunks of 2, 6, 16 and 137 particles."""
    model, x = Linear(), seen(3)
    torch.manual_seed(1)
    weights = bounds.log_weights(model, x, 137, chunk).numpy()
    torch.manual_seed(1)
    found = bounds.estimate(model, x, 137, chunk)
    assert weights.shape == (137, 3)
    for size, bound in zip(found.particles, found.bounds, strict=True):
        np.testing.assert_allclose(bound, by_hand(weights, size), rtol=1e-9)
    # All by hand, without groups.
    np.testing.assert_allclose(found.bounds[0], weights.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.bounds[3], np.log(np.exp(weights).mean(0)), rtol=1e-9)
    w = np.exp(weights)
    np.testing.assert_allclose(found.effective, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-9)
    torch.manual_seed(1)
    assert torch.equal(bounds.iwae(model, x, 137, chunk), found.bounds[-1])


def test_only_one_chunk_is_held_at_a_time(monkeypatch) -> None:
    """Whatever is made of a chunk, its weights are gone when the next but one is drawn."""
    drawn: list = []
    most: list = []
    plain = bounds._terms

    def watched(model: GenerativeModel, x: Tensor, particles: int) -> dict[str, Tensor]:
        terms = plain(model, x, particles)
        most.append(sum(chunk() is not None for chunk in drawn))
        drawn.append(weakref.ref(terms["reconstruction"]))
        assert particles * len(x) <= 20
        return terms

    monkeypatch.setattr(bounds, "_terms", watched)
    bounds.estimate(Linear(), seen(2), 1000, chunk=20)
    assert len(drawn) == 100 and max(most) <= 1


def weighted(monkeypatch, weights: Tensor) -> bounds.Estimate:
    """Of the log weights (K, B), a particle at a time."""
    rows = iter(weights.double())
    monkeypatch.setattr(bounds, "_terms", lambda *_: {"reconstruction": next(rows)[None]})
    images = weights.shape[1]
    return bounds.estimate(Linear(), seen(images), len(weights), chunk=images)


def test_how_many_particles_count(monkeypatch) -> None:
    """All that are alike; one, if it outweighs the others; half, if the others have no weight."""
    weights = torch.full((10, 4), -700.0)  # their exponentials are 0
    weights[3, 1] = 0.0
    weights[::2, 2] = -math.inf
    weights[:, 3] = -math.inf
    found = weighted(monkeypatch, weights)
    assert found.effective.tolist() == pytest.approx([10, 1, 5, 0])
    expected = [-700, -math.log(10), -700 - math.log(2), -math.inf]
    assert found.bounds[-1].tolist() == pytest.approx(expected)


def test_an_impossible_image_spoils_no_other() -> None:
    """The guide finds no object, and the prior has at least one."""
    model = tiny()
    encode = model.encode
    model.encode = lambda x, probed=None: replace(encode(x), count=torch.arange(len(x)))
    with model.priors(count=UniformCount(1, 2)):
        found = bounds.estimate(model, repeated(image(SQUARE), 2), 20)
    assert found.bounds[:, 0].tolist() == [-math.inf] * 3 and found.bounds[:, 1].isfinite().all()
    assert found.effective[0] == 0 and 1 <= found.effective[1] <= 20


@pytest.mark.parametrize("nats", [-math.inf, NEVER])
def test_no_sample_counts_of_an_image_that_cannot_be(monkeypatch, nats) -> None:
    """A count without mass costs infinitely much, and a presence as good as that."""
    found = weighted(monkeypatch, torch.tensor([[nats, -1.0], [nats, -2.0]]))
    w = math.exp(-1)
    assert found.effective.tolist() == pytest.approx([0, (1 + w) ** 2 / (1 + w**2)])


@pytest.mark.parametrize("side, number", [(32, 100), (64, 100), (128, 25), (1000, 1)])
def test_fewer_large_images_are_taken_at_a_time(side, number) -> None:
    data = SceneData.from_images("large", np.zeros((2, side, side, 1), np.uint8))
    assert machine.at_a_time(100, *data.shape[:2]) == number


def test_large_images_are_measured_a_few_at_a_time(monkeypatch) -> None:
    data = SceneData.from_images("large", np.zeros((5, 128, 64, 1), np.uint8))
    sizes, estimate = [], bounds.estimate

    def noted(model, x, *arguments):
        sizes.append(len(x))
        return estimate(model, x[..., :2, :2].double(), *arguments)

    monkeypatch.setattr(bounds, "estimate", noted)
    monkeypatch.setattr(bounds, "CHUNKS", {"cpu": 4})
    assert bounds.measure(Linear(), data, 1).bounds.shape == (1, 5)
    assert sizes == [2, 2, 1]


class Wide(GenerativeModel):
    """Notes how many images it has at a time."""

    image_shape = (1, 128, 64)
    appearance_site = "none"

    def __init__(self):
        super().__init__()
        self.mean, self.seen = nn.Parameter(torch.zeros(())), []

    @pyro_method
    def model(self, x: Tensor) -> None:
        with pyro.plate("images", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.mean, torch.ones(len(x))))
            mean = z[..., None, None, None].expand(*z.shape, *self.image_shape)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(3), obs=x)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        self.seen.append(len(x))
        with pyro.plate("images", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    def draw(self, count: int) -> tuple[Tensor, Tensor | None]:
        self.seen.append(count)
        return super().draw(count)

    def counts(self, trace: Any) -> Tensor:
        return trace.nodes["z"]["value"].long()


def test_large_images_are_drawn_looked_at_and_ranked_a_few_at_a_time(monkeypatch) -> None:
    model = Wide()
    monkeypatch.setattr(changed, "BATCH", 4)
    assert len(changed.sample(model, 5)) == 5 and model.seen == [2, 2, 1]
    model, data = Wide(), SceneData.from_images("wide", np.zeros((5, 128, 64, 1), np.uint8))
    monkeypatch.setattr(swaps, "ENCODED", 4)
    assert len(swaps.look(model, data, progress=False).counts) == 5 and model.seen == [2, 2, 1]
    model = Wide()
    monkeypatch.setattr(calibration, "CHUNKS", {"cpu": 16})
    assert len(calibration.measure(model, 5, draws=4).values["z"]) == 5
    assert model.seen == [2, 2, 1]


# --- the split -----------------------------------------------------------------------------------


def test_the_split_is_that_of_the_elbo() -> None:
    model, x = Linear(), seen(4)
    torch.manual_seed(2)
    found = bounds.estimate(model, x, 4000, chunk=1000)
    assert list(found.split) == ["reconstruction", "z", "w"]
    total = torch.stack(list(found.split.values())).sum(0)
    assert torch.allclose(total, -found.bounds[0], rtol=1e-12)
    divergences = model.divergences(x).detach()
    assert (found.split["z"] - divergences[:, :2].sum(1)).abs().max() < 0.1
    assert (found.split["w"] - divergences[:, 2]).abs().max() < 0.1
    expected = -model.elbo(x) - divergences.sum(1)
    assert (found.split["reconstruction"] - expected).abs().max() < 0.2
    assert divergences[:, :2].sum(1).min() > 0.5 and divergences[:, 2].min() > 0.2  # not for noise


def test_a_guide_of_the_priors_has_no_divergence() -> None:
    model = Linear()
    model.read.zero_()
    model.scale.fill_(1.0)
    found = bounds.estimate(model, seen(3), 7)
    assert found.split["z"].abs().max() < 1e-12 and found.split["w"].abs().max() < 1e-12
    assert torch.allclose(found.split["reconstruction"], -found.bounds[0])


@pytest.mark.parametrize("name, latents", [
    ("lavae-multi-dsprites", ["n", "z_loc", "z_app"]),
    ("air-multi-sprites", ["z_pres", "z_where", "z_what"]),
    ("discrete-air-multi-mnist", ["z_pres", "z_where", "z_cat", "z_attr"]),
])
def test_objects_of_an_image_are_taken_together(name, latents) -> None:
    model = checkpoint.load(name).model
    torch.manual_seed(0)
    x = (torch.rand(2, *model.image_shape) < 0.1).float()
    found = bounds.estimate(model, x, 3)
    assert set(found.split) == {"reconstruction", *latents}
    total = torch.stack(list(found.split.values())).sum(0)
    assert torch.allclose(total, -found.bounds[0], rtol=1e-9)


def test_the_split_of_a_count_is_exact() -> None:
    model, x = with_counts(tiny(), 2), repeated(image(SQUARE), 3)
    found = bounds.estimate(model, x, 5)
    log_count = model.count_prior.logits.detach().log_softmax(-1)[2].item()
    assert found.split["n"].tolist() == pytest.approx([-log_count] * 3)


# --- a data set ----------------------------------------------------------------------------------


def inks() -> SceneData:
    """Images without ink, of a dot and all of ink."""
    pixels = np.zeros((3, 4, 4, 1), np.uint8)
    pixels[1, 1, 1] = pixels[2] = 255
    return SceneData.from_images("inks", pixels)


def test_images_of_a_data_set_come_in_order() -> None:
    model, data = with_counts(tiny(), 1), inks()
    torch.manual_seed(0)
    in_parts = bounds.measure(model, data, 2000, chunk=2000)
    at_once = bounds.measure(model, data, 2000, chunk=10_000)
    alone = bounds.iwae(model, data.batch(), 2000)
    assert in_parts.bounds.shape == (4 + 1, 3) and in_parts.effective.shape == (3,)
    assert torch.allclose(in_parts.bounds[-1], at_once.bounds[-1], atol=0.06)
    assert torch.allclose(in_parts.bounds[-1], alone.double(), atol=0.06)
    assert alone.diff().abs().min() > 0.12  # images differ by more than noise


def test_a_seed_tells_the_draws_whatever_came_before() -> None:
    """Chunks of alike images have draws of their own."""
    model = with_counts(tiny(), 1)
    data = SceneData.from_images("alike", np.zeros((3, 4, 4, 1), np.uint8))
    one, again, other = (
        bounds.measure(model, data, 4, chunk=4, seed=seed).bounds for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and (one != other).any()
    assert len(one[-1].unique()) == 3


def test_a_site_that_an_image_lacks_adds_nothing_to_it() -> None:
    model, data = tiny(), inks()
    encode = model.encode
    model.encode = lambda x, probed=None: replace(encode(x), count=(x.amax((1, 2, 3)) > 0).long())
    found = bounds.measure(model, data, 6, chunk=6)  # an image at a time
    assert list(found.split) == ["reconstruction", "n", "z_loc", "z_app"]
    assert found.split["z_loc"][0] == 0 and (found.split["z_loc"][1:] != 0).all()
    total = torch.stack(list(found.split.values())).sum(0)
    assert torch.allclose(total, -found.bounds[0], rtol=1e-12)


def test_a_bernoulli_likelihood_has_no_density_of_grey_images() -> None:
    data = inks()
    grey = SceneData.from_images("grey", data.images() // 2)
    assert bounds.applies(tiny(), data) and not bounds.applies(tiny(), grey)
    assert bounds.applies(Linear(), data) and bounds.applies(Linear(), grey)


# --- what is printed and drawn -------------------------------------------------------------------

FIGURES: dict[str, Any] = {
    "particles": 2000,
    "curve": [
        {"particles": 1, "nll": 52.0, "nll_stderr": 0.5},
        {"particles": 2000, "nll": 41.128, "nll_stderr": 0.25},
    ],
    "ess": {"mean": 312.34, "median": 101.0, "decile": 1.26},
    "split": {"reconstruction": 20.0, "n": 1.5, "z_loc": 30.5},
    "entropy": None,
}


def test_the_likelihood_is_printed_in_parts() -> None:
    assert report.likelihood(FIGURES).splitlines() == [
        "particles  -log p(x) <= (nats)",
        "1          52.00 +- 0.50",
        "2,000      41.13 +- 0.25",
        "",
        "particles that count, of 2,000: 312.3 on average, 101.0 in the median image,"
        " at most 1.3 in one of ten",
        "parts at 1 particle (nats): reconstruction 20.00 + n 1.50 + z_loc 30.50 = 52.00",
    ]
    alone = [{"particles": 1, "nll": 52.0, "nll_stderr": None}]
    assert report.likelihood(FIGURES | {"curve": alone}).splitlines()[1] == "1          52.00"


@pytest.mark.parametrize("entropy", [None, 30.0])
def test_the_curve_is_drawn_with_its_errors_and_the_entropy(entropy, tmp_path) -> None:
    figure = plots.bound_figure(FIGURES["curve"], entropy)
    (axes,) = figure.axes
    ((line, caps, (bars,)),) = axes.containers
    assert line.get_xydata().tolist() == [[1, 52.0], [2000, 41.128]]
    assert [cap.get_ydata().tolist() for cap in caps] == [[51.5, 40.878], [52.5, 41.378]]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2,000"]
    lines = [np.asarray(line.get_ydata()) for line in axes.lines]
    level = [line[0] for line in lines if len(set(line)) == 1]
    assert level == ([] if entropy is None else [entropy])
    if entropy:
        assert axes.get_ylim()[0] < entropy  # the line is in the picture
    plots.save(figure, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 300


def test_the_curve_of_a_single_particle_and_image_is_a_point(tmp_path) -> None:
    point = {"particles": 1, "nll": 52.0, "nll_stderr": None}
    plots.save(plots.bound_figure([point]), tmp_path / "curve.png")
    with pytest.raises(ValueError, match="at least one point"):
        plots.bound_figure([])


# --- the command ---------------------------------------------------------------------------------


def evaluated(line: str):
    return CliRunner().invoke(cli.evaluate, line.split())


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch) -> Path:
    """A folder with binary and grey scenes for the shipped LAVAE, made the current one."""
    pixels = np.zeros((3, 64, 64, 3), np.uint8)
    pixels[1:, 20:30, 20:30, 1] = 255
    np.savez(tmp_path / "binary.npz", images=pixels)
    np.savez(tmp_path / "grey.npz", images=pixels // 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_svi_eval_draws_the_curve_and_writes_it(scenes: Path) -> None:
    result = evaluated("lavae-multi-dsprites --data binary.npz --particles 12 --chunk 5"
                       " --curve out/curve.png --json figures.json --seed 4")
    assert result.exit_code == 0, result.output
    figures = json.loads((scenes / "figures.json").read_text())
    assert [point["particles"] for point in figures["curve"]] == [1, 10, 12]
    assert figures["curve"][-1]["nll"] == figures["nll"]
    assert figures["curve"][-1]["nll_stderr"] == figures["nll_stderr"]
    assert sum(figures["split"].values()) == pytest.approx(figures["curve"][0]["nll"])
    assert 1 <= figures["ess"]["decile"] <= figures["ess"]["median"] <= 12
    assert report.likelihood(figures) in result.stdout
    with Image.open("out/curve.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize("options, reason", [
    ("--data grey.npz --curve curve.png", "grey"),
    ("--data binary.npz --curve curve.txt", "end its name in"),
    ("--data binary.npz --curve binary.npz", "binary.npz exists"),
    ("--data binary.npz --chunk 0", "--chunk"),
])
def test_svi_eval_refuses_before_it_measures(scenes: Path, options: str, reason: str) -> None:
    result = evaluated(f"lavae-multi-dsprites {options}")
    assert result.exit_code == 2 and reason in result.stderr
    assert "Traceback" not in result.output and "-log p(x)" not in result.stdout
    assert {path.name for path in scenes.iterdir()} == {"binary.npz", "grey.npz"}


def test_grey_images_have_no_likelihood_to_print(scenes: Path) -> None:
    result = evaluated("lavae-multi-dsprites --data grey.npz --json figures.json")
    assert result.exit_code == 0, result.output
    figures = json.loads((scenes / "figures.json").read_text())
    assert [figures[key] for key in ("nll", "curve", "ess", "split")] == [None] * 4
    assert "particles" not in result.stdout
