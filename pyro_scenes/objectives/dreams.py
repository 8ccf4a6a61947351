"""The sleep phase of LAVAE's training: scenes dreamt by the model, whose places are known.

Wake-sleep (Hinton, Dayan, Frey and Neal, 1995) teaches a guide with scenes that the model draws:
their latents are known, so that q(n, z_loc | x) has exact targets, and no gradient has to pass
through an image. It minimises KL(p || q) where the ELBO minimises KL(q || p).

The prior of dreams is not that of the scenes: n is uniform on 0..M, sprites are of objects found
in the batch, and half of the objects are sought near another. In scenes of few objects such pairs
are rare, and where one of a pair has no peak, nothing in the bound tells which pixel misses it.
Objects that would hide each other, or hang over the edge, are left out: for images that have such
objects, train without dreams (``--set dreams=0``).

Sprites must stay as they are meanwhile. Nothing in a dream says where in its window a sprite should
lie: where both learnt from each other, places came to lie ever farther about.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_scenes.distributions import one_hot
from pyro_scenes.machine import in_mode
from pyro_scenes.models.lavae import LAVAE
from pyro_scenes.spatial import crops, find_peaks, place_sprites

SOURCES = 4  # One of so many images of a batch lends its objects.
TRIES = 2  # places, for each object wanted
NEAR = 0.5  # How often a place is sought near another object.
LEAST = 2.0  # Ink of an object, at least, pixels.
SEEN = 0.98  # The part of an object's ink that must lie on the canvas.
HIDDEN = 1.0  # Two objects share less ink than this, pixels.
NEIGHBOURHOOD = 9  # Side of the window in which a place is told from others, pixels.
ITSELF = 5  # Side of the window round an object in which no peak is another's, pixels.


@torch.no_grad()
def dream(model: LAVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """As many scenes as there are images, with objects that were found in some of them.

    :param x: (B, C, H, W) in [0, 1].
    :return: images (B, C, H, W), drawn where those given are binary and means where they are not,
        and the places (B, M) of their objects, -1 for none.
    """
    # Else what is found would depend on the batch, with the paper's networks.
    with in_mode(model, training=False):
        scene = model.infer(x[: -(-len(x) // SOURCES)], limit=math.inf)
        sprites = model.sprites(scene)[scene.present]  # (P, C, S, S)
    ink = sprites.amax(1).sum((-2, -1))  # (P,)
    sprites, ink = sprites[ink > LEAST], ink[ink > LEAST]
    config, device, batch, size = model.config, x.device, len(x), x.shape[-2:]
    apart = max(config.count_window, config.blocked_window) // 2
    last = torch.tensor(size, device=device) - 1
    canvas, rows = torch.zeros_like(x), torch.arange(batch, device=device)
    places = torch.full((batch, config.max_objects, 2), -1, device=device)  # row and column
    n = torch.randint(config.max_objects + 1, (batch,), device=device)
    for _ in range(TRIES * config.max_objects if len(sprites) else 0):
        filled = places[..., 0] >= 0  # (B, M), the first slots
        count = filled.sum(1)
        place = _candidates(places, count, last, 2 * config.sprite // 3)  # (B, 2)
        which = torch.randint(len(sprites), (batch,), device=device)
        z_loc = one_hot(place[:, 0] * size[1] + place[:, 1], size.numel())
        one = place_sprites(sprites[which], z_loc, rows, (batch, *size))
        shown = one.amax(1)  # (B, H, W)
        whole = shown.sum((-2, -1)) > SEEN * ink[which]
        shared = torch.minimum(shown, canvas.amax(1)).sum((-2, -1))
        free = ((place[:, None] - places).abs().amax(-1) > apart) | ~filled
        taken = (count < n) & whole & (shared < HIDDEN) & free.all(1)
        canvas = canvas + one * taken[:, None, None, None]
        slot = count.clamp(max=config.max_objects - 1)
        places[rows, slot] = torch.where(taken[:, None], place, places[rows, slot])
    mean = canvas.clamp(0, 1)
    binary = bool(((x == 0) | (x == 1)).all())
    index = torch.where(places[..., 0] >= 0, places[..., 0] * size[1] + places[..., 1], -1)
    return (torch.bernoulli(mean) if binary else mean), index


def _candidates(places: Tensor, count: Tensor, last: Tensor, reach: int) -> Tensor:
    """A row and a column for each image, (B, 2): anywhere, or within reach of an object's place.

    :param places: (B, M, 2), the first ``count`` of each filled. :param last: row and column.
    """
    batch, device = len(places), places.device
    anywhere = (torch.rand(batch, 2, device=device) * (last + 1)).long()
    slot = (torch.rand(batch, device=device) * count).long()
    other = places[torch.arange(batch, device=device), slot]
    step = torch.randint(-reach, reach + 1, (batch, 2), device=device)
    near = (count > 0) & (torch.rand(batch, device=device) < NEAR)
    nearby = torch.minimum((other + step).clamp(min=0), last)
    return torch.where(near[:, None], nearby, anywhere)


def surprise(model: LAVAE, x: Tensor, places: Tensor) -> Tensor:
    """-log q of a dream: of each object being counted, of its place, and of nothing else counted.

    f_count is deterministic: a peak of height h counts with the probability that its slope in
    training has, sigmoid((h - ``count_threshold``) / ``count_softness``). A place's probability is
    among its neighbours, as the places of the wake phase are compared.

    :param x: (B, C, H, W), and :param places: (B, M) long, -1 for none, as of ``dream``.
    :return: (B,) nats.
    """
    config = model.config
    encoded = model.encode(x)
    heights = encoded.heights  # (B, H, W)
    image, slot = (places >= 0).nonzero(as_tuple=True)
    place = places[image, slot]  # (P,)
    true = torch.zeros_like(heights).flatten(1)
    true[image, place] = 1.0
    true = true.view_as(heights)
    near = F.max_pool2d(true[:, None], ITSELF, 1, ITSELF // 2)[:, 0]
    false = find_peaks(heights.detach(), 0.0, config.count_window) & (near == 0)
    excess = (heights - config.count_threshold) / config.count_softness
    counted = (F.softplus(-excess) * true + F.softplus(excess) * false).sum((-2, -1))
    logits = model._logits(encoded).view_as(heights)
    around = crops(logits[:, None], place, NEIGHBOURHOOD, image).flatten(1)  # (P, K)
    middle = torch.full_like(place, around.shape[1] // 2)
    return counted.index_add(0, image, F.cross_entropy(around, middle, reduction="none"))
