"""The figures of the tables again, by plain numpy from what the saved networks put out.

`evaluate` is run on a few images. Beside it, the raw outputs of the networks are taken down
(heights, heads, encoders, decoders before their sigmoid) and the values that the guide drew;
everything else, from the densities to the figures, is computed a second time here: by numpy and
scipy, with formulae of this file, and none of the project's code.

One shipped checkpoint of each model is read; of a model that has none, networks as they begin.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from numpy.typing import NDArray
from pyro import poutine
from scipy import ndimage, special

from pyro_scenes import bounds, checkpoint
from pyro_scenes.config import make_config
from pyro_scenes.data import SceneData, load
from pyro_scenes.evaluate import evaluate
from pyro_scenes.models import MODELS, GenerativeModel
from pyro_scenes.priors import GaussianMixture, StandardNormal

Array = NDArray[np.float64]
IMAGES, PARTICLES = 12, 6
CHECKPOINTS = {
    "lavae": "lavae-multi-dsprites", "discrete-air": "discrete-air-multi-sprites",
    "discrete-air, deformed": "discrete-air-multi-mnist",
    "air": "air-multi-dsprites", "conv-vae": "conv-vae-multi-dsprites",
}
# Modules whose outputs are raw, by model.
RAW = {
    "lavae": ["location_net", "appearance_net"], "air": [
        "presence_head", "where_head", "encoder", "peak"],
    "discrete-air": ["presence_head"], "discrete-air, deformed": ["presence_head"],
    "conv-vae": ["latent_head"],
}


@dataclass
class Notes:
    """What a run of the guide put out: values of sites, and raw outputs in the order of calls."""

    values: dict[str, Array] = field(default_factory=dict)
    raw: dict[str, list] = field(default_factory=dict)


def plain(thing):
    """Tensors to float64 numpy, inside tuples and objects with a __dict__."""
    if isinstance(thing, torch.Tensor):
        return thing.detach().double().numpy()
    if isinstance(thing, tuple):
        return tuple(plain(part) for part in thing)
    return {k: plain(v) for k, v in vars(thing).items()} if hasattr(thing, "__dict__") else thing


def noted(name: str, model: GenerativeModel, run: Callable) -> Notes:
    """Run something, and take down the raw outputs."""
    notes = Notes()
    handles = [
        getattr(model, part).register_forward_hook(
            lambda _, __, out, part=part: notes.raw.setdefault(part, []).append(plain(out)))
        for part in RAW[name]
    ]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if name.startswith("discrete-air"):  # what categories would explain is no module's
            guess = model._guess

            def spied(*arguments):
                notes.raw.setdefault("guess", []).append(plain(found := guess(*arguments)))
                return found

            patch.setattr(model, "_guess", spied)
        result = run()
    for handle in handles:
        handle.remove()
    if isinstance(result, poutine.Trace):
        notes.values = {k: plain(s["value"]) for k, s in result.nodes.items()
                        if s["type"] == "sample" and not k.startswith(("images", "particles"))}
    return notes


# --- densities -----------------------------------------------------------------------------------


def normal(x: Array, mean: Array, scale: Array, axes=-1) -> Array:
    squares = ((x - mean) / scale) ** 2
    return (-0.5 * squares - np.log(scale) - 0.5 * math.log(2 * math.pi)).sum(axes)


def standard(x: Array) -> Array:
    return normal(x, np.zeros_like(x), np.ones_like(x))


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def of_image(model: GenerativeModel, x: Array, mean: Array) -> Array:
    """log p(x given its mean), (K, B), of (B, C, H, W) and (K, B, C, H, W)."""
    if model.likelihood.binary:
        floor = model.likelihood.floor
        mean = floor + (1 - 2 * floor) * mean.clip(0, 1)
        return np.where(x > 0.5, np.log(mean), np.log1p(-mean)).sum((-3, -2, -1))
    return normal(x, mean, np.full_like(mean, model.likelihood.sigma), (-3, -2, -1))


def sigmoid(raw: torch.nn.Module, z: Array) -> Array:
    """The sigmoid of what a network puts out for (N, ...)."""
    with torch.no_grad():
        return special.expit(raw(torch.tensor(z).float()).double().numpy())


# --- LAVAE ---------------------------------------------------------------------------------------


def shut(logits: Array, place: int, width: int, side: int) -> Array:
    """Without the window round a place, (H * W,)."""
    rows, columns = np.divmod(np.arange(len(logits)), width)
    near = (abs(rows - place // width) <= side // 2) & (abs(columns - place % width) <= side // 2)
    return np.where(near, -np.inf, logits)


def counted(model, heights: Array) -> NDArray[np.int64]:
    c = model.config
    highest = ndimage.maximum_filter(heights, (0, c.count_window, c.count_window), mode="nearest")
    peaks = (heights >= highest) & (heights > c.count_threshold)
    return peaks.sum((1, 2))


def stamped(sprite: Array, place: int, size: tuple[int, int]) -> Array:
    """A sprite (C, S, S) on an empty canvas (C, H, W), centred on a place."""
    half, (row, column) = sprite.shape[-1] // 2, divmod(place, size[1])
    canvas = np.zeros((len(sprite), size[0] + 2 * half, size[1] + 2 * half))
    canvas[:, row:row + 2 * half + 1, column:column + 2 * half + 1] = sprite
    return canvas[:, half:-half, half:-half]


def of_appearance(model, z: Array) -> Array:
    """log p(z_app), of (L,)."""
    prior = model.appearance_prior
    if isinstance(prior, StandardNormal):
        return standard(z)
    assert isinstance(prior, GaussianMixture)
    logits, means, log_scales = (plain(value) for value in prior.parameters())  # (K,), (K, L)
    parts = normal(z, means, np.exp(log_scales))
    return special.logsumexp(parts + special.log_softmax(logits))


def decoded(model, z: Array) -> Array:
    net = model.sprite_net
    return sigmoid(net.net, z).reshape(-1, *net.shape)


def lavae_terms(model, x: Array, notes: Notes) -> dict[str, Array]:
    c, size = model.config, x.shape[-2:]
    (heights,), ((means, log_variances),) = notes.raw["location_net"], notes.raw["appearance_net"]
    n = counted(model, heights)
    assert (notes.values["n"] == n).all()
    logits = c.logit_scale * math.log(heights[0].size) * heights.reshape(len(x), -1)
    scales = np.exp(0.5 * log_variances.clip(-14, 4))
    count_logits = model.count_prior.logits.detach().double().numpy()
    shape = (PARTICLES, len(x))
    terms = {name: np.zeros(shape) for name in ("n", "z_loc", "z_app")}
    terms["n"] += special.log_softmax(count_logits)[n]
    canvas, listed = np.zeros((*shape, *x.shape[1:])), 0
    for k, b in np.ndindex(shape):
        left = logits[b]
        for i in range(n[b]):
            place = int(notes.values[f"z_loc_{i}"][k, b].argmax())
            z = notes.values[f"z_app_{i}"][k, b]
            terms["z_loc"][k, b] += -math.log(left.size - i) - (
                left[place] - special.logsumexp(left))
            own = normal(z, means[listed], scales[listed])
            terms["z_app"][k, b] += of_appearance(model, z) - own
            canvas[k, b] += stamped(decoded(model, z[None])[0], place, size)
            left, listed = shut(left, place, size[1], c.blocked_window), listed + 1
    terms["reconstruction"] = of_image(model, x, canvas)
    return terms


def lavae_scenes(model, x: Array, notes: Notes) -> tuple[list, None, list]:
    (heights,), ((means, _),) = notes.raw["location_net"], notes.raw["appearance_net"]
    counts, layers, listed = counted(model, heights), [], 0
    for b, n in enumerate(counts):
        left, layers_of = heights[b].flatten(), []
        for _ in range(n):
            place = int(left.argmax())
            sprite = decoded(model, means[listed][None])[0]
            layers_of.append(stamped(sprite, place, x.shape[-2:]))
            left, listed = shut(left, place, x.shape[-1], model.config.blocked_window), listed + 1
        layers.append(layers_of)
    return counts.tolist(), None, layers


# --- AIR and Discrete-AIR ------------------------------------------------------------------------


def written(template: Array, matrix: Array, size: tuple[int, int]) -> Array:
    """A template (C, S, S) on a canvas (C, H, W), by the matrix from window to image, by scipy."""
    side = template.shape[-1]
    row, column = np.meshgrid(*[(np.arange(n) + 0.5) * 2 / n - 1 for n in size], indexing="ij")
    points = np.stack([column, row, np.ones_like(row)]).reshape(3, -1)
    u, v, _ = np.linalg.inv(matrix) @ points
    at = [((w + 1) * side - 1) / 2 + 1 for w in (v, u)]  # 1 for the frame
    return np.stack([
        ndimage.map_coordinates(np.pad(plane, 1), at, order=1, cval=0.0).reshape(size)
        for plane in template
    ])


def sharpened(model, drawn: Array) -> Array:
    """Odds to the power that the model has learned."""
    if not model.config.contrast:
        return drawn
    inside = drawn.clip(1e-6, 1 - 1e-6)
    odds = (inside / (1 - inside)) ** math.exp(plain(model.contrast.log_exponent))
    return odds / (1 + odds)


def matrix_of(model, z: Array) -> Array:
    """Window to image, of z_where."""
    c, matrix = model.config, np.eye(3)
    if type(model).__name__ == "AIR":
        scale = np.clip(c.scale_mean * math.exp(c.scale_deviation * z[0]), 0.02, 2.0)
        matrix[0, 0] = matrix[1, 1] = scale
        matrix[:2, 2] = c.place_deviation * z[1:3]
        return matrix
    sides = np.full(2, z[:2].mean()) if c.isotropic else z[:2]
    scale = c.scale_least + (c.scale_most - c.scale_least) * special.expit(sides)
    angle = c.angle_deviation * z[2]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    k_x, k_y = 0.3 * z[5:] if c.shear else (0.0, 0.0)
    matrix[:2, :2] = np.diag(scale) @ turn @ [[1 + k_x * k_y, k_x], [k_y, 1]]
    matrix[:2, 2] = 0.5 * z[3:5]
    return matrix


def template_of(model, kind: Array | None, what: Array | None) -> Array:
    if kind is None:
        return sigmoid(model.decoder.net, what[None]).reshape(model.decoder.shape)
    code = model.template(torch.tensor(kind[None]).float())
    activation, mlp = model.decoder
    drawn = sigmoid(mlp.net, activation(code).detach().double().numpy()).reshape(mlp.shape)
    return drawn if what is None else deformed(drawn, plain(model.attribute.weight) @ what)


def deformed(template: Array, numbers: Array) -> Array:
    """Read at its pixels and what two grids of 4 x 4 numbers add to them, x and y, of half a side.

    Between these numbers, whose outer ones lie on the middles of the outer pixels, by cubic
    convolution (a = -0.75); beyond them as at the edge. Odds are multiplied by exp(the last).
    """
    side = template.shape[-1]
    distance = abs(np.linspace(0, 3, side)[:, None] - np.arange(-1, 5))  # of two numbers more
    near = 1.25 * distance**3 - 2.25 * distance**2 + 1
    far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    x, y = (weights @ np.pad(grid.reshape(4, 4), 1, mode="edge") @ weights.T
            for grid in np.split(numbers[:32], 2))
    row, column = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    at = [row + y * side / 2 + 1, column + x * side / 2 + 1]  # 1 for the frame
    bent = np.stack([ndimage.map_coordinates(np.pad(plane, 1), at, order=1, cval=0.0)
                     for plane in template])
    odds = np.exp(np.clip(numbers[32], -4, 4))
    return bent * odds / (1 - bent + bent * odds)


def attended(model, notes: Notes, t: int, shape: tuple[int, ...]) -> dict[str, Array]:
    """Logits and parameters of the sites of step t, (*shape, .), of the raw outputs."""
    def rows(values: Array) -> Array:  # of the first step there is one for all particles
        return np.broadcast_to(values, (*shape, values.shape[-1])) if len(values) == shape[-1] \
            else values.reshape(*shape, -1)

    c = model.config
    presence = rows(notes.raw["presence_head"][t])[..., 0]
    if type(model).__name__ == "AIR":
        mean, spread = np.split(rows(notes.raw["where_head"][t]), 2, -1)
        centre = rows(notes.raw["peak"][t]) / c.place_deviation
        mean = mean * [1.0, 0.2, 0.2] + np.concatenate([0 * centre[..., :1], centre], -1)
        what, width = np.split(rows(notes.raw["encoder"][t]), 2, -1)
        return {"presence": presence.clip(-12, 12), "where": mean,
                "where scale": 0.1 * softplus(spread - 1) + 1e-3, "what": what,
                "what scale": softplus(width - 1) + 1e-3}
    guess = notes.raw["guess"][t]
    logits = rows(guess["logits"])
    presence = presence + (logits.max(-1) / c.sure).clip(-8, 8)
    shaped = {
        key: rows(guess[name].reshape(len(guess[name]), -1)).reshape(*shape, c.classes, -1)
        for key, name in (("where", "mean"), ("where scale", "scale"))
    }
    for i, key in enumerate(("what", "what scale") if c.attributes else ()):
        value = guess["attributes"][i]
        shaped[key] = rows(value.reshape(len(value), -1)).reshape(*shape, c.classes, -1)
    return shaped | {"presence": presence, "category": special.log_softmax(logits, -1)}


def attend_terms(model, x: Array, notes: Notes) -> dict[str, Array]:
    c, shape = model.config, (PARTICLES, len(x))
    categories = model.classes > 0
    terms = {name: np.zeros(shape) for name in ("z_pres", "z_where")}
    terms |= {name: np.zeros(shape) for name in (["z_cat"] if categories else ["z_what"])}
    attributes = categories and c.attributes > 0
    terms |= {"z_attr": np.zeros(shape)} if attributes else {}
    canvas, here = np.zeros((*shape, *x.shape[1:])), np.ones(shape)
    for t in range(model.steps):
        sites = attended(model, notes, t, shape)
        drawn = notes.values[f"z_pres_{t}"]
        there = drawn[..., 1] if categories else drawn
        log_q = np.where(there == 1, -softplus(-sites["presence"]), -softplus(sites["presence"]))
        log_p = np.where(there == 1, math.log(c.more), math.log(1 - c.more))
        terms["z_pres"] += here * (log_p - log_q)
        here = here * there
        z_where, mean, scale = notes.values[f"z_where_{t}"], sites["where"], sites["where scale"]
        kinds, what = None, None
        if categories:
            kinds = notes.values[f"z_cat_{t}"]
            terms["z_cat"] += here * (-math.log(c.classes) - (kinds * sites["category"]).sum(-1))
            mean, scale = ((kinds[..., None] * v).sum(-2) for v in (mean, scale))
            if attributes:
                what = notes.values[f"z_attr_{t}"]
                site = [(kinds[..., None] * sites[v]).sum(-2) for v in ("what", "what scale")]
                terms["z_attr"] += here * (standard(what) - normal(what, *site))
        else:
            what = notes.values[f"z_what_{t}"]
            terms["z_what"] += here * (
                standard(what) - normal(what, sites["what"], sites["what scale"]))
        terms["z_where"] += here * (standard(z_where) - normal(z_where, mean, scale))
        for at in np.argwhere(here == 1):
            k, b = at
            template = template_of(model, None if kinds is None else kinds[k, b],
                                   None if what is None else what[k, b])
            drawn = written(template, matrix_of(model, z_where[k, b]), x.shape[-2:])
            canvas[k, b] += sharpened(model, drawn)
    terms["reconstruction"] = of_image(model, x, canvas)
    return terms


def attend_scenes(model, x: Array, notes: Notes) -> tuple[list, list | None, list]:
    categories, size = model.classes > 0, x.shape[-2:]
    counts, kinds, layers = [], [], []
    for b in range(len(x)):
        found: list[Array] = []
        kind: list[int] = []
        for t in range(model.steps):
            sites = {k: v[b] for k, v in attended(model, notes, t, (len(x),)).items()}
            if sites["presence"] <= 0:
                break
            if categories:
                kind.append(int(sites["category"].argmax()))
                what = sites["what"][kind[-1]] if model.config.attributes else None
                template = template_of(model, np.eye(model.classes)[kind[-1]], what)
                z_where = sites["where"][kind[-1]]
            else:
                template, z_where = template_of(model, None, sites["what"]), sites["where"]
            found.append(sharpened(model, written(template, matrix_of(model, z_where), size)))
        counts.append(len(found))
        kinds.append(kind)
        layers.append(found)
    return counts, kinds if categories else None, layers


# --- the convolutional VAE -----------------------------------------------------------------------


def grid_terms(model, x: Array, notes: Notes) -> dict[str, Array]:
    axes, c, term = (-3, -2, -1), model.config, np.zeros(())
    z = np.zeros((PARTICLES, len(x), c.grid_latent, *(v // 2**c.grid_stages for v in x.shape[2:])))
    for i, (row, column) in enumerate([(0, 0), (1, 1), (0, 1), (1, 0)]):
        with torch.no_grad():
            prior = model.latent_prior.net(i, torch.tensor(z).float()).double().numpy()
        value = notes.values[f"z_{i}"]
        densities = []
        for raw in (prior, notes.raw["latent_head"][i]):
            mean, log_variance = np.split(raw, 2, -3)
            densities.append(normal(value, mean, np.exp(0.5 * log_variance.clip(-14, 4)), axes))
        term = term + densities[0] - densities[1]
        z[..., row::2, column::2] = value
    drawn = sigmoid(model.decoder[:-1], z.reshape(-1, *z.shape[2:]))
    canvas = drawn.reshape(*z.shape[:2], *x.shape[1:])
    return {"z": term, "reconstruction": of_image(model, x, canvas)}


# --- figures -------------------------------------------------------------------------------------


def correspondence(kinds: list[list[int]], labels: NDArray[np.int64], classes: int) -> float:
    """The best of all one-to-one renamings, by trying each."""
    truths = [Counter(int(v) for v in row if v >= 0) for row in labels]
    return max(
        sum(sum((Counter(renaming[kind] for kind in found) & truth).values())
            for found, truth in zip(kinds, truths))
        for renaming in itertools.permutations(range(classes))
    ) / sum(sum(truth.values()) for truth in truths)


def rand_index(truth: Array, layers: list[Array]) -> float:
    """The adjusted Rand index of one image over all pairs of its foreground's pixels."""
    inside = truth > 0
    labels = np.zeros(truth.shape, int)
    if layers:
        strength = np.stack([layer.max(0) for layer in layers])
        labels = np.where(strength.max(0) > 0.02, strength.argmax(0) + 1, 0)
    one, two = (v[inside][:, None] == v[inside][None] for v in (truth, labels))
    pairs = np.triu(np.ones_like(one), 1)
    both, first, second = ((v & pairs).sum() for v in (one & two, one, two))
    expected = first * second / pairs.sum()
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


