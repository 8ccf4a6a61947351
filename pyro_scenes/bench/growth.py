"""How the cost of LAVAE grows with the canvas, the objects, the batch and the particles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyro_scenes.bench.late import Trainer
from pyro_scenes.bench.turns import spread, take_turns
from pyro_scenes.bounds import measure
from pyro_scenes.data import SceneData

APART = 13  # pixels between objects, the window that a draw shuts
BOX = 11.0


@dataclass(frozen=True)
class Axes:
    """What is varied; objects that do not fit on a canvas are left out there."""

    sides: Sequence[int] = (64, 128, 256)
    objects: Sequence[int] = (3, 7, 20, 50)
    batches: Sequence[int] = (8, 16, 32, 64)
    particles: Sequence[int] = (1, 10, 100)
    batch: int = 8  # images a step where sides and objects vary
    images: int = 4  # of the bound


FULL = Axes()
QUICK = Axes(sides=(64, 128), objects=(3, 7), batches=(8, 32), particles=(1, 10), batch=2, images=2)


def room(side: int) -> int:
    """How many objects fit on a canvas."""
    return (side // APART) ** 2


def scenes(side: int, objects: int, batch: int) -> SceneData:
    """Images of noise, and boxes on a grid for objects to be told from: cost asks for no more."""
    images = 255 * np.random.default_rng(0).integers(0, 2, (batch, side, side, 3), dtype=np.uint8)
    place = np.arange(objects)
    row, column = np.divmod(place, side // APART)
    boxes = np.stack([column * APART + 6.5, row * APART + 6.5, 0 * place + BOX, 0 * place + BOX], 1)
    boxes = np.tile(boxes.astype(np.float32), (batch, 1, 1))
    counts = np.full(batch, objects)
    return SceneData.from_images("grid", images, counts=counts, boxes=boxes)


def costs(axes: Axes, rounds: int, device: torch.device) -> list[dict]:
    """Seconds an image of a training step, and of a bound, at each size; float32."""
    settings = [f"max_objects={max(axes.objects)}"]

    def step(side: int, objects: int, batch: int):
        data = scenes(side, objects, batch)
        return Trainer("fast", data, device, settings=settings).step, batch

    work, sizes = {}, {}
    for side in axes.sides:
        for objects in axes.objects:
            if objects <= room(side):
                key = f"step {side} {objects}"
                work[key] = step(side, objects, axes.batch)
                sizes[key] = {"of": "canvas", "side": side, "objects": objects, "batch": axes.batch}
    side, objects = axes.sides[0], axes.objects[0]
    for batch in axes.batches:
        work[f"batch {batch}"] = step(side, objects, batch)
        sizes[f"batch {batch}"] = {"of": "batch", "side": side, "objects": objects, "batch": batch}
    data = scenes(side, objects, axes.images)
    model = Trainer("fast", data, device, settings=settings).model.eval()
    model.temperature = None
    for particles in axes.particles:
        key = f"particles {particles}"
        work[key] = (lambda k=particles: measure(model, data, k)), axes.images
        sizes[key] = {"of": "particles", "side": side, "objects": objects, "particles": particles}
    seconds = take_turns(work, rounds, device)
    return [size | {"seconds_per_image": spread(seconds[key])} for key, size in sizes.items()]
