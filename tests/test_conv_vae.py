"""The convolutional VAE: densities and bounds against truth, beta by hand, and short trainings."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from click.testing import CliRunner
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from scipy import stats
from torch import Tensor, nn

from pyro_scenes import checkpoint, cli, training
from pyro_scenes.bounds import iwae, log_weights
from pyro_scenes.config import make_config
from pyro_scenes.data import SceneData, load, save_npz, split_held_out
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.likelihoods import NormalImage
from pyro_scenes.models import conv_vae
from pyro_scenes.models.conv_vae import (
    AUXILIARY,
    PRESETS,
    ConvVAE,
    ConvVAEConfig,
    GridNormal,
    GridPhases,
)
from pyro_scenes.nets import PhaseNet, ResidualBlock
from pyro_scenes.objectives.conv_vae import ConvVAEObjective, ConvVAESchedule

NETWORKS = ["fast", "paper", "auxiliary"]
SMALL = ConvVAEConfig(grid_latent=2, grid_stages=2, grid_width=8)
SHAPE = (3, 8, 12)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with pyro.validation_enabled(True):
        yield


@pytest.fixture(params=NETWORKS)
def model(request: pytest.FixtureRequest) -> ConvVAE:
    return informed(ConvVAE(replace(SMALL, networks=request.param), SHAPE))


def informed(model: ConvVAE) -> ConvVAE:
    """With a prior whose cells mind those before, if it knows any; it begins as N(0, I)."""
    if isinstance(model.latent_prior, GridPhases):
        nn.init.normal_(model.latent_prior.net.last.weight, std=0.2)
        nn.init.normal_(model.latent_prior.net.last.bias, std=0.5)
    return model


def images(batch: int = 3, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return (torch.rand(batch, *shape) < 0.3).float()


# Rows and columns of the cells that are drawn first, second ..., by how many phases there are.
ORDER = {1: [(0, 0, 1)], 4: [(0, 0, 2), (1, 1, 2), (0, 1, 2), (1, 0, 2)]}


def by_hand(model: ConvVAE, x: Tensor, noise: list[Tensor]) -> tuple[Tensor, Tensor]:
    """z, and KL(q(z | x) || p(z)) given what was drawn, (B,), from each phase's standard noise."""
    h, divergence = model.encode(x), x.new_zeros(len(x))
    z = h.new_zeros(len(x), 2, *h.shape[2:])
    for phase, ((row, column, step), e) in enumerate(zip(ORDER[model.phases], noise, strict=True)):
        (mean, scale), (about, width) = (
            (d.base_dist.loc, d.base_dist.scale)
            for d in (model.posterior(h, phase, z), model.latent_prior(phase, z))
        )
        ratio = (scale / width) ** 2
        part = 0.5 * (ratio + ((mean - about) / width) ** 2 - 1 - ratio.log())
        divergence = divergence + part.flatten(1).sum(1)
        z = z.clone()
        z[:, :, row::step, column::step] = mean + scale * e
    return z, divergence