SECOND = {
    "lavae": (lavae_terms, lavae_scenes), "air": (attend_terms, attend_scenes),
    "discrete-air": (attend_terms, attend_scenes), "conv-vae": (grid_terms, None),
    "discrete-air, deformed": (attend_terms, attend_scenes),
}


def trained(name: str, mnist: Path | None) -> tuple[GenerativeModel, SceneData]:
    if mnist:
        model = checkpoint.load(CHECKPOINTS[name]).model
        # Looks at an object without the others are calls of the networks that have no place here.
        model.config = replace(model.config, rounds=0)
        return model, load("multi-mnist", images=IMAGES, mnist=mnist)
    shipped = CHECKPOINTS[name] in checkpoint.shipped()
    data = load("multi-sprites" if name == "discrete-air" else "multi-dsprites", images=IMAGES)
    if shipped:
        return checkpoint.load(CHECKPOINTS[name]).model, data
    torch.manual_seed(0)
    return checkpoint.build(make_config(name, "multi-dsprites"), (3, 64, 64)).eval(), data


def test_every_model_that_has_shipped_is_computed_twice() -> None:
    kinds = {type(model) for model in (checkpoint.load(n).model for n in checkpoint.shipped())}
    assert {name for name, (kind, *_) in MODELS.items() if kind in kinds} <= set(SECOND)


