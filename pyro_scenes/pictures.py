"""Pictures of what a model makes of images: inference, samples, traversals and swaps.

Scenes are inferred, changed and rendered here; how a figure looks is left to plots.py. Images are
float (B, C, H, W) in [0, 1]; `limit` is the most objects in one, the model's own by default. All
raise UserError where the model has no objects or finds too many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_scenes import plots
from pyro_scenes.errors import UserError
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.priors import UniformCount
from pyro_scenes.scene import Scene

# Images in a picture of inference or of swaps, and steps of a traversal.
IMAGES, STEPS = 8, 9
# Images drawn at a time.
BATCH = 256
# Appearance dimensions in a traversal, and how far it goes: the prior's standard deviation is 1.
DIMENSIONS, REACH = 6, 2.5


@torch.no_grad()
def inference(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """Input, reconstruction, inferred locations and sprites of the first IMAGES images.

    LAVAE's figures 1, 5 and 8.
    """
    images = images[:IMAGES]
    model, scene = _scenes(model, images, limit)
    return plots.inference_figure(images, model.render(scene), scene, sprites=model.sprites(scene))


@torch.no_grad()
def traversal(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """One object moved along x, then along y, then changed along one appearance dimension a row.

    LAVAE's figures 3, 7 and 8, of the first image with an object. The appearance dimensions are
    those that change the picture most.

    Raises:
        UserError: no object was found in the images.
    """
    model, scenes = _scenes(model, images, limit)
    scene = _pick(scenes, torch.nonzero(scenes.counts).flatten()[:1])
    if not len(scene):
        raise UserError("no object was found in these images; a traversal needs one")
    slot = int(scene.present[0].int().argmax())

    def moved(axis: int, length: int) -> Scene:
        # Centres of pixels in the middle three quarters, so that the object stays on the canvas.
        stops = torch.linspace(length / 8, length * 7 / 8, STEPS).floor() + 0.5
        return _varied(scene, "where", (slot, axis), stops)

    def changed(dimension: int, values: Tensor) -> Scene:
        return _varied(scene, "what", (slot, dimension), values)

    assert scene.what is not None
    values = torch.linspace(-REACH, REACH, STEPS)
    effect = torch.stack([
        model.render(changed(dimension, values[[0, -1]])).diff(dim=0).abs().sum()
        for dimension in range(scene.what.shape[-1])
    ])
    chosen = effect.argsort(descending=True)[:DIMENSIONS].tolist()
    rows = [moved(0, images.shape[-1]), moved(1, images.shape[-2])]
    rows += [changed(dimension, values) for dimension in chosen]
    labels = ["x", "y", *(f"appearance {dimension}" for dimension in chosen)]
    return plots.traversal_figure(torch.stack([model.render(row) for row in rows]), labels)


@torch.no_grad()
def swap(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """Reconstructions above the same scenes with each object's appearance given to the next.

    LAVAE's figures 3 and 6, of the first IMAGES images with at least two objects.

    Raises:
        UserError: no image has two objects.
    """
    model, scenes = _scenes(model, images, limit)
    scene = _pick(scenes, torch.nonzero(scenes.counts >= 2).flatten()[:IMAGES])
    if not len(scene):
        raise UserError("no image with two objects was found; a swap needs one")
    assert scene.what is not None
    what = scene.what.clone()
    for one, present in zip(what, scene.present):
        one[present] = one[present].roll(1, dims=0)
    return plots.swap_figure(model.render(scene), model.render(replace(scene, what=what)))


@torch.no_grad()
def sample(
    model: GenerativeModel, count: int, seed: int = 0, objects: tuple[int, int] | None = None
) -> Tensor:
    """Means of images drawn from the model, (count, C, H, W) on the CPU.

    Args:
        objects: a uniform prior over so many objects, both ends included, in place of the model's
            own (LAVAE's figure 9).

    Raises:
        UserError: a model without a prior for the count.
    """
    priors = {"count": UniformCount(*objects)} if objects else {}
    with torch.random.fork_rng(), model.priors(**priors):
        torch.manual_seed(seed)
        sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
        return torch.cat([model.sample(size).cpu() for size in sizes])


def samples(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """As many images drawn from the model as there are images. LAVAE's figures 2 and 4."""
    return plots.samples_figure(sample(model, len(images)))


# By name, all called with a model, images and a limit.
PICTURES: dict[str, Callable[[GenerativeModel, Tensor, float | None], Figure]] = {
    "inference": inference, "samples": samples, "traversal": traversal, "swap": swap,
}


def with_objects(model: GenerativeModel) -> SceneModel:
    """The model itself. Raises UserError for one that has no objects."""
    if not isinstance(model, SceneModel):
        raise UserError(f"{type(model).__name__} is a model without objects: none can be found")
    return model


def _scenes(
    model: GenerativeModel, images: Tensor, limit: float | None
) -> tuple[SceneModel, Scene]:
    model = with_objects(model)
    return model, model.infer(images.to(next(model.parameters()).device), limit)


def _pick(scene: Scene, index: Tensor) -> Scene:
    """The scenes at `index` of a batch."""
    batched = {name: value for name, value in vars(scene).items() if isinstance(value, Tensor)}
    picked: dict[str, Any] = {name: value[index] for name, value in batched.items()}
    return replace(scene, **picked)


def _varied(scene: Scene, field: str, at: tuple[int, int], values: Tensor) -> Scene:
    """One scene repeated, with each of `values` in turn at (slot, coordinate) of a field."""
    many = _pick(scene, torch.zeros(len(values), dtype=torch.long))
    changed = getattr(many, field).clone()
    changed[:, at[0], at[1]] = values.to(changed)
    return replace(many, **{field: changed})