def drawn(model: ConvVAE, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Mean, scale and value of the guide's sites."""
    nodes = poutine.trace(model.guide).get_trace(x).nodes
    sites = [nodes[name] for name in nodes if name.startswith("z_")]
    return [(s["fn"].base_dist.loc, s["fn"].base_dist.scale, s["value"]) for s in sites]


def grid(values: list[Tensor], rows: int, columns: int) -> Tensor:
    """The phases' values, (..., K, r, c) each, on one grid."""
    z = values[0].new_zeros(*values[0].shape[:-2], rows, columns)
    for (row, column, step), value in zip(ORDER[len(values)], values, strict=True):
        z[..., row::step, column::step] = value
    return z


# --- against truth -------------------------------------------------------------------------------


class Wide(nn.Module):
    """A prior to swap: N(0.5, 2^2)."""

    def forward(self, phase: int, z: Tensor) -> dist.TorchDistribution:
        return dist.Normal(0.5, 2.0).expand([1, 1, 1]).to_event(3)


@pytest.mark.parametrize("networks", NETWORKS)
@pytest.mark.parametrize("prior", ["standard", "wide"])
def test_one_latent_number_by_quadrature(networks, prior) -> None:
    """log p(x) is a one-dimensional integral; the weights of the guide's draws average to it."""
    model = ConvVAE(ConvVAEConfig(1, 1, 12, networks), (1, 2, 2)).eval()
    with torch.no_grad():  # a decoder that depends on z and a guide that does not fit it
        model.decoder[0][0].weight.mul_(12)
        head = model.encoder[-1] if model.latent_head is None else model.latent_head.last
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.4, 0.3]))
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 1, 2, 2)
    grid = np.linspace(-18.0, 18.0, 4001)
    with torch.no_grad():
        mean = model.decode(torch.tensor(grid, dtype=torch.float32).view(-1, 1, 1, 1)).double()
    mean = np.clip(mean.numpy(), 1e-5, 1 - 1e-5).reshape(-1, 4)
    likelihood = np.where(x.numpy().reshape(4) == 1, mean, 1 - mean).prod(1)
    assert likelihood.max() > 1.5 * likelihood.min()
    density = stats.norm.pdf(grid, *((0.5, 2.0) if prior == "wide" else (0.0, 1.0)))
    truth = math.log(np.trapezoid(density * likelihood, grid))
    if prior == "wide":
        model.latent_prior = Wide()
        head.bias.data[1] = 1.5
    weights = log_weights(model, x.expand(4, 1, 2, 2), 1500, 6000).double().flatten() - truth
    error = weights.exp().std() / math.sqrt(len(weights))
    assert error < 0.02 and abs(weights.exp().mean() - 1) < 4 * error
    assert weights.mean() < -0.01  # the ELBO lies below the truth


@pytest.mark.parametrize("row", [False, True])
def test_two_numbers_that_mind_each_other_by_quadrature(row) -> None:
    """Two cells, drawn one after the other: log p(x) is an integral over both."""
    shape = (2, 4) if row else (4, 2)
    model = informed(ConvVAE(ConvVAEConfig(1, 1, 12, "fast"), (1, *shape)))
    phase = 2 if row else 3
    with torch.no_grad():
        model.decoder[0][0].weight.mul_(12)
        model.latent_prior.net.known.weight.mul_(4)
        model.latent_head.last.bias.copy_(torch.tensor([0.4, 1.2]))
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]).view(1, 1, *shape)
    values = torch.linspace(-9.0, 9.0, 361)
    first, second = torch.meshgrid(values, values, indexing="ij")
    z = torch.stack([first, second], -1).view(-1, 1, *((1, 2) if row else (2, 1)))
    only = z.clone().flatten(1)
    only[:, 1] = 0
    with torch.no_grad():
        about = model.latent_prior(0, torch.zeros(1, *z.shape[2:])).base_dist
        given = model.latent_prior(phase, only.view_as(z)).base_dist
        mean = model.decode(z).flatten(1).double().clamp(1e-5, 1 - 1e-5).numpy()
    assert given.loc.std() > 0.1  # the second minds the first
    density = stats.norm.pdf(first.flatten(), float(about.loc), float(about.scale))
    density = density * stats.norm.pdf(
        second.flatten(), given.loc.flatten().numpy(), given.scale.flatten().numpy())
    spacing = float(values[1] - values[0])
    assert density.sum() * spacing**2 == pytest.approx(1.0, abs=1e-3)
    likelihood = np.where(x.numpy().reshape(8) == 1, mean, 1 - mean).prod(1)
    truth = math.log((density * likelihood).sum() * spacing**2)
    weights = log_weights(model, x.expand(4, 1, *shape), 2500, 10_000).double().flatten() - truth
    error = weights.exp().std() / math.sqrt(len(weights))
    assert error < 0.03 and abs(weights.exp().mean() - 1) < 4 * error
    assert weights.mean() < -0.01


