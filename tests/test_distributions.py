"""One-hot sites against exact probabilities, and the masses of priors and likelihood by hand."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from scipy import stats

from pyro_scenes.distributions import OneHotPlace, one_hot
from pyro_scenes.errors import UserError
from pyro_scenes.likelihoods import BernoulliImage, NormalImage
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig
from pyro_scenes.priors import LearnedCount, StandardNormal, UniformCount, UniformPlaces

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.9])  # not normalised
MASSES = np.exp(LOGITS.double().numpy()) / np.exp(LOGITS.double().numpy()).sum()
DRAWS = 40_000


def frequencies(tuples: torch.Tensor, size: int = 4) -> dict[tuple[int, ...], int]:
    """How often each ordered tuple occurs. :param tuples: (N, slots) long."""
    found, counts = np.unique(tuples.numpy(), axis=0, return_counts=True)
    return {tuple(key): int(count) for key, count in zip(found.tolist(), counts)}


def fits(observed: dict[tuple[int, ...], int], masses: dict[tuple[int, ...], float]) -> bool:
    """Whether draws agree with exact probabilities: a chi-square test at one in a thousand."""
    assert sum(masses.values()) == pytest.approx(1)
    if not observed.keys() <= masses.keys():
        return False
    total = sum(observed.values())
    table = [(observed.get(key, 0), mass * total) for key, mass in masses.items()]
    return stats.chisquare(*zip(*table)).pvalue > 1e-3


def sequential(weights: np.ndarray, slots: int) -> dict[tuple[int, ...], float]:
    """Exact probabilities of ordered tuples drawn without replacement, weights renormalised."""
    masses = {}
    for key in itertools.permutations(range(len(weights)), slots):
        left, mass = weights.sum(), 1.0
        for place in key:
            mass *= weights[place] / left
            left -= weights[place]
        masses[key] = mass
    return masses


def test_the_chi_square_test_can_fail() -> None:
    masses: dict[tuple[int, ...], float] = {(0,): 0.25, (1,): 0.75}
    assert fits({(0,): 2510, (1,): 7490}, masses)
    assert not fits({(0,): 2800, (1,): 7200}, masses)
    assert not fits({(0,): 2500, (1,): 7499, (2,): 1}, masses)


@pytest.mark.parametrize("temperature, hard", [(None, True), (None, False), (0.3, True)])
def test_draws_follow_the_softmax_of_the_logits(temperature, hard) -> None:
    torch.manual_seed(0)
    drawn = OneHotPlace(LOGITS, temperature, hard).sample((DRAWS,))
    assert drawn.shape == (DRAWS, 4)
    assert ((drawn == 1).sum(-1) == 1).all() and ((drawn == 0).sum(-1) == 3).all()
    observed = frequencies(drawn.argmax(-1, keepdim=True))
    assert fits(observed, {(d,): mass for d, mass in enumerate(MASSES)})


def test_a_relaxed_draw_has_its_peak_where_an_exact_draw_falls() -> None:
    torch.manual_seed(0)
    drawn = OneHotPlace(LOGITS, 0.5, hard=False).sample((DRAWS,))
    assert torch.allclose(drawn.sum(-1), torch.ones(DRAWS))
    assert 0.1 < drawn.amax(-1).min() < 0.9  # not one-hot
    observed = frequencies(drawn.argmax(-1, keepdim=True))
    assert fits(observed, {(d,): mass for d, mass in enumerate(MASSES)})


def test_log_prob_is_the_mass() -> None:
    places = torch.eye(4)
    for site in (OneHotPlace(LOGITS), OneHotPlace(LOGITS, 0.3), OneHotPlace(LOGITS, 0.3, False)):
        assert np.allclose(site.log_prob(places).exp(), MASSES, rtol=1e-6)


def test_log_prob_of_a_relaxed_vector_is_linear() -> None:
    z = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = (z.numpy() * np.log(MASSES)).sum()
    assert OneHotPlace(LOGITS, 0.5, hard=False).log_prob(z).item() == pytest.approx(expected)


def test_the_gradient_of_log_prob_against_finite_differences() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    value = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, z: OneHotPlace(a).log_prob(z), (logits, value))


def relaxed(logits: np.ndarray, uniform: np.ndarray, temperature: float) -> np.ndarray:
    """The Gumbel-softmax vector of the noise (Jang et al. 2016, equation 2)."""
    scaled = np.exp((logits - np.log(-np.log(uniform))) / temperature)
    return scaled / scaled.sum(-1, keepdims=True)


@pytest.mark.parametrize("hard", [True, False])
def test_the_gradient_is_that_of_the_relaxed_vector_with_the_same_noise(hard) -> None:
    temperature, weights = 0.7, torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    logits = LOGITS.double().expand(2, 3, 4).clone().requires_grad_()
    torch.manual_seed(3)
    drawn = OneHotPlace(logits, temperature, hard).rsample()
    (drawn * weights).sum().backward()
    torch.manual_seed(3)
    uniform = torch.rand(2, 3, 4, dtype=torch.float64).numpy()
    soft = relaxed(LOGITS.double().numpy(), uniform, temperature)
    # d(w . s)/d logit_j = s_j (w_j - w . s) / temperature for s = softmax(. / temperature).
    w = weights.numpy()
    expected = soft * (w - (soft * w).sum(-1, keepdims=True)) / temperature
    assert np.allclose(logits.grad.numpy(), expected, atol=1e-12)
    value = drawn.detach().numpy()
    if hard:
        assert (value == np.eye(4)[soft.argmax(-1)]).all()
    else:
        assert np.allclose(value, soft, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_straight_through_value_is_exactly_one_hot(dtype) -> None:
    torch.manual_seed(0)
    # A high temperature, where soft - soft.detach() would show any rounding, and a low one.
    for temperature in (0.02, 5.0):
        drawn = OneHotPlace(torch.randn(200, 50, dtype=dtype), temperature).rsample()
        assert drawn.dtype == dtype
        assert ((drawn == 0) | (drawn == 1)).all() and (drawn.sum(-1) == 1).all()


def test_an_exact_draw_has_no_gradient() -> None:
    assert not OneHotPlace(LOGITS.clone().requires_grad_()).rsample().requires_grad


def test_shapes_and_expand() -> None:
    site = OneHotPlace(torch.randn(2, 1, 5), 0.4, hard=False)
    assert (site.batch_shape, site.event_shape) == ((2, 1), (5,))
    wide = site.expand((3, 2, 4))
    assert (wide.batch_shape, wide.event_shape) == ((3, 2, 4), (5,))
    assert (wide.temperature, wide.hard) == (0.4, False)
    drawn = wide.rsample((6,))
    assert drawn.shape == (6, 3, 2, 4, 5)
    assert wide.log_prob(drawn).shape == (6, 3, 2, 4)
    assert torch.allclose(wide.log_prob(drawn), site.log_prob(drawn), atol=1e-6)
    assert (drawn[:, 0, 0, 0] != drawn[:, 0, 0, 1]).any()  # expanded draws are independent


def test_one_hot() -> None:
    assert one_hot(torch.tensor([[2, 0]]), 3).tolist() == [[[0, 0, 1], [1, 0, 0]]]


# --- without replacement -------------------------------------------------------------------------


def draw_places(steps: int, draws: int = DRAWS) -> torch.Tensor:
    """Ordered tuples of places of D = 4 from the prior, (draws, steps)."""
    used, places = torch.zeros(draws, 4), []
    for _ in range(steps):
        z = UniformPlaces()(used).sample()
        used = used + z
        places.append(z.argmax(-1))
    return torch.stack(places, -1)


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_the_prior_draws_uniformly_without_replacement(slots) -> None:
    torch.manual_seed(1)
    tuples = list(itertools.permutations(range(4), slots))
    masses = {key: 1 / len(tuples) for key in tuples}
    assert fits(frequencies(draw_places(slots)), masses)
    # The density says the same of every tuple, those with a repeated place included.
    for key in itertools.product(range(4), repeat=slots):
        used, log_prob = torch.zeros(4), 0.0
        for place in key:
            z = one_hot(torch.tensor(place), 4)
            log_prob += UniformPlaces()(used).log_prob(z).item()
            used = used + z
        assert math.exp(log_prob) == pytest.approx(masses.get(key, 0.0), abs=1e-7)


def test_the_prior_gives_no_gradient_to_earlier_places() -> None:
    used = torch.zeros(4, requires_grad=True)
    assert not UniformPlaces()(used).log_prob(torch.eye(4)[0]).requires_grad


@pytest.mark.parametrize("slots", [2, 3])
def test_the_guide_draws_sequentially_when_only_the_drawn_place_is_shut(slots) -> None:
    model = LAVAE(
        LAVAEConfig(latent=1, sprite=3, crop=3, location_width=8, location_blocks=1,
                    appearance_width=2, appearance_hidden=2, sprite_hidden=(2,), blocked_window=1),
        (1, 4, 4),
    )
    masses = sequential(MASSES, slots)

    torch.manual_seed(2)
    logits, places = LOGITS.expand(DRAWS, 4), []
    for _ in range(slots):
        z = OneHotPlace(logits).sample()
        logits = model._shut(logits, z, 2)
        places.append(z.argmax(-1))
    assert fits(frequencies(torch.stack(places, -1)), masses)

    for key in itertools.product(range(4), repeat=slots):
        logits, log_prob = LOGITS, 0.0
        for place in key:
            z = one_hot(torch.tensor(place), 4)
            log_prob += OneHotPlace(logits).log_prob(z).item()
            logits = model._shut(logits, z, 2)
        assert math.exp(log_prob) == pytest.approx(masses.get(key, 0.0), rel=1e-3, abs=1e-7)


# --- the other priors, and the likelihood --------------------------------------------------------


def test_the_learned_count_starts_uniform_and_follows_its_logits() -> None:
    prior = LearnedCount(3)
    assert prior().probs.tolist() == pytest.approx([0.25] * 4)
    prior.logits.data = LOGITS.clone()
    assert np.allclose(prior().log_prob(torch.arange(4)).exp().detach(), MASSES, rtol=1e-6)


def test_a_uniform_count_has_mass_in_its_range_only() -> None:
    masses = UniformCount(2, 4)().log_prob(torch.arange(5)).exp()
    assert masses[:2].tolist() == [0, 0]
    assert masses[2:].tolist() == pytest.approx([1 / 3] * 3)
    torch.manual_seed(0)
    drawn = UniformCount(2, 4)().sample((3000, 1))
    assert fits(frequencies(drawn), {(n,): 1 / 3 for n in (2, 3, 4)})
    assert UniformCount(0, 0)().sample().item() == 0


@pytest.mark.parametrize("low, high", [(3, 2), (-1, 2), (-2, -1)])
def test_a_bad_range_of_counts_is_refused(low, high) -> None:
    with pytest.raises(UserError, match=f"low <= high, not {low}-{high}"):
        UniformCount(low, high)


def test_the_standard_normal() -> None:
    z = torch.tensor([[0.5, -2.0, 1.0]])
    expected = stats.norm.logpdf(z.numpy()).sum(-1)
    assert np.allclose(StandardNormal(3)().log_prob(z), expected)


def test_the_bernoulli_image_keeps_its_means_off_the_ends() -> None:
    image = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).view(1, 1, 2, 2)
    mean = torch.tensor([[0.25, 0.25, 0.0, 7.0]]).view(1, 1, 2, 2)  # sprites may add up beyond 1
    log_prob = BernoulliImage(0.1)(mean).log_prob(image)
    # 0.25 becomes 0.1 + 0.8 * 0.25 = 0.3; 0 becomes 0.1 and 7, cut to 1, becomes 0.9.
    assert log_prob.tolist() == pytest.approx([math.log(0.3 * 0.7 * 0.1 * 0.1)])


def test_the_bernoulli_image_draws_each_pixel_by_its_mean() -> None:
    torch.manual_seed(0)
    mean = torch.tensor([0.25, 1.0]).view(2, 1, 1, 1).expand(2, 1, 3, 4)
    site = BernoulliImage(0.1)(mean).expand((5, 2))
    draws = site.sample((2000,))
    assert draws.shape == (2000, 5, 2, 1, 3, 4) and ((draws == 0) | (draws == 1)).all()
    pixels = draws.transpose(2, -1).flatten(0, -2)  # one row a pixel, of the two images
    assert pixels.mean(0).tolist() == pytest.approx([0.3, 0.9], abs=0.01)
    assert (draws[:, 0] != draws[:, 1]).any()  # expanded draws are independent
    ones = draws.sum((-3, -2, -1)).double()
    expected = ones * torch.tensor([0.3, 0.9]).log() + (12 - ones) * torch.tensor([0.7, 0.1]).log()
    assert torch.allclose(site.log_prob(draws).double(), expected, atol=1e-4)


def test_the_normal_image_has_the_density_of_normal_pixels() -> None:
    rng = np.random.default_rng(0)
    image, mean = rng.random((2, 5, 3, 4, 4))
    density = NormalImage(0.3)(torch.from_numpy(mean)).expand((2, 5))
    expected = stats.norm(mean, 0.3).logpdf(image).sum((1, 2, 3))
    assert np.allclose(density.log_prob(torch.from_numpy(image)), np.stack([expected] * 2))
    torch.manual_seed(0)
    draws = NormalImage(0.3)(torch.full((1, 200, 200), 0.5)).sample()
    assert float(draws.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(draws.std()) == pytest.approx(0.3, abs=0.01)


def test_the_normal_image_refuses_what_is_no_number_where_that_is_checked() -> None:
    image = torch.full((1, 2, 2), math.nan)
    with pytest.raises(ValueError, match="value"):
        NormalImage()(torch.zeros(1, 2, 2)).log_prob(image)
    with pyro.validation_enabled(False):
        assert NormalImage()(torch.zeros(1, 2, 2)).log_prob(image).isnan()
