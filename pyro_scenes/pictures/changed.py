"""What a model makes of scenes that are changed, made by hand or drawn from it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_scenes import plots
from pyro_scenes.errors import NothingToDraw, UserError
from pyro_scenes.machine import at_a_time, seeded
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.models.attend import Attend
from pyro_scenes.pictures.common import IMAGES, STEPS, pick, scenes_in, varied
from pyro_scenes.scene import POSE, Scene

BATCH = 256  # images of 64 x 64 drawn at a time
# Appearance dimensions in a traversal, and how far it goes: the prior's standard deviation is 1.
DIMENSIONS, REACH = 6, 2.5
VISIBLE = 0.2  # how much some pixel must change for a dimension to be shown
ATTRIBUTES, ATTRIBUTE_REACH = 2, 2.0  # rows of a template at most, and how far attributes go


@torch.no_grad()
def templates(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """The template of each category, with a row for each attribute as it varies if it has any.

    What Discrete-AIR's figures 6 and 7 show in scenes. Of more than ATTRIBUTES attributes those
    are shown that change the templates most. The images serve to tell what the model's objects are
    made of.

    Raises:
        UserError: the model has no categories, or none that it draws alone.
    """
    if not isinstance(model, Attend) or not model.classes:
        raise UserError(f"{type(model).__name__} is a model without categories that it draws alone:"
                        " no templates")
    _, scene = scenes_in(model, images[:1], math.inf)
    kinds = torch.arange(model.classes, device=scene.present.device)
    attributes = 0 if scene.what is None else scene.what.shape[-1]
    names = [f"category {kind}" for kind in range(model.classes)]
    if not attributes:
        return plots.traversal_figure(model.sprites(_objects(kinds[None])), headings=names)
    values = torch.linspace(-ATTRIBUTE_REACH, ATTRIBUTE_REACH, STEPS, device=kinds.device)
    what = torch.zeros(len(kinds), attributes, STEPS, attributes, device=kinds.device)
    for i in range(attributes):
        what[:, i, :, i] = values
    repeated = kinds.repeat_interleave(attributes)[:, None].repeat(1, STEPS)
    drawn = model.sprites(_objects(repeated, what.flatten(0, 1)))
    drawn = drawn.unflatten(0, (len(kinds), attributes))  # (K, A, STEPS, C, S, S)
    effect = (drawn[:, :, -1] - drawn[:, :, 0]).abs().sum((0, 2, 3, 4))  # (A,)
    shown = effect.topk(min(attributes, ATTRIBUTES)).indices.sort().values
    if attributes > 1:
        names = [f"{name}, attribute {i}" for name in names for i in shown.tolist()]
    headings = [f"attribute {value:g}" for value in values.tolist()]
    return plots.traversal_figure(drawn[:, shown].flatten(0, 1), names, headings)


@torch.no_grad()
def traversal(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """One object moved along x, then y, scaled and turned if it can be, then changed in appearance.

    LAVAE's figures 3, 7, 8 and 11, of the first image with an object. Each row begins with the
    scene as it was inferred, the object outlined. The appearance dimensions are those that change
    the picture most, if visibly.

    Raises:
        NothingToDraw: no object was found in the images.
    """
    model, scenes = scenes_in(model, images, limit)
    scene = pick(scenes, torch.nonzero(scenes.counts).flatten()[:1])
    if not len(scene):
        raise NothingToDraw("no object was found in these images; a traversal needs one")
    slot = int(scene.present[0].int().argmax())
    rows = {}
    for axis, name in enumerate("xy"):
        # Centres of pixels in the middle three quarters, so that the object stays on the canvas.
        length = images.shape[-1 - axis]
        stops = torch.linspace(length / 8, length * 7 / 8, STEPS).floor() + 0.5
        rows[_label(name, stops, " px")] = varied(scene, "where", (slot, axis), stops)
    if scene.pose is not None and scenes.pose is not None:
        pose, scale, angle = scene.pose[0, slot].cpu(), slice(0, 2), POSE.index("angle")
        factors = 2 ** torch.linspace(-1, 1, STEPS)
        scaled = varied(scene, "pose", (slot, scale), factors[:, None] * pose[scale])
        rows[_label("scaled", factors, " times")] = scaled
        if scenes.pose[scenes.present][:, angle].any():  # AIR turns nothing
            turns = torch.linspace(-math.pi / 2, math.pi / 2, STEPS)
            turned = varied(scene, "pose", (slot, angle), turns + pose[angle])
            rows[_label("turned", turns.rad2deg(), "\u00b0")] = turned
    if scene.what is not None and scene.what.shape[-1]:
        values = torch.linspace(-REACH, REACH, STEPS)
        name = "appearance" if scene.kind is None else "attribute"
        changed = [
            varied(scene, "what", (slot, dimension), values)
            for dimension in range(scene.what.shape[-1])
        ]
        ends = torch.tensor([0, STEPS - 1])
        effect = torch.stack([
            model.render(pick(row, ends)).diff(dim=0).abs().flatten() for row in changed
        ])
        order = effect.sum(1).argsort(descending=True)
        visible = order[effect.amax(1)[order] >= VISIBLE]
        for dimension in visible[:DIMENSIONS].tolist():
            rows[_label(f"{name} {dimension}", values)] = changed[dimension]
    inferred = model.render(scene)
    drawn = torch.stack([torch.cat([inferred, model.render(row)]) for row in rows.values()])
    only = torch.zeros_like(scene.present)
    only[0, slot] = True
    return plots.traversal_figure(
        drawn, list(rows), ["inferred", *[""] * STEPS], replace(scene, present=only)
    )


@torch.no_grad()
def swap(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """Reconstructions above the same scenes with each object's appearance given to the next.

    LAVAE's figures 3, 6 and 11, of the first IMAGES images with at least two objects. Appearance is
    the category too.

    Raises:
        NothingToDraw: no image has two objects.
    """
    model, scenes = scenes_in(model, images, limit)
    scene = pick(scenes, torch.nonzero(scenes.counts >= 2).flatten()[:IMAGES])
    if not len(scene):
        raise NothingToDraw("no image with two objects was found; a swap needs one")
    rolled = {
        field: value.clone() for field in ("what", "kind")
        if (value := getattr(scene, field)) is not None
    }
    for values in rolled.values():
        for one, present in zip(values, scene.present):
            one[present] = one[present].roll(1, dims=0)
    return plots.swap_figure(model.render(scene), model.render(replace(scene, **rolled)))


def sample(model: GenerativeModel, count: int, seed: int = 0) -> Tensor:
    """Means of images drawn from the model, (count, C, H, W) on the CPU."""
    return sample_counted(model, count, seed)[0]


def sample_counted(
    model: GenerativeModel, count: int, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """The same with the number of objects in each, (count,); None of a model without objects."""
    size = at_a_time(BATCH, *model.image_shape[1:])
    with seeded(seed, model.device):
        sizes = [min(size, count - start) for start in range(0, count, size)]
        images, counts = zip(*(model.draw(size) for size in sizes), strict=True)
    return torch.cat(images).cpu(), None if None in counts else torch.cat(counts).cpu()


@torch.no_grad()
def rendered(model: SceneModel, scenes: Scene) -> Tensor:
    """What the model makes of scenes, some at a time, on the CPU, (B, C, H, W)."""
    objects = scenes.present.shape[1]
    size = max(1, at_a_time(BATCH, *model.image_shape[1:]) // max(1, objects))
    parts = [model.render(scenes[start : start + size]) for start in range(0, len(scenes), size)]
    return torch.cat(parts).cpu()


def samples(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """As many images drawn from the model as there are images. LAVAE's figures 2, 4 and 10."""
    return plots.samples_figure(sample(model, len(images)))


def _label(name: str, values: Tensor, unit: str = "") -> str:
    return f"{name}, {values[0]:g} to {values[-1]:g}{unit}"


def _objects(kind: Tensor, what: Tensor | None = None) -> Scene:
    """Scenes of objects of these categories (B, M) and attributes (B, M, L), placed nowhere."""
    nowhere = torch.zeros(*kind.shape, 4, device=kind.device)
    return Scene(torch.ones_like(kind, dtype=torch.bool), nowhere[..., :2], nowhere, kind, what)