def test_what_a_phase_knows_by_hand() -> None:
    """Windows of 3 x 3, cell by cell; nothing is known outside the grid."""
    net = PhaseNet(2, 3, 4, reach=3).double()
    z, h = torch.randn(2, 5, 2, 3, 5).double(), torch.randn(5, 3, 3, 5).double()
    for phase, (row, column, _) in enumerate(ORDER[4]):
        found = net(phase, z, h)
        rows, columns = range(row, 3, 2), range(column, 5, 2)
        assert found.shape == (2, 5, 4, len(rows), len(columns))
        for k, b, i, j in np.ndindex(2, 5, len(rows), len(columns)):
            at = rows[i], columns[j]
            y = net.start[phase, :, 0, 0] + net.seen.weight[:, :, 0, 0] @ h[b, :, *at]
            y = y + net.seen.bias
            for up, left in np.ndindex(3, 3):
                near = at[0] + up - 1, at[1] + left - 1
                if 0 <= near[0] < 3 and 0 <= near[1] < 5:
                    y = y + net.known.weight[:, :, up, left] @ z[k, b, :, *near]
            y = 2 * y[:4] * y[4:].sigmoid()
            for layer in net.body:
                inner = layer.weight[:, :, 0, 0] @ y + layer.bias
                y = y + inner * inner.sigmoid()
            expected = net.last.weight[:, :, 0, 0] @ y + net.last.bias
            assert torch.allclose(found[k, b, :, i, j], expected, rtol=1e-9)


