"""The sleep phase of LAVAE's location network: scenes dreamt by the model, whose places are known.

Wake-sleep (Hinton, Dayan, Frey and Neal, 1995) teaches a guide with scenes that the model draws:
their latents are known, so that q(n, z_loc | x) has exact targets, and no gradient has to pass
through an image. It minimises KL(p || q) where the ELBO minimises KL(q || p).

The prior of dreams is not that of the scenes: n is uniform on 0..M, sprites are of objects found
in the batch, and half of the objects are sought near another. In scenes of few objects such pairs
are rare, and where one of a pair has no peak, nothing in the bound tells which pixel misses it.
Objects that would hide each other, or hang over the edge, are left out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_scenes.distributions import one_hot
from pyro_scenes.models.lavae import LAVAE
from pyro_scenes.spatial import crops, find_peaks, place_sprites

SOURCES = 4  # One of so many images of a batch lends its objects.
TRIES = 2  # places, for each object wanted
NEAR = 0.5  # How often a place is sought near another object.
SEEN = 0.98  # The part of an object's ink that must lie on the canvas.
HIDDEN = 1.0  # Two objects share less ink than this, pixels.
NEIGHBOURHOOD = 9  # Side of the window in which a place is told from others, pixels.
ITSELF = 5  # Side of the window round an object in which no peak is another's, pixels.


@torch.no_grad()
def dream(model: LAVAE, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """As many scenes as there are images, with objects that were found in some of them.

    :param x: (B, C, H, W) in [0, 1].
    :return: images (B, C, H, W), drawn where those given are binary and means where they are not,
        and the places (B, M) of their objects, -1 for none; None where no object was found.
    """
    batch, _, height, width = x.shape
    scene = model.infer(x[: -(-batch // SOURCES)], limit=math.inf)
    if not scene.present.any():
        return None
    sprites = model.sprites(scene)[scene.present]  # (P, C, S, S)
    ink = sprites.amax(1).sum((-2, -1))  # (P,)
    config, device = model.config, x.device
    apart = max(config.count_window, config.blocked_window) // 2
    most = config.max_objects
    canvas, rows = torch.zeros_like(x), torch.arange(batch, device=device)
    places = torch.full((batch, most), -1, device=device)
    n = torch.randint(most + 1, (batch,), device=device)
    for _ in range(TRIES * int(n.max())):
        count = (places >= 0).sum(1)  # (B,), and as many slots are full
        if (count == n).all():
            break
        row, column = _candidates(places, count, (height, width), 2 * config.sprite // 3)
        which = torch.randint(len(sprites), (batch,), device=device)
        place = row * width + column
        one = place_sprites(
            sprites[which], one_hot(place, height * width), rows, (batch, height, width)
        )
        shown = one.amax(1)  # (B, H, W)
        shared = torch.minimum(shown, canvas.amax(1)).sum((-2, -1))
        distance = torch.maximum(
            (row[:, None] - places // width).abs(), (column[:, None] - places % width).abs()
        )
        free = ((distance > apart) | (places < 0)).all(1)
        whole = shown.sum((-2, -1)) > SEEN * ink[which]
        taken = (count < n) & free & whole & (shared < HIDDEN)
        canvas = canvas + one * taken[:, None, None, None]
        slot = count.clamp(max=most - 1)
        places[rows, slot] = torch.where(taken, place, places[rows, slot])
    mean = canvas.clamp(0, 1)
    binary = bool(((x == 0) | (x == 1)).all())
    return (torch.bernoulli(mean) if binary else mean), places


def _candidates(
    places: Tensor, count: Tensor, size: tuple[int, int], reach: int
) -> tuple[Tensor, Tensor]:
    """A row and a column (B,) for each image: anywhere, or within reach of an object's place."""
    batch, device = len(places), places.device
    row, column = (torch.randint(side, (batch,), device=device) for side in size)
    slot = (torch.rand(batch, device=device) * count).long()
    other = places[torch.arange(batch, device=device), slot]
    step = torch.randint(-reach, reach + 1, (2, batch), device=device)
    near = (other >= 0) & (torch.rand(batch, device=device) < NEAR)
    row = torch.where(near, (other // size[1] + step[0]).clamp(0, size[0] - 1), row)
    return row, torch.where(near, (other % size[1] + step[1]).clamp(0, size[1] - 1), column)


def surprise(model: LAVAE, x: Tensor, places: Tensor) -> Tensor:
    """-log q of a dream: of each object being counted, of its place, and of nothing else counted.

    f_count is deterministic: a peak of height h counts with the probability that its slope in
    training has, sigmoid((h - ``count_threshold``) / ``count_softness``). A place's probability is
    among its neighbours, as the places of the wake phase are compared.

    :param x: (B, C, H, W), and :param places: (B, M) long, -1 for none, as of ``dream``.
    :return: (B,) nats.
    """
    config = model.config
    heights = model.encode(x).heights  # (B, H, W)
    image, slot = (places >= 0).nonzero(as_tuple=True)
    place = places[image, slot]  # (P,)
    true = torch.zeros_like(heights).flatten(1)
    true[image, place] = 1.0
    true = true.view_as(heights)
    near = F.max_pool2d(true[:, None], ITSELF, 1, ITSELF // 2)[:, 0]
    false = find_peaks(heights.detach(), 0.0, config.count_window) & (near == 0)
    excess = (heights - config.count_threshold) / config.count_softness
    counted = (F.softplus(-excess) * true + F.softplus(excess) * false).sum((-2, -1))
    logits = config.logit_scale * math.log(heights[0].numel()) * heights
    around = crops(logits[:, None], place, NEIGHBOURHOOD, image).flatten(1)  # (P, K)
    middle = torch.full_like(place, around.shape[1] // 2)
    return counted.index_add(0, image, F.cross_entropy(around, middle, reduction="none"))
