"""Likelihood bounds against log p(x) by enumeration, and what an evaluation reports.

On a canvas of a few pixels log p(x) is a sum over every count and every ordered tuple of places,
times an integral over z_app of one dimension, which Gauss-Hermite quadrature does. The guide's
count is a point mass, so E_q[p(x, z) / q(z | x)] is the part of that sum that has its count.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pyro_scenes import evaluate, metrics, report
from pyro_scenes.data import SceneData
from pyro_scenes.models.conv_vae import ConvVAE, ConvVAEConfig
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig

FLOOR = 0.2  # high, so that no weight is worth a thousand others
CONFIG = LAVAEConfig(
    max_objects=2, latent=1, sprite=3, crop=3, location_width=8, location_blocks=1,
    appearance_width=4, appearance_hidden=6, sprite_hidden=(6,), count_window=3, blocked_window=1,
    count_threshold=2.0, logit_scale=0.5, likelihood_floor=FLOOR,
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
    model.encode = lambda x: replace(encode(x), count=torch.full((len(x),), count))
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
    weights = evaluate.log_weights(model, repeated(x, 3), 2)
    truth = log_joint(model, x.numpy(), 0)
    assert weights.tolist() == [[pytest.approx(truth, rel=1e-5)] * 3] * 2


@pytest.mark.parametrize("size, count, blocked, allowed", [
    (SQUARE, 1, 1, lambda place: True),
    (SQUARE, 2, 1, lambda *places: True),
    (SQUARE, 2, 3, not_near),  # such a guide covers a part of the posterior
    (SQUARE, 2, 13, lambda *places: True),  # no place is out of the window: the nearest serve
    (WIDE, 1, 1, lambda place: True),
])
def test_mean_weights_are_the_exact_likelihood(size, count, blocked, allowed) -> None:
    model, x = with_counts(tiny(size, blocked_window=blocked), count), image(size)
    torch.manual_seed(1)
    weights = evaluate.log_weights(model, repeated(x, 20), 5000, chunk=20_000)
    agrees(weights, log_joint(model, x.numpy(), count, allowed))
    assert weights.std() > 0.5  # the guide is not so good that anything would pass


def test_a_guide_that_covers_a_part_gives_a_smaller_mean() -> None:
    x = image(SQUARE).numpy()
    assert log_joint(tiny(), x, 2, not_near) < log_joint(tiny(), x, 2) - 0.1


@pytest.mark.parametrize("size", [SQUARE, WIDE])
def test_other_sizes_than_the_trained_one(size) -> None:
    """Made for 4 x 8 and 4 x 4, evaluated on the other; sprites add up beyond 1 here."""
    model = with_counts(tiny(WIDE if size == SQUARE else SQUARE), 2)
    sprite = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.8, 0.6], [0.3, 0.4, 0.0]]).view(1, 1, 3, 3)
    model.sprite_net, model.appearance_net = Fixed(sprite), Prior()
    x = image(size)
    torch.manual_seed(2)
    weights = evaluate.log_weights(model, repeated(x, 20), 5000, chunk=20_000)
    agrees(weights, log_joint(model, x.numpy(), 2, nodes=1), 0.02)


def test_only_the_gradient_of_places_is_relaxed() -> None:
    """The temperature of a training leaves the figures as they are."""
    model, x = with_counts(tiny(), 2), repeated(image(SQUARE), 5)
    torch.manual_seed(3)
    exact = evaluate.log_weights(model, x, 10)
    model.temperature = 0.5
    torch.manual_seed(3)
    assert torch.equal(evaluate.log_weights(model, x, 10), exact)


# --- the bound -----------------------------------------------------------------------------------


def test_the_bound_rises_to_the_exact_likelihood_and_stays_below() -> None:
    model, x = with_counts(tiny(), 2), image(SQUARE)
    truth = log_joint(model, x.numpy(), 2)
    torch.manual_seed(4)
    means = []
    for particles, repeats in ((1, 4000), (10, 2000), (100, 1000), (1000, 200)):
        bounds = evaluate.iwae(model, repeated(x, repeats), particles, chunk=20_000).double()
        assert bounds.shape == (repeats,)
        error = bounds.std() / math.sqrt(repeats)
        assert bounds.mean() < truth + 3 * error
        means.append((bounds.mean().item(), error.item()))
    for (before, _), (after, error) in zip(means, means[1:]):
        assert after > before + 3 * error
    assert truth - means[0][0] > 0.3 and abs(truth - means[-1][0]) < 0.02


def test_the_bound_is_one_for_the_whole_likelihood() -> None:
    """What the guide's count leaves out of the sum makes the figure worse, never better."""
    x = image(SQUARE)
    parts = [log_joint(tiny(), x.numpy(), count) for count in range(3)]
    torch.manual_seed(5)
    bounds = [evaluate.iwae(with_counts(tiny(), n), repeated(x, 20), 500, 8000) for n in range(3)]
    whole = np.logaddexp.reduce(parts)
    for bound, part in zip(bounds, parts):
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
    model.encode = lambda x: replace(encode(x), heights=heights.expand(len(x), *SQUARE))
    seen = []
    plain = evaluate._log_weights
    monkeypatch.setattr(evaluate, "_log_weights", lambda m, x, k: seen.append(k) or plain(m, x, k))
    torch.manual_seed(6)
    weights = evaluate.log_weights(model, repeated(x, 4), 100, chunk)
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
    weights = evaluate.log_weights(model, x, 11).double().exp()
    torch.manual_seed(7)
    bound = evaluate.iwae(model, x, 11)
    assert np.allclose(bound, weights.mean(0).log(), rtol=1e-5)


