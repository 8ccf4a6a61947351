"""Pictures of what a model makes of images, and of what it knows; PICTURES has them by name.

Scenes are inferred, changed and rendered here; how a figure looks is left to plots. Images are
float (B, C, H, W) in [0, 1]; `limit` is the most objects in one, the model's own by default. All
but those of any model raise UserError where it has no objects, and all where it finds too many;
`applying` tells which suit it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from pyro_scenes.errors import NothingToDraw
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.models.attend import Attend
from pyro_scenes.pictures.changed import (
    rendered,
    sample,
    sample_counted,
    samples,
    swap,
    templates,
    traversal,
)
from pyro_scenes.pictures.common import IMAGES, with_objects
from pyro_scenes.pictures.inferred import inference, steps, tables

__all__ = [
    "IMAGES",
    "PICTURES",
    "Picture",
    "applying",
    "draw",
    "inference",
    "rendered",
    "sample",
    "sample_counted",
    "samples",
    "steps",
    "swap",
    "tables",
    "templates",
    "traversal",
    "with_objects",
]


@dataclass(frozen=True)
class Picture:
    """How a picture is drawn of a model, images and a limit, and which models it suits."""

    draw: Callable[[GenerativeModel, Tensor, float | None], Figure]
    applies: Callable[[GenerativeModel], bool]


def _finds_objects(model: GenerativeModel) -> bool:
    return isinstance(model, SceneModel)


def _has_categories(model: GenerativeModel) -> bool:
    return isinstance(model, Attend) and model.classes > 0


PICTURES = {
    "inference": Picture(inference, lambda model: True),
    "tables": Picture(tables, _finds_objects),
    "steps": Picture(steps, _finds_objects),
    "templates": Picture(templates, _has_categories),
    "traversal": Picture(traversal, _finds_objects),
    "swap": Picture(swap, _finds_objects),
    "samples": Picture(samples, lambda model: True),
}


def draw(
    model: GenerativeModel, images: Tensor, wanted: Mapping[str, Path], limit: float | None = None,
    *, all_of_them: bool = True,
) -> dict[Path, Figure]:
    """The pictures to be written, by name and file in, by file and figure out.

    :param all_of_them: or only those that the images have the objects for.
    :raises NothingToDraw: if they lack them, with `all_of_them`.
    """
    drawn = {}
    for name, path in wanted.items():
        try:
            drawn[path] = PICTURES[name].draw(model, images, limit)
        except NothingToDraw:
            if all_of_them:
                raise
    return drawn


def applying(model: GenerativeModel) -> list[str]:
    """The names of the pictures that suit a model."""
    return [name for name, picture in PICTURES.items() if picture.applies(model)]