class Linear(nn.Module):
    """z -> an image: each cell adds its own pixels, K patterns of s x s."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)  # (K, C, s, s)

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.conv_transpose2d(z, self.weight, stride=self.weight.shape[-1])


SIGMA, STRIDE = 0.5, 4


def linear_gaussian(weight: Tensor, mean: Tensor, variance: Tensor) -> ConvVAE:
    """p(x | z) = N(W z, SIGMA^2), and a guide with this matrix (K, C s s) and variances (K,)."""
    channels = weight.shape[1]
    model = ConvVAE(SMALL, (channels, 8, 4))
    model.decoder, model.likelihood = Linear(weight), NormalImage(SIGMA)
    head = nn.Conv2d(channels, 4, STRIDE, STRIDE)
    with torch.no_grad():
        head.weight.copy_(torch.cat([mean, 0 * mean]).view_as(head.weight))
        head.bias.copy_(torch.cat([0 * variance, variance.log()]))
    model.encoder = head
    return model.double()


def marginal(weight: Tensor, x: Tensor) -> Tensor:
    """log p(x) = sum of log N(x_cell; 0, W W' + SIGMA^2 I) over cells, (B,)."""
    matrix = weight.flatten(1).double().numpy()  # (K, C s s)
    covariance = matrix.T @ matrix + SIGMA**2 * np.eye(matrix.shape[1])
    total = 0.0
    for row in range(0, x.shape[2], STRIDE):
        for column in range(0, x.shape[3], STRIDE):
            cell = x[:, :, row:row + STRIDE, column:column + STRIDE].reshape(len(x), -1)
            total = total + stats.multivariate_normal(cov=covariance).logpdf(cell.numpy())
    return torch.as_tensor(total)


def test_the_exact_posterior_gives_the_exact_likelihood_with_every_draw() -> None:
    patterns, _ = torch.linalg.qr(torch.randn(3 * STRIDE**2, 2))  # orthonormal
    weight = (patterns.T * torch.tensor([[2.0], [0.7]])).view(2, 3, STRIDE, STRIDE)
    variance = 1 / (1 + torch.tensor([2.0, 0.7])**2 / SIGMA**2)
    model = linear_gaussian(weight, variance[:, None] / SIGMA**2 * weight.flatten(1), variance)
    x = torch.randn(3, 3, 8, 4, dtype=torch.double)
    found, truth = log_weights(model, x, 5), marginal(weight, x)
    assert torch.allclose(found, truth.expand(5, 3), rtol=1e-6)


def test_bounds_of_another_guide_rise_to_the_exact_likelihood() -> None:
    weight = 0.3 * torch.randn(2, 1, STRIDE, STRIDE)
    flat = weight.flatten(1).double()
    inverse = torch.linalg.inv(torch.eye(2) + flat @ flat.T / SIGMA**2)
    # Off the exact posterior's mean, and with variances of its own.
    mean = 0.8 * (inverse @ flat / SIGMA**2)
    model = linear_gaussian(weight, mean, 2 * inverse.diagonal())
    x = torch.randn(4, 1, 8, 4, dtype=torch.double)
    truth = marginal(weight, x)
    weights = log_weights(model, x, 20_000, chunk=80_000) - truth
    error = weights.exp().std(0) / math.sqrt(len(weights))
    assert error.max() < 0.05 and ((weights.exp().mean(0) - 1).abs() < 4 * error).all()
    bounds = [  # of 1, 10 and 100 particles
        (weights.view(-1, size, 4).logsumexp(1) - math.log(size)).mean(0)
        for size in (1, 10, 100)
    ]
    assert (bounds[0] < bounds[1] - 0.01).all() and (bounds[1] < bounds[2]).all()
    assert (bounds[2] < 0.01).all()
    assert torch.allclose(iwae(model, x, 20_000, chunk=80_000), truth, atol=0.2)


def test_the_densities_by_hand(model) -> None:
    model, x = model.double().eval(), images().double()
    trace = poutine.trace(model.guide).get_trace(x)
    names = [f"z_{i}" for i in range(model.phases)]
    values = [trace.nodes[name]["value"] for name in names]
    whole = grid(values, 2, 3)
    assert whole.shape == (3, 2, 2, 3)
    joint = poutine.trace(poutine.replay(model.model, trace=trace)).get_trace(x)
    for found in (trace, joint):
        found.compute_log_prob()
    pixels = 1e-5 + (1 - 2e-5) * model.decode(whole).detach().numpy()
    expected = [(joint.nodes["x"], np.log(np.where(x.numpy() == 1, pixels, 1 - pixels)))]
    h, z = model.encode(x), torch.zeros_like(whole)
    for phase, (name, value) in enumerate(zip(names, values)):
        q, p = model.posterior(h, phase, z).base_dist, model.latent_prior(phase, z).base_dist
        if model.phases == 1:
            assert (p.loc == 0).all() and (p.scale == 1).all()
        for site, normal in ((trace.nodes[name], q), (joint.nodes[name], p)):
            expected.append((site, stats.norm.logpdf(*(
                v.expand_as(value).detach().numpy() for v in (value, normal.loc, normal.scale)))))
        row, column, step = ORDER[model.phases][phase]
        z = z.clone()
        z[:, :, row::step, column::step] = value
    for site, density in expected:
        assert np.allclose(site["log_prob"].detach(), density.sum((1, 2, 3)), rtol=1e-9)


# --- beta ----------------------------------------------------------------------------------------


SCHEDULE = ConvVAESchedule(beta_full=0.2, ramp=0, decay_to=1.0)


@pytest.mark.parametrize("step, beta", [(0, 1e-6), (5, 0.25), (15, 0.75), (20, 1.0), (99, 1.0)])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_the_loss_by_hand(model, step, beta, likelihood) -> None:
    """-E[log p(x | z)] + beta KL(q(z | x) || p(z)) and its gradients, on the same noise."""
    weights = model.state_dict()
    model = ConvVAE(replace(model.config, likelihood=likelihood, sigma=0.4), SHAPE).double()
    model.load_state_dict(weights)
    x = images().double() if likelihood == "bernoulli" else torch.rand(2, *SHAPE).double()
    torch.manual_seed(3)
    noise = [((value - mean) / scale).detach() for mean, scale, value in drawn(model, x)]
    z, divergence = by_hand(model, x, noise)
    means = model.decode(z)
    if likelihood == "bernoulli":
        means = 1e-5 + (1 - 2e-5) * means
        cost = -torch.where(x == 1, means, 1 - means).log().flatten(1).sum(1)
    else:
        cost = -torch.distributions.Normal(means, 0.4).log_prob(x).flatten(1).sum(1)
    loss = (cost + beta * divergence).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))

    torch.manual_seed(3)
    figures = ConvVAEObjective(SCHEDULE, model, 100).backward(model, x, step)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-6, atol=1e-9)
    assert figures["beta"] == pytest.approx(beta)
    assert figures["kl"] == pytest.approx(divergence.mean().item())
    # What is logged is the ELBO's loss.
    assert figures["loss"] == pytest.approx((cost + divergence).mean().item())