def test_a_gaussian_latent_by_quadrature() -> None:
    """A convolutional VAE with a single latent number: log p(x) is a one-dimensional integral."""
    torch.manual_seed(0)
    model = ConvVAE(ConvVAEConfig(1, 2, 8), (1, 4, 4)).eval()
    model.likelihood.floor = FLOOR
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
        model.encoder[-1].bias.copy_(torch.tensor([0.4, 0.3]))
        model.decoder[2].weight.mul_(4)
    x = image(SQUARE)
    z, mass = np.polynomial.hermite_e.hermegauss(60)
    with torch.no_grad():
        mean = model.decoder(torch.tensor(z, dtype=torch.float32).view(-1, 1, 1, 1)).double()
    mean = FLOOR + (1 - 2 * FLOOR) * mean.numpy()[:, 0]
    likelihood = np.where(x.numpy() == 1, mean, 1 - mean).prod((1, 2))
    truth = math.log((mass * likelihood).sum() / mass.sum())
    agrees(evaluate.log_weights(model, repeated(x, 4), 2000, 8000), truth)


# --- an evaluation -------------------------------------------------------------------------------


class Bright(nn.Module):
    """A location network that finds one object at every pixel of ink."""

    stride = 1

    def forward(self, x: Tensor) -> Tensor:
        return 2.5 * x.amax(1)


def dots() -> tuple[LAVAE, SceneData]:
    """Images with 0, 1, 2 and 2 dots of ink, and a model that finds just those."""
    model = tiny()
    model.location_net = Bright()
    sprite = torch.zeros(1, 1, 3, 3)
    sprite[..., 1, 1] = 0.95
    model.sprite_net, model.appearance_net = Fixed(sprite), Prior()
    pixels = np.zeros((4, 4, 4, 1), np.uint8)
    pixels[1, 0, 0] = 255
    pixels[2, 1, 1], pixels[2, 3, 3] = 255, 255
    pixels[3, 0, 3], pixels[3, 3, 0] = 255, 255
    data = SceneData.from_images(
        "dots", pixels, counts=np.array([0, 1, 2, 1]), segmentation=(pixels[..., 0] > 0) * 1
    )
    # By the truth the two dots of the third image are two objects, those of the fourth one.
    data.segmentation[2, 3, 3] = 2
    return model, data


def test_an_evaluation_reports_what_it_should() -> None:
    model, data = dots()
    result = evaluate.evaluate(model, data, particles=5, seed=3, progress=False)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert {k: result[k] for k in ("model", "data", "images", "particles", "seed")} == {
        "model": "lavae", "data": "dots", "images": 4, "particles": 5, "seed": 3}
    assert result["count_accuracy"] == 0.75
    assert result["count_confusion"] == metrics.count_confusion(
        np.array([0, 1, 2, 2]), np.array([0, 1, 2, 1]))
    assert result["category_correspondence"] is None and result["seconds"] >= 0
    # One pixel; two pixels apart that are apart; two that should be one segment and are two:
    # there the index is 0. The image without objects has none.
    assert result["ari"] == pytest.approx((1 + 1 + 0) / 3)

    torch.manual_seed(3)
    nll = -evaluate.iwae(model, data.batch(), 5).double()
    assert result["nll"] == pytest.approx(nll.mean().item())
    assert result["nll_stderr"] == pytest.approx(nll.std().item() / 2)


