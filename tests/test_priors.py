"""Priors by name: their densities by hand, what they are fitted to, and swapping them into models.

The masses of the counts that models start with are in test_distributions.py and test_air.py.
"""

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner, Result
from pyro import poutine
from pyro.distributions import transforms
from pyro.nn import pyro_method
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor, nn

from pyro_scenes import checkpoint, cli, pictures, priors, report, swaps
from pyro_scenes.bounds import estimate
from pyro_scenes.config import make_config
from pyro_scenes.data import SceneData, load, load_npz, save_npz
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.models import SceneModel
from pyro_scenes.models.air import AIR, AIRConfig
from pyro_scenes.models.conv_vae import ConvVAE, ConvVAEConfig
from pyro_scenes.models.discrete_air import DiscreteAIR, DiscreteAIRConfig
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig
from pyro_scenes.priors import (
    BoundedSpline,
    Count,
    Fitted,
    Flow,
    GaussianMixture,
    Kind,
    StandardNormal,
    UniformCount,
    make,
    maximised,
    normal_parts,
)

SHAPE = (3, 8, 12)
CONFIG = LAVAEConfig(
    max_objects=3, latent=2, sprite=5, crop=7, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=6, sprite_hidden=(5,), count_threshold=2.0,
    count_window=3, blocked_window=3, logit_scale=0.5, likelihood_floor=0.01,
)
SMALL: dict[str, Any] = {
    "max_objects": 2, "window": 6, "hidden": 7, "glimpse": 8, "glimpse_width": 2
}
ATTEND = AIRConfig(latent=2, decoder_hidden=(5,), encoder_hidden=(6,), **SMALL)
DISCRETE = DiscreteAIRConfig(
    classes=3, attributes=1, code=5, decoder_hidden=(6,), angles=8, **SMALL
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Dots(nn.Module):
    """A location network with a peak at each dot, pixels of ink in the first channel."""

    stride = 1

    def forward(self, x: Tensor) -> Tensor:
        return 5.0 * x[:, 0]


def lavae(**changes) -> LAVAE:
    """A model that counts dots."""
    model = LAVAE(replace(CONFIG, **changes), SHAPE).eval()
    model.location_net = Dots()
    return model


def dots(counts: list[int]) -> SceneData:
    """Scenes with so many dots each."""
    pixels = np.zeros((len(counts), *SHAPE[1:], 3), np.uint8)
    for image, count in zip(pixels, counts):
        for i in range(count):
            image[6 * (i // 3) + 1, 4 * (i % 3) + 2] = 255
    return SceneData.from_images("dots", pixels, counts=np.array(counts))


def parse(*texts: str, model=None, data="multi-dsprites", **options) -> dict[str, nn.Module]:
    return swaps.parse(texts, model or lavae(), data, progress=False, **options)


def masses(prior: nn.Module) -> list[float]:
    return prior().log_prob(torch.arange(len(prior().logits))).exp().tolist()


# --- densities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("uniform:4-5", [0, 0, 0, 0, 0.5, 0.5]),
    ("uniform:2", [0, 0, 1]),
    ("geometric:0.5", [0.5, 0.25, 0.125, 0.125]),
    ("geometric:0.2", [0.8, 0.16, 0.032, 0.008]),
    ("fit", [0.25] * 4),
])
def test_the_masses_of_counts_by_hand(text, expected) -> None:
    assert masses(make("count", text, 3)) == pytest.approx(expected)


def test_a_count_has_no_mass_beyond_its_logits() -> None:
    count = Count(logits=torch.tensor([0.0, math.log(3)])).expand([4])
    value = torch.tensor([0, 1, 2, 7])
    found = count.log_prob(value)
    assert found[:2].exp().tolist() == pytest.approx([0.25, 0.75])
    assert found[2:].tolist() == [-math.inf] * 2
    assert torch.equal(count.log_prob(value.float()), found)


def test_a_mixture_by_hand() -> None:
    mixture = make("appearance", "mixture:3", 2)
    mixture.logits.data = torch.tensor([0.3, -0.4, 1.0])
    mixture.log_scales.data.uniform_(-0.5, 0.5)
    z = torch.randn(4, 5, 2)
    weights = mixture.logits.softmax(0).detach().numpy()
    parts = [
        stats.norm.logpdf(z.numpy(), mean, scale).sum(-1) + math.log(weight)
        for weight, mean, scale in zip(
            weights, mixture.means.detach().numpy(), mixture.log_scales.exp().detach().numpy())
    ]
    assert np.allclose(mixture().log_prob(z).detach(), logsumexp(parts, 0), atol=1e-5)


def test_draws_of_a_mixture_are_its_own() -> None:
    mixture = make("appearance", "mixture:3", 2)
    mixture.logits.data = torch.tensor([0.2, 0.3, 0.5]).log()
    mixture.means.data = torch.tensor([[-9.0, 0.0], [0.0, 9.0], [9.0, -9.0]])
    mixture.log_scales.data = torch.tensor([[0.5, 1.0], [1.0, 0.1], [0.3, 2.0]]).log()
    z = mixture().expand([4, 5000]).sample()
    assert z.shape == (4, 5000, 2) and mixture().sample().shape == (2,)
    part = torch.cdist(z.view(-1, 2), mixture.means.data).argmin(1)
    assert torch.allclose(part.bincount() / len(part), torch.tensor([0.2, 0.3, 0.5]), atol=0.02)
    for i in range(3):
        own = z.view(-1, 2)[part == i]
        scales = mixture.log_scales.data[i].exp()
        assert torch.allclose(own.mean(0), mixture.means.data[i], atol=0.1)
        assert torch.allclose(own.std(0), scales, rtol=0.05)


def test_the_density_of_narrow_components_far_from_0_is_exact() -> None:
    """Where float32 would lose what is left of a difference of large squares."""
    mixture = make("appearance", "mixture:9", 8)
    mixture.means.data = (10.0 * torch.arange(9.0) - 40.0).unsqueeze(1).expand(9, 8).clone()
    mixture.log_scales.data.fill_(math.log(0.01))
    z = mixture.means.data[:2] + 0.01 * torch.randn(50, 2, 8)
    expected = stats.norm.logpdf(z.double().numpy(), mixture.means.data[:2].numpy(), 0.01)
    with torch.no_grad():
        found = mixture().log_prob(z)
    assert np.allclose(found, expected.sum(-1) - math.log(9), atol=0.02)


def test_what_components_make_of_a_normal_value_in_the_mean() -> None:
    z, s, m, d = torch.randn(3, 2), torch.rand(3, 2), torch.randn(4, 2), torch.rand(4, 2) + 0.5
    draws = z + s * torch.randn(40_000, 3, 2)
    sampled = dist.Normal(m, d).to_event(1).log_prob(draws.unsqueeze(2)).mean(0)  # (3, 4)
    assert torch.allclose(normal_parts(z, s, m, d), sampled, atol=0.05)
    exact = dist.Normal(m, d).to_event(1).log_prob(z.unsqueeze(1))
    assert torch.allclose(normal_parts(z, 0 * s, m, d), exact, atol=1e-4)


def test_a_mixture_has_a_component_for_each_kind_of_object() -> None:
    """Then it is the aggregate posterior, and an object costs its name alone: log 200 nats."""
    kinds, scale = 20.0 * torch.randn(200, 3), 0.1
    means = kinds[torch.randint(200, (4000,))]
    mixture = GaussianMixture(3, 260)
    assert mixture.scenes == 4000 and GaussianMixture(3, 3000).scenes == 6000
    swaps.fit(mixture, found(means, scale), progress=False)
    z = means + scale * torch.randn_like(means)
    with torch.no_grad():
        posterior = dist.Normal(means, scale).to_event(1).log_prob(z)
        paid = (posterior - mixture().log_prob(z)).mean().item()
    assert math.log(200) - 0.1 < paid < math.log(200) + 0.3


@pytest.mark.parametrize("spread, width", [(0.01, 5.0), (5.0, math.sqrt(50.0))])
def test_one_of_many_components_is_wide(spread, width) -> None:
    """As wide as what the guide draws: means of deviation 5, and what it spreads round them."""
    values = 10.0 + 5.0 * torch.randn(2000, 3)
    mixture = GaussianMixture(3, 150)
    swaps.fit(mixture, found(values, spread), progress=False)
    mixture.requires_grad_(False)
    masses, wide = mixture.logits.softmax(0), mixture.log_scales[-1].exp()
    assert masses[-1] == pytest.approx(0.02) and (wide > mixture.log_scales[:-1].exp()).all()
    assert torch.allclose(wide, torch.tensor(width), rtol=0.1)
    # 4 deviations off: at most what the wide one makes of it, and its mass.
    far = 10.0 + 4 * width
    unlike = mixture().log_prob(torch.full((1, 3), far)).item()
    assert unlike > stats.norm.logpdf(far, 10.0, width) * 3 + math.log(0.02) - 1.0


def bent(size: int) -> Flow:
    """A flow that is far from the identity."""
    flow = Flow(size, 3)
    for name, parameter in flow.named_parameters():
        parameter.data += (0.2 if "splines" in name else 0.05) * torch.randn_like(parameter)
    flow.begin(torch.randn(1000, size) * 0.7 + 1.0)
    return flow


@pytest.mark.parametrize("size, points", [(1, 4001), (2, 401)])
def test_a_flow_is_a_density_and_its_draws_follow_it(size, points) -> None:
    flow = bent(size)
    axis = torch.linspace(-6.0, 8.0, points)
    cell = (axis[1] - axis[0]).item() ** size
    grid = torch.cartesian_prod(*[axis] * size).view(-1, size)
    with torch.no_grad():
        density = flow().log_prob(grid).exp()
        drawn = flow().sample((20_000,))
    assert density.sum().item() * cell == pytest.approx(1.0, abs=5e-3)
    normal = StandardNormal(size)().log_prob((grid - flow.shift) / flow.scale)
    normal = normal.exp() / flow.scale.prod()
    assert (density - normal).abs().sum().item() * cell > 0.1  # it is bent
    for function in (lambda z: z, torch.square, torch.sin):
        expected = (density[:, None] * function(grid)).sum(0) * cell
        error = function(drawn).std(0) / math.sqrt(len(drawn))
        assert ((function(drawn).mean(0) - expected).abs() < 4 * error + 5e-3).all()


def test_a_flow_starts_near_the_identity() -> None:
    z = torch.randn(500, 4)
    gap = make("appearance", "flow:1", 4)().log_prob(z) - StandardNormal(4)().log_prob(z)
    assert gap.abs().mean() < 0.5
    assert make("appearance", "flow:3", 1)().log_prob(z[:, :1]).exp().sub(
        StandardNormal(1)().log_prob(z[:, :1]).exp()).abs().max() < 0.01


def test_a_flow_does_not_remember_earlier_parameters() -> None:
    flow, z = bent(2), torch.randn(5, 2)
    before = flow().log_prob(z)
    for parameter in flow.parameters():
        parameter.data *= 0.5
    other = make("appearance", "flow:3", 2)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(flow().log_prob(z), other().log_prob(z))
    assert not torch.allclose(flow().log_prob(z), before, atol=1e-2)


def test_a_spline_has_gradients_at_the_pole_of_pyros(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, pyros = BoundedSpline(64, 8, 4.0), transforms.Spline(64, 8, 4.0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    pyros.load_state_dict(ours.state_dict())
    # Pyro divides by what is linear in x beyond the bounds: first where it is 0, then where it is
    # 0 in float32.
    divisors: list[Tensor] = []
    magnitude = torch.abs
    with monkeypatch.context() as patch:
        patch.setattr(torch, "abs", lambda t: (divisors.append(t.detach()), magnitude(t))[1])
        pyros.spline_op(torch.tensor([[5.0], [6.0]]).expand(2, 64), inverse=True)
        at_5, at_6 = divisors.pop()
        near = (5.0 - at_5 / (at_6 - at_5)).view(torch.int32) + torch.arange(-3000, 3000)[:, None]
        x = near.int().view(torch.float32)
        pyros.spline_op(x, inverse=True)
    x = x[((divisors.pop() == 0) & (x > 4.0)).any(1)].requires_grad_()
    assert len(x)
    for spline, fine in ((pyros, False), (ours, True)):
        y, slope = spline.spline_op(x, inverse=True)
        gradient, *others = torch.autograd.grad(y.sum() + slope.sum(), [x, *spline.parameters()])
        assert bool(gradient.isfinite().all()) == fine
        assert all(bool(other.isfinite().all()) for other in others) == fine
        outside = x.abs() > 4.0
        assert torch.equal(y[outside], x[outside]) and (slope[outside] == 0).all()


def test_a_bounded_spline_is_pyros_within_its_bounds() -> None:
    ours, pyros = BoundedSpline(3, 8, 4.0), transforms.Spline(3, 8, 4.0)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    pyros.load_state_dict(ours.state_dict())
    x = torch.rand(200, 3) * 8.0 - 4.0
    for inverse in (False, True):
        for ours_, pyros_ in zip(
            ours.spline_op(x, inverse=inverse), pyros.spline_op(x, inverse=inverse), strict=True
        ):
            assert torch.equal(ours_, pyros_)


# --- fits ----------------------------------------------------------------------------------------


def found(z: Tensor, scale: float = 0.0) -> swaps.Found:
    """Objects whose appearances are known, but for normal noise."""
    return swaps.Found(torch.zeros(1, dtype=torch.long), z, torch.full_like(z, scale))


def two(number: int) -> Tensor:
    """Draws of a mixture: 0.3 N((-2, 0), 0.5^2) + 0.7 N((1, 1), diag(1, 0.25))."""
    first = torch.rand(number, 1) < 0.3
    a = torch.tensor([-2.0, 0.0]) + 0.5 * torch.randn(number, 2)
    b = torch.tensor([1.0, 1.0]) + torch.tensor([1.0, 0.5]) * torch.randn(number, 2)
    return torch.where(first, a, b)


def log_density_of_two(z: Tensor) -> Tensor:
    a = dist.Normal(torch.tensor([-2.0, 0.0]), 0.5).to_event(1).log_prob(z)
    b = dist.Normal(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.5])).to_event(1).log_prob(z)
    return torch.stack([a + math.log(0.3), b + math.log(0.7)]).logsumexp(0)


def test_a_fitted_mixture_is_the_one_that_was_drawn_from() -> None:
    mixture = GaussianMixture(2, 2)
    swaps.fit(mixture, found(two(4000)), progress=False)
    order = mixture.means[:, 0].argsort()
    assert torch.allclose(mixture.logits.softmax(0)[order], torch.tensor([0.3, 0.7]), atol=0.03)
    assert torch.allclose(
        mixture.means[order], torch.tensor([[-2.0, 0.0], [1.0, 1.0]]), atol=0.1)
    assert torch.allclose(
        mixture.log_scales[order].exp(), torch.tensor([[0.5, 0.5], [1.0, 0.5]]), atol=0.1)


@pytest.mark.parametrize("text", ["mixture:2", "mixture:4", "flow:3"])
def test_fitted_priors_come_near_the_truth_on_other_draws(text, monkeypatch) -> None:
    monkeypatch.setattr(swaps, "STEPS", 200)
    prior = make("appearance", text, 2)
    assert isinstance(prior, Fitted)
    swaps.fit(prior, found(two(4000)), progress=False)
    held_out = two(4000)
    with torch.no_grad():
        fitted = prior().log_prob(held_out).mean().item()
    assert StandardNormal(2)().log_prob(held_out).mean().item() < fitted - 0.3
    assert fitted == pytest.approx(log_density_of_two(held_out).mean().item(), abs=0.06)


def test_a_fit_is_to_draws_of_the_guide_not_to_its_means(monkeypatch) -> None:
    monkeypatch.setattr(swaps, "STEPS", 50)
    mixture = GaussianMixture(1, 1)
    swaps.fit(mixture, found(3.0 * torch.randn(3000, 1), scale=4.0), progress=False)
    assert mixture.log_scales.exp().item() == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("text", ["mixture:1", "flow:1"])
def test_what_is_fitted_spreads_as_the_draws_of_the_guide(text, monkeypatch) -> None:
    """Of a mixture by what they are in the mean, of a flow by drawing them: 3^2 + 4^2 = 5^2."""
    monkeypatch.setattr(swaps, "STEPS", 40)
    prior = make("appearance", text, 2)
    assert isinstance(prior, Fitted)
    swaps.fit(prior, found(3.0 * torch.randn(3000, 2), scale=4.0), progress=False)
    deviation = prior().expand([20_000]).sample().std(0)
    assert torch.allclose(deviation, torch.tensor(5.0), rtol=0.06)


def test_a_flow_begins_as_wide_as_the_draws_of_the_guide() -> None:
    flow = Flow(2, 1)
    flow.begin(torch.tensor([[0.0, 1.0], [2.0, 5.0]]), torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
    assert flow.shift.tolist() == [1.0, 3.0]
    assert torch.allclose(flow.scale ** 2, torch.tensor([1.0 + 5.0, 4.0 + 4.0]))


@pytest.mark.parametrize("spread, variance", [
    # The squares of two values and of their spreads, and the mean of the latter, over three.
    ([0.0, 0.0], 2 / 3),
    ([1.0, 3.0], (2 + 1 + 9 + 5) / 3),
])
def test_the_likeliest_component_by_hand(spread, variance) -> None:
    logits, mean, deviation = maximised(
        torch.tensor([[0.0], [2.0]]), torch.tensor(spread).unsqueeze(1), 1)
    assert (mean.item(), deviation.item() ** 2) == pytest.approx((1.0, variance))
    assert logits.exp().item() == pytest.approx(3.0)  # two values, and one of the prior's


def test_values_that_are_gone_through_in_parts_give_the_same_mixture(monkeypatch) -> None:
    """50 values times components at a time: 10 of 64 values, and 4 in the end."""
    values, spread, fits = two(64), 0.2 + torch.rand(64, 2), []
    for held in (priors.HELD, 50):
        monkeypatch.setattr(priors, "HELD", held)
        mixture = GaussianMixture(2, 5)
        torch.manual_seed(1)
        mixture.begin(values, spread)
        fits.append(mixture.state_dict())
    for name, whole in fits[0].items():
        torch.testing.assert_close(fits[1][name], whole, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_more_components_than_objects() -> None:
    mixture = make("appearance", "mixture:5", 2)
    mixture.begin(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert mixture().log_prob(torch.randn(3, 2)).isfinite().all()


COUNTS = [0, 1, 1, 2, 1, 3, 1]


def test_a_fitted_count_by_hand() -> None:
    prior = parse("count=fit", data=dots(COUNTS))["count"]
    # 1, 4, 1 and 1 of 7 images, each of the 4 counts once more.
    assert masses(prior) == pytest.approx([2 / 11, 5 / 11, 2 / 11, 2 / 11])


def test_a_fitted_count_of_a_guide_that_draws() -> None:
    """The aggregate of q(n | x), which is the same for all x here: 0.4, 0.6 * 0.4 and 0.6^2."""
    model = AIR(ATTEND, SHAPE).eval()
    with torch.no_grad():
        model.presence_head.weight.zero_()
        model.presence_head.bias.fill_(math.log(0.6 / 0.4))
    found = masses(parse("count=fit", model=model, data=dots([1] * 3000))["count"])
    for mass, expected in zip(found, (0.4, 0.24, 0.36), strict=True):
        assert abs(mass - expected) < 4 * math.sqrt(expected * (1 - expected) / 3000)


def test_priors_are_fitted_to_the_first_training_scenes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Fitted, "scenes", 5)
    seen: list[Tensor] = []
    model = lavae()
    guide = model.guide
    monkeypatch.setattr(LAVAE, "guide", lambda self, x: seen.append(x) or guide(x))
    parse("count=fit", model=model, data=dots(COUNTS))
    assert torch.equal(seen.pop(), dots(COUNTS)[:5].batch())
    save_npz(tmp_path / "few.npz", dots([1, 2, 3, 0]))
    parse("count=fit", model=model, data=tmp_path / "few.npz")  # the last is held out
    assert torch.equal(seen.pop(), dots([1, 2, 3]).batch())
    parse("count=fit", model=model, data="multi-dsprites")
    assert torch.equal(seen.pop(), load("multi-dsprites", split="train", images=5).batch())
    parse("count=uniform:1-2", "appearance=normal", model=model, data="nowhere.npz")
    assert not seen  # these are fitted to nothing
    with pytest.raises(UserError, match="count=fit, fitted to.*nowhere.npz"):
        parse("count=fit", model=model, data="nowhere.npz")


def test_appearances_are_those_of_the_objects_that_are_there() -> None:
    model = lavae()
    scenes = dots(COUNTS)
    seen = swaps.look(model, scenes, progress=False)
    assert seen.counts.tolist() == COUNTS
    assert seen.means.shape == seen.scales.shape == (sum(COUNTS), 2)
    scene = model.infer(scenes.batch())
    expected = sorted(scene.what[scene.present].tolist())
    assert np.allclose(sorted(seen.means.tolist()), expected, atol=1e-5)
    for build, size in ((lambda: AIR(ATTEND, SHAPE), 2), (lambda: DiscreteAIR(DISCRETE, SHAPE), 1)):
        seen = swaps.look(build().eval(), scenes, progress=False)
        assert seen.means.shape == (seen.counts.sum(), size) and (seen.scales > 0).all()


@pytest.mark.parametrize("build", [
    lavae, lambda: AIR(ATTEND, SHAPE), lambda: DiscreteAIR(DISCRETE, SHAPE),
])
def test_what_is_found_of_an_appearance_is_the_guides_normal(build: Callable) -> None:
    """Its mean and deviation, for the objects of the draw alone."""
    model, scenes = build().eval(), dots(COUNTS)
    torch.manual_seed(1)
    seen = swaps.look(model, scenes, progress=False)
    torch.manual_seed(1)
    trace = poutine.trace(model.guide).get_trace(scenes.batch())
    count, slots = model.counts(trace), range(int(seen.counts.max()))
    sites = [trace.nodes[f"{model.appearance_site}_{i}"]["fn"].base_dist for i in slots]
    assert torch.equal(seen.counts, count) and 0 < len(seen.scales) < len(sites) * len(COUNTS)
    for known, part in ((seen.means, "loc"), (seen.scales, "scale")):
        expected = [getattr(site, part)[count > i] for i, site in enumerate(sites)]
        assert torch.allclose(known, torch.cat(expected))
    assert seen.scales.std() > 1e-4


@pytest.mark.parametrize("kind", ["flow:1", "mixture:2"])
def test_a_prior_is_fitted_where_nothing_else_learns(kind: str) -> None:
    model = AIR(ATTEND, SHAPE).eval()
    with torch.inference_mode():
        within = parse(f"appearance={kind}", model=model, data=dots(COUNTS))["appearance"]
    without = parse(f"appearance={kind}", model=model, data=dots(COUNTS))["appearance"]
    for one, other in zip(within.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other) and not one.is_inference()


class One(SceneModel):
    """One object an image, whose appearance is at a site without a number."""

    appearance_site = "z_what"

    def __init__(self, masked: bool):
        super().__init__()
        self.masked, self.image_shape, self.mean = masked, SHAPE, nn.Parameter(torch.zeros(()))
        self.appearance_prior = StandardNormal(2)

    @pyro_method
    def guide(self, x: Tensor) -> None:
        masked = poutine.mask(mask=True) if self.masked else nullcontext()
        with pyro.plate("images", len(x), dim=-1), masked:
            mean = torch.arange(2.0 * len(x)).view(-1, 2) + self.mean
            pyro.sample("z_what", dist.Normal(mean, 0.5).to_event(1))
            pyro.sample("z_whatever", dist.Normal(mean, 0.5).to_event(1))

    def counts(self, trace: poutine.Trace) -> Tensor:
        return torch.ones(len(trace.nodes["z_what"]["value"]), dtype=torch.long)


@pytest.mark.parametrize("masked", [False, True])
def test_an_object_in_each_image_needs_neither_number_nor_mask(masked: bool) -> None:
    seen = swaps.look(One(masked), dots(COUNTS), progress=False)
    assert seen.means.tolist() == [[2.0 * i, 2.0 * i + 1] for i in range(len(COUNTS))]
    assert (seen.scales == 0.5).all() and seen.counts.tolist() == [1] * len(COUNTS)


def test_nothing_else_is_fitted(monkeypatch) -> None:
    kinds = {"mix": Kind("mix:2", lambda text, size: GaussianMixture(size, int(text)))}
    for name in ("where", "latent"):
        monkeypatch.setitem(priors.PRIORS, name, kinds)
    model, vae = One(False), ConvVAE(ConvVAEConfig(2, 2, 8), SHAPE)
    model.where_prior, vae.latent_prior = StandardNormal(2), StandardNormal(2)
    for text, of in (("where=mix:2", model), ("latent=mix:2", vae)):
        with pytest.raises(UserError, match=f"{text}: what is fitted is a prior of the count or"):
            parse(text, model=of, data=dots(COUNTS))


def test_an_appearance_is_not_fitted_to_nothing() -> None:
    with pytest.raises(UserError, match="no object was found"):
        parse("appearance=flow:1", data=dots([0, 0]))


def test_parsing_follows_its_seed_and_changes_nothing_else(monkeypatch) -> None:
    monkeypatch.setattr(swaps, "STEPS", 3)
    model, texts = lavae(), ("count=fit", "appearance=flow:2")
    before, generator = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    one, two, other = (parse(*texts, model=model, data=dots(COUNTS), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    first, second, third = (p["appearance"].state_dict() for p in (one, two, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


# --- in models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["uniform:1-3", "geometric:0.3", "fit"])
def test_a_swapped_count_moves_each_bound_by_its_masses(text) -> None:
    """log p_new(n) - log p_old(n), image by image: all else is drawn alike."""
    model, scenes = lavae(), dots([1, 3, 2, 1])
    model.count_prior.logits.data = torch.tensor([0.3, 0.1, -0.8, 1.2])
    swapped = parse(f"count={text}", model=model, data=dots(COUNTS))
    bounds = []
    for priors_ in ({}, swapped):
        with model.priors(**priors_):
            torch.manual_seed(3)
            bounds.append(estimate(model, scenes.batch(), 4).bounds)
    n = torch.tensor([1, 3, 2, 1])
    expected = swapped["count"]().log_prob(n) - model.count_prior().log_prob(n)
    assert torch.allclose(bounds[1] - bounds[0], expected.double().expand(2, -1), atol=1e-4)


def test_a_swapped_appearance_moves_each_bound_by_its_density() -> None:
    model, scenes = lavae(), dots([1, 1, 1])
    mixture = make("appearance", "mixture:3", 2)
    splits = []
    for priors_ in ({}, {"appearance": mixture}):
        with model.priors(**priors_):
            torch.manual_seed(3)
            splits.append(estimate(model, scenes.batch(), 1).split)
    torch.manual_seed(3)
    with torch.no_grad(), pyro.plate("particles", 1, dim=-2):
        (z,) = poutine.trace(model.guide).get_trace(scenes.batch()).nodes["z_app_0"]["value"]
        expected = StandardNormal(2)().log_prob(z) - mixture().log_prob(z)
    assert torch.allclose(splits[1]["z_app"] - splits[0]["z_app"], expected.double(), atol=1e-4)
    assert torch.equal(splits[1]["reconstruction"], splits[0]["reconstruction"])


def test_more_objects_than_the_model_was_made_for() -> None:
    """LAVAE counts and draws as many as a swapped prior goes to."""
    model, scenes = lavae(), dots([5, 4])
    before = model.infer(scenes.batch(), limit=9)
    with model.priors(**parse("count=uniform:4-5", model=model)):
        bound = estimate(model, scenes.batch(), 3)
        drawn, counts = model.draw(60)
    assert bound.bounds.isfinite().all() and bound.split["n"].tolist() == pytest.approx(
        [math.log(2)] * 2)
    assert drawn.shape == (60, *SHAPE) and set(counts.tolist()) == {4, 5}
    assert estimate(model, scenes.batch(), 3).bounds.isfinite().all()  # of 3 of them
    assert before.to_json() == model.infer(scenes.batch(), limit=9).to_json()


def test_counts_of_draws() -> None:
    """By what is drawn: every object changes the image, and those that are not there do not."""
    model = lavae(sprite=1, latent=1)
    with torch.no_grad():
        model.sprite_net.net[-1].bias.fill_(9.0)
    drawn, counts = model.draw(50)
    assert torch.equal((drawn[:, 0] > 0.5).sum((1, 2)), counts) and len(counts.unique()) == 4
    for build in (lambda: AIR(ATTEND, SHAPE), lambda: DiscreteAIR(DISCRETE, SHAPE)):
        model = build().eval()
        drawn, counts = model.draw(100)
        shown = drawn.flatten(1).sum(1) > 0
        assert set(counts.tolist()) == {0, 1, 2} and counts.dtype == torch.long
        assert not shown[counts == 0].any() and shown[counts > 0].float().mean() > 0.9
    assert ConvVAE(ConvVAEConfig(2, 2, 8), SHAPE).draw(3)[1] is None


@pytest.mark.parametrize("build", [
    lambda: AIR(ATTEND, SHAPE), lambda: DiscreteAIR(DISCRETE, SHAPE), lavae,
])
def test_images_of_impossible_counts_cost_infinitely_much(build: Callable) -> None:
    """And are told from those that are possible, in numbers that JSON holds."""
    model = build()
    if isinstance(model, LAVAE):
        scenes, impossible = dots([1, 2, 3, 2]), 3
    else:  # nothing is ever found
        scenes, impossible = dots([1, 2]), 2
        with torch.no_grad():
            model.presence_head.weight.zero_()
            model.presence_head.bias.fill_(-1e3)
    text = "count=uniform:1"
    with model.eval().priors(**parse(text, model=model)):
        result = evaluate(model, scenes, particles=12, priors=[text], limit=9, progress=False)
    json.dumps(result, allow_nan=False)
    assert result["impossible"] == impossible and result["priors"] == [text]
    assert result["nll"] is None and result["nll_stderr"] is None
    assert [point["nll"] for point in result["curve"]] == [None] * 3
    part = "n" if isinstance(model, LAVAE) else "z_pres"
    assert {name for name, value in result["split"].items() if value is None} == {part}
    printed = report.table({"dots": result}) + report.likelihood(result)
    assert text in printed and f"inf (bernoulli; {impossible} of counts" in printed.replace(
        "normal, sigma 0.3", "bernoulli")
    own = evaluate(model, scenes, particles=2, limit=9, progress=False)
    assert own["impossible"] == 0 and own["nll"] is not None and own["priors"] == []
    assert "priors" not in report.table({"dots": own})


def test_models_restore_their_priors() -> None:
    model = lavae()
    before = model.count_prior, model.appearance_prior
    swapped = parse("count=uniform:1-2", "appearance=mixture:2", model=model, data=dots(COUNTS))
    with model.priors(**swapped):
        assert isinstance(model.count_prior, UniformCount)
        assert isinstance(model.appearance_prior, GaussianMixture)
    assert (model.count_prior, model.appearance_prior) == before


# --- learned with the model ----------------------------------------------------------------------


def test_the_default_prior_is_the_standard_normal() -> None:
    """Its state as ever, and no random numbers for it."""
    model = LAVAE(CONFIG, SHAPE)
    assert type(model.appearance_prior) is StandardNormal
    assert "appearance_prior.zero" in model.state_dict()
    generator = torch.get_rng_state()
    make("appearance", "normal", 32)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("text, kind", [("mixture:3", GaussianMixture), ("flow:2", Flow)])
def test_a_prior_that_is_learned_with_the_model(text, kind, tmp_path) -> None:
    config = make_config(
        "lavae", "multi-dsprites", settings=[f"appearance_prior={text}", "latent=3"])
    model = checkpoint.build(config, (3, 32, 32))
    assert type(model.appearance_prior) is kind
    own = set(model.appearance_prior.parameters())
    assert own and own <= set(model.groups()["rest"])
    for parameter in own:
        parameter.data += 0.1
    checkpoint.save(tmp_path / "model.pt", config, model, 1)
    kept = checkpoint.load(tmp_path / "model.pt").model
    z = torch.randn(4, 3)
    assert torch.equal(kept.appearance_prior().log_prob(z), model.appearance_prior().log_prob(z))
    with pytest.raises(UserError, match="appearance has no prior 'nope'"):
        checkpoint.build(
            make_config("lavae", "multi-dsprites", settings=["appearance_prior=nope"]), (3, 32, 32))


# --- text and commands ---------------------------------------------------------------------------

BAD = [
    # options, and what the message has to name
    ("colour=red", "no prior is called 'colour'; there are count, appearance"),
    ("count", "NAME=KIND"),
    ("count=poisson:3", "uniform:4-5, geometric:0.5, fit"),
    ("count=", "uniform:4-5, geometric:0.5, fit"),
    ("appearance=fit", "normal, mixture:10, flow:4"),
    ("count=uniform:4-", "count=uniform:4-5"),
    ("count=uniform:1-2-3", "count=uniform:4-5"),
    ("count=uniform:5-4", "low <= high, not 5-4"),
    ("count=uniform:4-99999", "0 to 1,000"),
    ("count=geometric:1.5", "one more object"),
    ("count=geometric:half", "count=geometric:0.5"),
    ("count=fit:3", "takes no '3'"),
    ("appearance=normal:2", "takes no '2'"),
    ("appearance=mixture", "appearance=mixture:10"),
    ("appearance=mixture:0", "1 to 50,000"),
    ("appearance=flow:many", "appearance=flow:4"),
    ("count=fit --prior count=uniform:1-2", "second prior for the count"),
]
TINY = (
    "latent=3", "sprite=5", "crop=7", "location_width=8", "location_blocks=1",
    "appearance_width=8", "appearance_hidden=8", "sprite_hidden=8", "max_objects=4",
    "count_threshold=0",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that has not learned anything, and data, as the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(swaps, "STEPS", 3)
    pixels = np.zeros((24, 16, 16, 3), np.uint8)
    for i, image in enumerate(pixels):
        image[4 + i % 8:8 + i % 8, 5:9] = 255
    for name in ("data.npz", "test.npz"):
        save_npz(name, SceneData.from_images("squares", pixels, counts=np.ones(24, np.int64)))
    config = make_config("lavae", "data.npz", settings=TINY)
    checkpoint.save(Path("model.pt"), config, checkpoint.build(config, (3, 16, 16)), 1)
    return tmp_path


def run(line: str) -> Result:
    name, *words = line.split()
    command = {"svi-eval": cli.evaluate, "svi-infer": cli.infer}[name]
    return CliRunner().invoke(command, words, prog_name=name)


EVAL = "svi-eval model.pt --data test.npz --images 6 --particles 2 --max-objects 99 --json out.json"


@pytest.mark.parametrize("options, named", BAD)
@pytest.mark.parametrize("line", [EVAL, "svi-infer model.pt --sample 2 --out out.npz"])
def test_bad_priors_give_one_line(line, options, named, folder) -> None:
    before = sorted(folder.iterdir())
    result = run(f"{line} --prior {options}")
    assert result.exit_code == 2 and not result.stdout, result.output
    (error,) = result.stderr.splitlines()
    assert error.startswith("Error: ") and named in error
    assert sorted(folder.iterdir()) == before


def test_models_without_such_a_prior_are_refused() -> None:
    for model, text, named in (
        (ConvVAE(ConvVAEConfig(2, 2, 8), SHAPE), "count=fit", "ConvVAE has no prior called"),
        (AIR(ATTEND, SHAPE), "count=uniform:3-4", "more objects than the model's 2 steps"),
        (DiscreteAIR(replace(DISCRETE, attributes=0), SHAPE), "appearance=flow:2",
         "objects of this DiscreteAIR have no appearance"),
    ):
        with pytest.raises(UserError, match=named):
            parse(text, model=model)


def test_an_evaluation_says_what_was_swapped(folder) -> None:
    texts = ["count=geometric:0.5", "appearance=mixture:2"]
    options = " ".join(f"--prior {text}" for text in texts)
    result = run(f"{EVAL} {options}")
    assert result.exit_code == 0, result.output
    written = json.loads(Path("out.json").read_text())
    assert written["priors"] == texts and written["impossible"] == 0
    assert ", ".join(texts) in result.stdout
    assert f"{written['nll']:.2f}" in result.stdout

    for text in ("count=fit", "appearance=normal", "appearance=flow:1"):
        result = run(f"{EVAL} --force --prior {text}")
        assert result.exit_code == 0, result.output
        assert json.loads(Path("out.json").read_text())["priors"] == [text]
    assert run(f"{EVAL} --force").exit_code == 0
    assert json.loads(Path("out.json").read_text())["priors"] == []

    line = EVAL.replace("out.json", "inf.json")
    result = run(f"{line} --prior count=uniform:77-78 --figures pictures")
    assert result.exit_code == 0, result.output
    written = json.loads(Path("inf.json").read_text())
    assert written["nll"] is None and written["impossible"] == 6
    assert "inf (bernoulli; 6 of counts that the prior gives no mass)" in result.stdout
    result = run(f"{EVAL} --force --prior count=uniform:77-78 --curve curve.png")
    assert result.exit_code == 2 and "--curve" in result.stderr.splitlines()[-1]


def test_samples_have_the_counts_of_the_prior(folder) -> None:
    line = "svi-infer model.pt --device cpu --sample 40 --seed 3"
    result = run(f"{line} --prior count=uniform:5-6 --out new.npz --figure new.png")
    assert result.exit_code == 0, result.output
    data = load_npz("new.npz")
    assert data.counts is not None and set(data.counts) == {5, 6}
    assert data.images().shape == (40, 16, 16, 3)
    assert Path("new.png").read_bytes().startswith(b"\x89PNG")
    model = checkpoint.load("model.pt").model
    with model.priors(count=UniformCount(5, 6)):
        images, counts = pictures.sample_counted(model, 40, 3)
    assert counts.tolist() == data.counts.tolist()
    assert np.allclose(images.permute(0, 2, 3, 1) * 255, data.images(), atol=0.51)

    assert run(f"{line} --out own.npz").exit_code == 0
    assert set(load_npz("own.npz").counts) == {0, 1, 2, 3, 4}
    swapped = "--prior count=uniform:5-6 --prior appearance=flow:1"
    assert run(f"{line} {swapped} --out both.npz").exit_code == 0
    both = load_npz("both.npz")
    assert set(both.counts) == {5, 6} and not np.array_equal(both.images(), data.images())