@pytest.mark.parametrize("side", [(2, 3), (1, 4), (3, 1), (1, 1)])
def test_the_kl_map_by_hand(side) -> None:
    """Given means; of grids of one row or column two phases have no cells."""
    model = informed(ConvVAE(ConvVAEConfig(2, 1, 8, "fast"), (1, 2, 2))).eval()
    x = images(4, (1, 2 * side[0], 2 * side[1]))
    z = x.new_zeros(4, 2, *side)
    expected = torch.zeros(4, *side)
    with torch.no_grad():
        h = model.encode(x)
        for phase, (row, column, step) in enumerate(ORDER[4]):
            if row < side[0] and column < side[1]:
                q, p = model.posterior(h, phase, z), model.latent_prior(phase, z)
                divergence = torch.distributions.kl_divergence(q.base_dist, p.base_dist)
                expected[:, row::step, column::step] = divergence.sum(1)
                z[:, :, row::step, column::step] = q.mean
    assert (expected > 0.01).all() and torch.allclose(model.kl_map(x), expected, rtol=1e-4)


def test_beta_1_is_the_plain_elbo(model) -> None:
    x = images()
    model.zero_grad()
    torch.manual_seed(5)
    with poutine.scale(scale=1 / len(x)):
        loss = TraceMeanField_ELBO().loss_and_grads(model.model, model.guide, x)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.manual_seed(5)
    figures = ConvVAEObjective(SCHEDULE, model, 100).backward(model, x, 30)
    assert figures["loss"] == loss
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_an_evaluation_has_no_beta(model) -> None:
    x = images()
    model.eval()
    torch.manual_seed(1)
    before = log_weights(model, x, 3)
    ConvVAEObjective(SCHEDULE, model, 100).backward(model, x, 0)
    torch.manual_seed(1)
    assert torch.equal(log_weights(model, x, 3), before)


def test_learning_rates_rise_and_fall() -> None:
    schedule = ConvVAESchedule(learning_rate=1e-3, ramp=9, decay_from=0.5, decay_to=0.1)
    objective = ConvVAEObjective(schedule, ConvVAE(SMALL, SHAPE), 100)
    rates = [objective.learning_rates(step)["all"] for step in (0, 9, 50, 75, 100)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3, 5.5e-4, 1e-4])


# --- the networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_presets_have_the_papers_grid_and_size(preset, channels) -> None:
    model = ConvVAE(PRESETS[preset], (channels, 64, 64)).eval()
    z = grid([value for *_, value in drawn(model, images(1, (channels, 64, 64)))], 8, 8)
    assert z.shape == (1, 16, 8, 8)  # d = 1024
    assert model.decode(z).shape == (1, channels, 64, 64)
    assert 0.75e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.25e6


def test_the_fast_networks_see_what_is_near_alone() -> None:
    """No norm tells a place how many objects there are elsewhere."""
    model = informed(ConvVAE(PRESETS["fast"], (1, 64, 64))).eval()
    x = torch.zeros(3, 1, 16, 256)
    x[1:, :, :, 2:6] = 1
    x[2, :, :, 248:252] = 1
    for values, near in ((model.kl_map(x), 8), (model.reconstruct(x), 16)):
        blank, one, two = values
        assert not torch.equal(blank[..., :near], one[..., :near])
        assert torch.equal(one[..., :near], two[..., :near])
        assert not torch.equal(one, two)