def test_an_evaluation_of_categories_and_their_places() -> None:
    model, data = dots()
    # By the model, dots left of the middle are 4 and others 9.
    infer = model.infer

    def categorise(x: Tensor, limit: float | None = None):
        scene = infer(x, limit)
        kind = torch.where(scene.where[..., 0] < 2, 4, 9)
        return replace(scene, kind=kind.masked_fill(~scene.present, -1))

    model.infer = categorise
    # By the truth it is so in the second and third image, and the other way round in the fourth.
    none = (np.nan,) * 4
    truth = {
        "categories": np.array([[-1, -1], [0, -1], [0, 1], [0, 1]]),
        "boxes": np.array([
            [none, none], [(0.5, 0.5, 1, 1), none],
            [(1.5, 1.5, 1, 1), (3.5, 3.5, 1, 1)], [(3.5, 0.5, 1, 1), (0.5, 3.5, 1, 1)],
        ], np.float32),
    }
    result = evaluate.evaluate(model, replace(data, **truth), particles=0)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["category_correspondence"] == 1 and result["classes"] == 2
    assert result["placed_correspondence"] == result["purity"] == pytest.approx(3 / 5)

    header, row = report.table({"dots": result}).splitlines()
    at = [header.index(name) for name in ("categories right", "classes", "right in place", "pur")]
    assert [row[i:].split()[0] for i in at] == ["100.00%", "2", "60.00%", "60.00%"]

    # Without boxes the paper's figure is left, without labels the classes.
    result = evaluate.evaluate(model, replace(data, **truth | {"boxes": None}), particles=0)
    assert result["category_correspondence"] == 1 and result["classes"] == 2
    assert result["placed_correspondence"] is None and result["purity"] is None
    result = evaluate.evaluate(model, data, particles=0)
    assert result["category_correspondence"] is None and result["classes"] == 2
    assert "%" not in report.table({"dots": result}).split("75.00%")[1]


def test_an_evaluation_follows_its_seed_and_its_images() -> None:
    model, data = dots()
    one, same, other = (
        evaluate.evaluate(model, data, particles=3, images=3, seed=seed, progress=False)["nll"]
        for seed in (0, 0, 1)
    )
    assert one == same != other
    short = evaluate.evaluate(model, data[:3], particles=3, progress=False)
    assert short["images"] == 3 and short["nll"] == one


def test_what_cannot_be_measured_is_none() -> None:
    model, data = dots()
    bare = SceneData.from_images("bare", data.images())
    result = evaluate.evaluate(model, bare[:1], particles=2, progress=False)
    assert {k for k, value in result.items() if value is None} == {
        "nll_stderr", "count_accuracy", "count_confusion", "category_correspondence",
        "placed_correspondence", "purity", "classes", "ari"}
    grey = SceneData.from_images("grey", data.images() // 2)
    assert evaluate.evaluate(model, grey, particles=2, progress=False)["nll"] is None
    # A model without objects has a likelihood, and no count.
    vae = ConvVAE(ConvVAEConfig(1, 2, 8), (1, 4, 4)).eval()
    result = evaluate.evaluate(vae, data, particles=2, progress=False)
    assert result["nll"] > 0 and result["count_accuracy"] is None and result["ari"] is None


def test_likelihoods_of_a_data_set_come_in_order() -> None:
    model, data = dots()
    torch.manual_seed(0)
    in_parts = evaluate.likelihoods(model, data, 2000, chunk=2000)
    at_once = evaluate.likelihoods(model, data, 2000, chunk=10_000)
    assert in_parts.shape == (4,)
    assert torch.allclose(in_parts, at_once, atol=0.06)
    assert at_once[:3].diff().abs().min() > 0.12  # images differ by more than noise


def test_inference_of_a_data_set_is_that_of_its_batches(monkeypatch) -> None:
    model, data = dots()
    whole, map_of_all = evaluate.infer(model, data)
    monkeypatch.setattr(evaluate, "BATCH", 1)
    parts, map_in_parts = evaluate.infer(model, data)
    assert whole.to_json() == parts.to_json() and torch.equal(map_of_all, map_in_parts)
    assert whole.counts.tolist() == [0, 1, 2, 2]
    assert map_of_all[0].eq(0).all() and map_of_all.amax((1, 2)).tolist() == [0, 1, 2, 2]


def test_a_look_is_the_one_sample_bound_and_the_count_accuracy() -> None:
    model, data = dots()
    look = evaluate.look(model, data)
    assert look["count accuracy"] == 0.75
    torch.manual_seed(0)
    bound = evaluate.iwae(model, data.batch(), 1).mean().item()
    assert look["held-out -ELBO"] == pytest.approx(-bound)
    assert evaluate.look(model, data) == look
