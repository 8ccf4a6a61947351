"""What pictures share: inferred scenes, and scenes picked, varied and made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_scenes.errors import UserError
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.scene import Scene

IMAGES, STEPS = 8, 9  # in a picture of inference, of steps or of swaps; and of a traversal


def with_objects(model: GenerativeModel) -> SceneModel:
    """The model itself. Raises UserError for one that has no objects."""
    if not isinstance(model, SceneModel):
        raise UserError(f"{type(model).__name__} is a model without objects: none can be found")
    return model


def scenes_in(
    model: GenerativeModel, images: Tensor, limit: float | None
) -> tuple[SceneModel, Scene]:
    """The model itself and what it finds. Raises UserError as `with_objects` and `infer` do."""
    model = with_objects(model)
    return model, model.infer(images.to(model.device), limit)


def pick(scene: Scene, index: Tensor) -> Scene:
    """The scenes at `index` of a batch."""
    batched = {name: value for name, value in vars(scene).items() if isinstance(value, Tensor)}
    picked: dict[str, Any] = {name: value[index] for name, value in batched.items()}
    return replace(scene, **picked)


def rich(scenes: Scene, number: int) -> Tensor:
    """The first so many scenes, those with two objects or more before the others."""
    return torch.argsort((scenes.counts < 2).int(), stable=True)[:number]


def varied(
    scene: Scene, field: str, at: tuple[int, int | slice], values: Tensor
) -> Scene:
    """One scene repeated, with each of `values` in turn at (slot, coordinate) of a field."""
    many = pick(scene, torch.zeros(len(values), dtype=torch.long))
    changed = getattr(many, field).clone()
    changed[:, at[0], at[1]] = values.to(changed)
    return replace(many, **{field: changed})