@pytest.mark.parametrize("name", SECOND)
def test_numpy_agrees(name, monkeypatch, request) -> None:
    digits = "deformed" in name
    model, data = trained(name, request.getfixturevalue("mnist_folder") if digits else None)
    terms_of, scenes_of = SECOND[name]
    runs: list[tuple[Array, Notes]] = []
    own = bounds._terms

    def spied(model, x, particles):
        before = torch.get_rng_state()
        result = own(model, x, particles)
        after = torch.get_rng_state()
        torch.set_rng_state(before)  # the same draws again, this time with notes
        with pyro.plate("particles", particles, dim=-2):
            runs.append((plain(x), noted(name, model, lambda: poutine.trace(
                model.guide).get_trace(x))))
        torch.set_rng_state(after)
        return result

    monkeypatch.setattr(bounds, "_terms", spied)
    result = evaluate(model, data, particles=PARTICLES, seed=1, progress=False)
    ((x, notes),) = runs
    assert np.allclose(x, data.images().transpose(0, 3, 1, 2) / 255, atol=1e-6)

    terms = terms_of(model, x, notes)
    weights = sum(terms.values())  # (K, B)
    bound = special.logsumexp(weights, 0) - math.log(PARTICLES)
    assert result["nll"] == pytest.approx(-bound.mean(), rel=1e-4, abs=0.02)
    error = bound.std(ddof=1) / math.sqrt(IMAGES)
    assert result["nll_stderr"] == pytest.approx(error, rel=1e-3)
    assert result["curve"][0]["nll"] == pytest.approx(-weights.mean(), rel=1e-4, abs=0.02)
    assert set(result["split"]) == set(terms)
    for part, value in terms.items():
        assert result["split"][part] == pytest.approx(-value.mean(), rel=1e-4, abs=0.01), part
    normalised = special.softmax(weights, 0)
    assert result["ess"]["mean"] == pytest.approx((1 / (normalised**2).sum(0)).mean(), rel=1e-2)

    if scenes_of is None:
        assert result["count_accuracy"] is None
        return
    inferred = noted(name, model, lambda: model.infer(data.batch()))
    counts, kinds, layers = scenes_of(model, x, inferred)
    assert result["count_accuracy"] == pytest.approx(np.mean(np.array(counts) == data.counts))
    ari = [rand_index(truth, found) for truth, found in zip(data.segmentation, layers)
           if (truth > 0).any()]
    assert result["ari"] == pytest.approx(np.mean(ari), abs=1e-3)
    if kinds is None:
        assert result["category_correspondence"] is None
    elif not digits:  # ten categories have too many renamings
        found = correspondence(kinds, data.categories, model.classes)
        assert result["category_correspondence"] == pytest.approx(found)
    assert max(counts) > 1 and 0 in counts  # the images are no easy few
