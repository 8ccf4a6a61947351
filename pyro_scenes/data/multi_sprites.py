"""Multi-Sprites (Discrete-AIR paper, section 3.1 and appendix F): grey, antialiased shapes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from pyro_scenes.data.generator import CHUNK, DatasetSpec
from pyro_scenes.data.grey import GreyCanvas, until_clear
from pyro_scenes.data.placing import Draws

SHAPES = ("square", "triangle", "ellipse")
SIDE = 64  # pixels of the canvas
# Least and largest diameter of the circumscribed circle, pixels; the paper's figure 4 shows
# inferred scales of 0.18 to 0.31 of the canvas.
SIZES = 11.0, 20.0
# Of objects with 6 to 60 pixels: small ones, with which the paper's appendix G has its failures.
SMALL = 5.0, 11.0
# Centres are at least so many times the sum of the two radii apart.
APART = 0.9
WINDOW, INK = 23, 128  # see GreyCanvas


def scenes(
    draws: Draws, low: int, high: int, mnist: Path | None, segmentation: bool,
    sizes: tuple[float, float] = SIZES,
) -> dict[str, np.ndarray]:
    """A chunk of scenes; attributes `x`, `y`, `size` in pixels and `angle` in radians.

    Each object in turn gets a uniform shape, size within ``sizes``, angle (0 to 2 pi, clockwise as
    displayed) and a uniform centre that keeps it on the canvas, all drawn again until it is clear
    of the earlier ones. At size s a square has the diagonal s, an equilateral triangle the
    circumscribed circle's diameter s, an ellipse the axes s and 0.6 s.

    Raises:
        UserError: so many objects do not fit.
    """
    counts = low + draws.below(high - low + 1, CHUNK)
    kind = np.full((CHUNK, high), -1)
    x, y, size, angle = (np.full((CHUNK, high), np.nan) for _ in range(4))
    for slot in range(high):

        def attempt(todo: np.ndarray, slot: int = slot) -> np.ndarray:
            kind[todo, slot] = draws.below(len(SHAPES), len(todo))
            part = draws.unit((4, len(todo)))
            size[todo, slot] = sizes[0] + (sizes[1] - sizes[0]) * part[0]
            angle[todo, slot] = 2 * np.pi * part[1]
            radius = size[todo, slot] / 2
            x[todo, slot], y[todo, slot] = radius + (SIDE - 2 * radius) * part[2:]
            apart = np.hypot(x[todo, :slot] - x[todo, slot, None],
                             y[todo, :slot] - y[todo, slot, None])
            needed = APART * (size[todo, :slot] / 2 + radius[:, None])
            return (apart >= needed).all(1)

        until_clear(np.flatnonzero(counts > slot), attempt, f"{high} objects", SIDE)
    canvas = GreyCanvas(CHUNK, high, SIDE, WINDOW, INK, segmentation)
    for slot in range(high):
        at = np.flatnonzero(counts > slot)
        cx, cy = x[at, slot], y[at, slot]
        ink = coverage(kind[at, slot], size[at, slot], angle[at, slot],
                       canvas.offsets(cx), canvas.offsets(cy))
        canvas.paint(at, slot, cx, cy, ink)
    made = canvas.arrays() | {"counts": counts, "categories": kind}
    for name, values in (("x", x), ("y", y), ("size", size), ("angle", angle)):
        made[name] = values.astype(np.float32)
    return made


def coverage(
    kind: np.ndarray, size: np.ndarray, angle: np.ndarray, dx: np.ndarray, dy: np.ndarray
) -> np.ndarray:
    """Ink of each pixel, uint8 (n, W, W): a ramp one pixel wide across the outline.

    kind, size, angle: (n,). dx, dy: (n, W) columns and rows of pixel centres from the object's.
    """
    cos, sin, radius = (v[:, None, None] for v in (np.cos(angle), np.sin(angle), size / 2))
    dx, dy = dx[:, None, :], dy[:, :, None]
    u, v = cos * dx + sin * dy, cos * dy - sin * dx  # in the shape's own axes

    def ramp(distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance, 0, 1)

    # A corner is where edges meet: their ramps are multiplied.
    half = radius / np.sqrt(2)
    square = ramp(np.abs(u) - half) * ramp(np.abs(v) - half)
    triangle = ramp(v - radius / 2)
    for side in (-1, 1):
        triangle = triangle * ramp((side * np.sqrt(3) * u - v) / 2 - radius / 2)
    # To first order the distance is the function over the length of its gradient.
    a, b = radius, 0.6 * radius
    level = np.sqrt((u / a) ** 2 + (v / b) ** 2)
    steepness = np.sqrt((u / a**2) ** 2 + (v / b**2) ** 2)
    ellipse = ramp((level - 1) * level / np.maximum(steepness, 1e-9))
    ink = np.choose(kind[:, None, None], [square, triangle, ellipse])
    return np.rint(255 * ink).astype(np.uint8)


SPEC_SMALL = DatasetSpec("multi-sprites-small", (SIDE, SIDE, 1), SHAPES,
                         partial(scenes, sizes=SMALL), sizes={"train": 80_000, "test": 10_000})
SPEC = DatasetSpec("multi-sprites", (SIDE, SIDE, 1), SHAPES, scenes,
                   sizes={"train": 80_000, "test": 10_000},
                   others={"small objects": SPEC_SMALL.name})