def test_the_papers_layers() -> None:
    """As appendix B lists them: sides of what each part returns, then normalisations and others."""
    model = ConvVAE(PRESETS["paper"], (3, 64, 64)).eval()
    assert sides(model.encoder, images(1, (3, 64, 64))) == [32, 32, 16, 16, 8, 8, 8, 8]
    assert sides(model.decoder, torch.zeros(1, 16, 8, 8)) == [8, 8, 8, 16, 16, 32, 32, 64, 64, 64]
    assert model.encoder[:-1](torch.zeros(1, 3, 64, 64)).shape == (1, 64, 8, 8)
    for part in (model.encoder, model.decoder):
        kinds = [type(module) for module in part.modules()]
        assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.LeakyReLU) == 9
    strides = [m.stride for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert strides.count((2, 2)) == 3 and strides.count((1, 1)) == len(strides) - 3
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in model.modules()) == 2


def test_the_papers_auxiliary_vae() -> None:
    """11 x 11 x 8 latent variables, three residual blocks, downsampling between them."""
    model = ConvVAE(AUXILIARY["paper"], (3, 64, 64)).eval()
    ((*_, z),) = drawn(model, images(1, (3, 64, 64)))
    assert z.shape == (1, 8, 11, 11)
    assert sides(model.encoder, torch.zeros(1, 3, 66, 66)) == [66, 66, 22, 22, 11, 11, 11]
    assert sides(model.decoder, torch.zeros(1, 8, 11, 11)) == [11, 11, 22, 22, 66, 66, 66, 66]
    for part in (model.encoder, model.decoder):
        assert sum(isinstance(module, ResidualBlock) for module in part.modules()) == 3


