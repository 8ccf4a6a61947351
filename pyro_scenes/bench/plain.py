"""LAVAE's ELBO by hand, in plain torch: a second opinion on Pyro's, and the pace it is held to.

The networks, the peaks and the placement are the model's own. What Pyro does is written out: the
draws, their masses and densities, absent objects, and the sum. All objects of a batch are kept in
one list of P = sum of n, image by image, so nothing is computed for absent ones but their noise.
Only hard (straight-through) places and Bernoulli images are covered, which is what the fast preset
trains with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_scenes.distributions import USED, one_hot
from pyro_scenes.likelihoods import BernoulliImage
from pyro_scenes.models.lavae import LAVAE, NEAR, Encoded
from pyro_scenes.priors import LearnedCount
from pyro_scenes.spatial import crops, place_sprites, window_masks

LOG_2_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Noise:
    """What a draw from the guide is made of, for M slots of each image, used or not."""

    places: Tensor  # (M, B, D) uniform in [0, 1)
    appearances: Tensor  # (M, B, L) standard normal


@dataclass(frozen=True)
class Objects:
    """A draw from the guide; the objects of an image in the order of their draws."""

    image: Tensor  # (P,) long, rising
    places: Tensor  # (P, D) one-hot, z_loc
    appearances: Tensor  # (P, L), z_app
    presence: Tensor  # (P,) 1, with a gradient for n in the last object of an image


def fresh_noise(model: LAVAE, encoded: Encoded) -> Noise:
    """Noise for one draw."""
    logits, slots = encoded.heights.flatten(1), int(_count(model, encoded).max())
    normal = torch.randn(slots, len(logits), model.config.latent, device=logits.device)
    return Noise(torch.rand(slots, *logits.shape, device=logits.device), normal)


def elbo(model: LAVAE, x: Tensor, encoded: Encoded, noise: Noise) -> Tensor:
    """The one-sample ELBO of each image (eq. 6), nats (B,); its mean is what a step climbs.

    :param x: (B, C, H, W) of 0 and 1. :param encoded: of x; counts above M are read as M.
    """
    objects, log_q = draw(model, x, encoded, noise)
    return log_joint(model, x, objects) - log_q


def draw(model: LAVAE, x: Tensor, encoded: Encoded, noise: Noise) -> tuple[Objects, Tensor]:
    """Objects from the guide (eq. 5), and log q of them, nats (B,).

    Gradients are those of the Gumbel-softmax at ``model.temperature``.
    """
    assert model.config.straight_through and model.temperature is not None
    size = encoded.heights[0].numel()
    gamma = model.config.logit_scale * math.log(size)
    logits = gamma * encoded.heights.flatten(1)  # (B, D)
    log_q, drawn, canvas = [], [], (x.shape[-2], x.shape[-1])
    count = _count(model, encoded).to(logits.dtype)
    for uniform in noise.places:
        log_b = logits.log_softmax(-1)
        perturbed = log_b - (-uniform.log()).log()
        soft = (perturbed / model.temperature).softmax(-1)
        hard = one_hot(perturbed.detach().argmax(-1), size, soft.dtype)
        drawn.append(hard + (soft - soft.detach()))
        log_q.append((drawn[-1] * log_b).sum(-1))
        near = window_masks(hard.argmax(-1), model.config.blocked_window, canvas)
        logits = logits + USED * hard + NEAR * near
    if not drawn:
        nobody = torch.zeros(0, dtype=torch.long, device=x.device)
        empty = logits.new_zeros(0, model.config.latent)
        nothing = Objects(nobody, logits[:0], empty, logits[:0, 0])
        return nothing, logits.new_zeros(len(x))
    slot = torch.arange(len(drawn), device=x.device)
    present = slot < count[:, None]  # (B, M)
    presence = (count[:, None] - slot).clamp(0, 1)  # (B, M)
    image = present.nonzero()[:, 0]
    places = torch.stack(drawn, 1)[present]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=model.autocast):
        mean, log_variance = model.appearance_net(x, places, image)  # (P, L) each
    log_variance = log_variance.clamp(-14.0, 4.0)
    normal = noise.appearances.transpose(0, 1)[present]
    appearances = mean + (0.5 * log_variance).exp() * normal
    log_densities = -0.5 * (normal.square() + log_variance + LOG_2_PI).sum(-1)
    objects = Objects(image, places, appearances, presence[present])
    log_densities = (log_densities + torch.stack(log_q, 1)[present]) * objects.presence
    return objects, log_densities.new_zeros(len(x)).index_add(0, image, log_densities)


def log_joint(model: LAVAE, x: Tensor, objects: Objects) -> Tensor:
    """log p(x, z_loc, z_app, n) (eq. 1), nats (B,)."""
    batch, channels, height, width = x.shape
    n = torch.bincount(objects.image, minlength=batch)
    assert isinstance(model.count_prior, LearnedCount)
    log_count = model.count_prior.logits.log_softmax(0)[n]
    # Without replacement, the i-th object has D - i places left to choose from.
    slot = torch.arange(len(objects.image), device=x.device) - (n.cumsum(0) - n)[objects.image]
    log_places = -(height * width - slot).to(x.dtype).log()  # (P,)
    log_appearances = -0.5 * (objects.appearances.square() + LOG_2_PI).sum(-1)  # (P,)
    log_objects = (log_places + log_appearances) * objects.presence
    if not len(objects.image):
        return log_count + _log_image(model, x, x.new_zeros(x.shape))
    sprites = model.sprite_net(objects.appearances)
    size = batch, height, width
    mean = place_sprites(
        sprites, objects.places, objects.image, size, model.slope, model.reach
    )
    log_image = _log_image(model, x, mean)
    if model.reach is None and not objects.presence.requires_grad:
        return (log_count + log_image).index_add(0, objects.image, log_objects)
    # Zeros with slopes: of n, in the last object, and of places that are not worth log D.
    gain = _gain(model, x, mean, sprites, objects)
    last = slot == n[objects.image] - 1
    slopes = torch.where(last, (objects.presence - objects.presence.detach()) * gain, 0.0)
    if model.reach is not None:
        near = window_masks(objects.places.argmax(-1), 2 * model.reach + 1, (height, width))
        mass = (objects.places * near).sum(-1)
        slopes = slopes + (mass - mass.detach()) * (gain - math.log(height * width)).clamp(max=0)
    return (log_count + log_image).index_add(0, objects.image, log_objects + slopes)


@torch.no_grad()
def _gain(model: LAVAE, x: Tensor, mean: Tensor, sprites: Tensor, objects: Objects) -> Tensor:
    """What each object adds to the log likelihood, in its window, (P,) nats, limited."""
    place, side = objects.places.argmax(-1), sprites.shape[-1]
    seen, painted = (crops(image, place, side, objects.image) for image in (x, mean))
    with_it = _log_image(model, seen, painted)
    gain = with_it - _log_image(model, seen, (painted - sprites).clamp(min=0.0))
    return gain.clamp(-model.config.count_gain, model.config.count_gain)


def _log_image(model: LAVAE, x: Tensor, mean: Tensor) -> Tensor:
    assert isinstance(model.likelihood, BernoulliImage)
    floor = model.likelihood.floor
    mean = floor + (1 - 2 * floor) * mean.clamp(0.0, 1.0)
    return -F.binary_cross_entropy(mean, x, reduction="none").flatten(1).sum(1)


def _count(model: LAVAE, encoded: Encoded) -> Tensor:
    return encoded.count.clamp(max=model.config.max_objects)