@pytest.mark.parametrize("height, width", [(64, 64), (16, 20), (36, 4), (87, 17)])
def test_cells_of_the_papers_auxiliary_vae_reach_beyond_the_image(height, width) -> None:
    """All sides that suit LAVAE suit it, and cell i is of the pixels round 6 i + 2.5 less what
    lies before the first.
    """
    model = ConvVAE(AUXILIARY["paper"], (1, 64, 64)).eval()
    x = images(2, (1, height, width)).requires_grad_()
    rows, columns = -(-height // 6), -(-width // 6)
    assert model.kl_map(x).shape == (2, rows, columns)
    assert model.reconstruct(x.detach()).shape == x.shape
    assert torch.isfinite(iwae(model, x.detach(), 2)).all()
    row = rows // 2
    model.encode(x)[:, :, row].square().sum().backward()
    assert x.grad is not None
    seen = x.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    if 0 < seen[0] and seen[-1] < height - 1:  # not cut off by the edges
        centre = 6 * row + 2.5 - -height % 6 // 2
        assert (seen[0] + seen[-1]).item() / 2 == centre
    mean = model.decode(torch.zeros(1, 8, rows, columns))
    top, left = -height % 6 // 2, -width % 6 // 2
    whole = model.decode(torch.zeros(1, 8, rows, columns), (height, width))
    assert torch.equal(whole, mean[..., top:, left:][..., :height, :width])


def sides(net: nn.Sequential, x: Tensor) -> list[int]:
    found = []
    for layer in net:
        x = layer(x)
        found.append(x.shape[-1])
    return found


@pytest.mark.parametrize(
    "networks, stages", [("fast", 1), ("fast", 3), ("fast", 4), ("paper", 1), ("paper", 4)])
def test_grids_of_other_sizes(networks, stages) -> None:
    model = ConvVAE(ConvVAEConfig(2, stages, 8, networks), (1, 16, 32))
    x = images(2, (1, 16, 32))
    trace = poutine.trace(model.guide).get_trace(x)
    numbers = sum(n["value"][0].numel() for name, n in trace.nodes.items() if name[:2] == "z_")
    assert numbers == 2 * 16 * 32 // 4**stages
    assert model.kl_map(x).shape == (2, 16 // 2**stages, 32 // 2**stages)
    assert model.reconstruct(x).shape == x.shape and torch.isfinite(iwae(model, x, 2)).all()


@pytest.mark.parametrize("networks", ["fast", "paper"])
def test_bfloat16_changes_little_and_returns_float32(networks) -> None:
    model, x = ConvVAE(replace(SMALL, networks=networks), SHAPE), images(8)
    losses = []
    for model.autocast in (False, True):
        torch.manual_seed(0)
        losses.append(ConvVAEObjective(SCHEDULE, model, 100).backward(model, x, 50)["loss"])
        assert model.decode(torch.zeros(1, 2, 2, 3)).dtype == torch.float32
        assert {value.dtype for site in drawn(model, x) for value in site} == {torch.float32}
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def test_only_networks_are_saved() -> None:
    """The checkpoints of LAVAE's trainings hold one of these."""
    names = ConvVAE(ConvVAEConfig(), (3, 64, 64)).state_dict()
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}


def test_images_of_other_sides_are_encoded_and_drawn(model) -> None:
    x = images(2, (3, 12, 20))
    assert model.reconstruct(x).shape == x.shape and log_weights(model, x, 2).shape == (2, 2)


@pytest.mark.parametrize("shape", [(3, 8, 10), (3, 9, 12), (3, 2, 4), (1, 8, 12)])
def test_images_that_do_not_suit_are_refused(model, shape) -> None:
    x = torch.rand(2, *shape)
    for use in (model.check, model.guide, model.reconstruct, model.kl_map):
        with pytest.raises(UserError, match="multiples of 4|3 channels"):
            use(x)


def test_a_reconstruction_is_of_draws_and_the_same_each_time(model, monkeypatch) -> None:
    """Its mean over them; a decoder that draws z's square shows sigma^2 more than f(mu) does."""
    x = torch.cat([images(3)] * 2)
    model.decoder = Square()
    monkeypatch.setattr(conv_vae, "DRAWS", 1000)
    found = model.reconstruct(x)
    assert torch.allclose(found[:3], found[3:], atol=1e-4)
    assert torch.equal(found, model.reconstruct(x))
    with torch.no_grad(), pyro.plate("particles", 1000, dim=-2):
        z = grid([value.expand(1000, -1, -1, -1, -1) for *_, value in drawn(model, x)], 2, 3)
    at_mean, spread = z.mean(0).square().mean((1, 2, 3)), z.var(0).mean((1, 2, 3))
    assert torch.allclose(found.mean((1, 2, 3)), at_mean + spread, rtol=0.1)
    assert (spread > 0.2 * at_mean).all()


class Square(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z.square()


def test_a_prior_of_other_cells_is_refused() -> None:
    model, x = ConvVAE(replace(SMALL, networks="fast"), SHAPE).eval(), images()
    torch.manual_seed(0)
    before = log_weights(model, x, 2)
    with model.priors(latent=GridNormal(4)):  # which is what a prior begins as
        torch.manual_seed(0)
        assert torch.allclose(log_weights(model, x, 2), before)
        assert model.sample(2).shape == (2, *SHAPE)
    for wrong in (GridNormal(1), Wide()):
        with model.priors(latent=wrong), pytest.raises(UserError, match="cells of shape"):
            model.sample(2)


def test_a_phase_may_be_given_to_all_particles(model) -> None:
    x, given = images().double(), {}
    model = model.double()
    given["z_0"] = poutine.trace(model.guide).get_trace(x).nodes["z_0"]["value"]
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(poutine.condition(model.model, data=given)).get_trace(x)
    assert trace.nodes["x"]["fn"].mean.shape[-3:] == SHAPE
    assert model.sample(2).dtype == torch.float64


def test_settings_that_do_not_suit_are_refused(tmp_path) -> None:
    for networks in ("fast", "paper"):
        config = make_config("conv-vae", "multi-dsprites", networks)
        with pytest.raises(UserError, match="multiples of 8"):
            checkpoint.build(config, (1, 50, 50))
        config = make_config("conv-vae", "multi-dsprites", networks, ["grid_stages=7"])
        with pytest.raises(UserError, match="multiples of 128"):
            checkpoint.build(config, (1, 64, 64))
    config = make_config("conv-vae", "multi-dsprites", "paper", ["grid_stages=5"])
    with pytest.raises(UserError, match="4 times at most"):
        checkpoint.build(config, (1, 64, 64))
    config = make_config("conv-vae", "multi-dsprites", settings=["networks=dense"])
    with pytest.raises(UserError, match="fast, paper"):
        checkpoint.build(config, (1, 64, 64))
    for setting in ("grid_latent=0", "grid_stages=0", "grid_width=1"):
        with pytest.raises(UserError, match="at least"):
            make_config("conv-vae", "multi-dsprites", settings=[setting])


# --- trainings -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of 16 x 16 with a square of 4 x 4 anywhere: -log p(x) is log 169 at best."""
    generator = np.random.default_rng(0)
    pixels = np.zeros((2000, 16, 16, 1), np.uint8)
    for image, (row, column) in zip(pixels, generator.integers(0, 13, (2000, 2))):
        image[row:row + 4, column:column + 4] = 255
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    save_npz(path, SceneData.from_images("squares", pixels))
    return path


@pytest.mark.parametrize("preset, settings", [
    ("fast", ["grid_width=32", "batch_size=64", "learning_rate=4e-3"]),
    ("paper", ["grid_width=16", "learning_rate=5e-3", "optimizer=adam"]),
])
def test_a_short_training_learns(preset, settings, squares, tmp_path) -> None:
    settings = settings + ["beta_full=0.27", "grid_latent=4", "decay_to=0.05"]
    config = make_config("conv-vae", str(squares), preset, settings, steps=150)
    history = training.train(config, tmp_path, device="cpu", progress=False)
    assert {"loss", "kl", "beta", "held-out -ELBO"} <= history.keys()
    assert history["beta"][1][-1] == 1.0
    model = checkpoint.load(tmp_path).model
    assert isinstance(model, ConvVAE)
    _, held_out = split_held_out(load(str(squares)))
    result = evaluate(model, held_out, particles=20, progress=False)
    entropy = math.log(13**2)
    assert entropy < result["nll"] < 8 * entropy
    assert result["model"] == "conv-vae" and result["count_accuracy"] is None


def test_the_commands_work_without_objects(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "few.npz"
    result = CliRunner().invoke(cli.train, [
        *"--model conv-vae --data multi-dsprites --steps 2 --device cpu --out".split(), str(run),
        *"--set grid_width=8 --set batch_size=4 --set eval_images=4".split(),
    ])
    assert result.exit_code == 0, result.output
    assert (run / "inference.png").exists() and "count" not in result.output
    result = CliRunner().invoke(cli.infer, [str(run), "--sample", "3", "--figure", f"{run}/s.png"])
    assert result.exit_code == 0 and (run / "s.png").exists()
    save_npz(data, load("multi-dsprites", images=3))
    result = CliRunner().invoke(cli.evaluate, [
        str(run), "--data", str(data), "--particles", "2", "--json", f"{run}/figures.json",
        "--figures", f"{run}/figures",
    ])
    assert result.exit_code == 0, result.output
    figures = json.loads((run / "figures.json").read_text())
    assert figures["nll"] > 0 and figures["count_accuracy"] is figures["ari"] is None
    drawn = {path.name for path in (run / "figures").iterdir()}
    assert drawn == {"inference.png", "samples.png"}
    result = CliRunner().invoke(cli.infer, [str(run), str(data), "--out", f"{run}/found.json"])
    assert result.exit_code == 2 and "without objects" in result.output
