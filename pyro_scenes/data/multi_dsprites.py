"""Multi-dSprites (LAVAE paper, section 3.2): coloured squares, ellipses and triangles."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from pyro_scenes.data.generator import DatasetSpec, Sprites, SpriteScenes

CELL = 19  # pixels: the largest sprite's width and height
SHAPES = ("square", "ellipse", "triangle")
SCALES = np.linspace(0.6, 1.0, 6)
ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)


@lru_cache(maxsize=1)
def sprites(mnist: Path | None = None) -> Sprites:
    """All 3 x 6 x 40 sprites. `scale` is 0.6..1.0, `angle` radians, clockwise as displayed.

    At scale 1 a square has the diagonal 19, an ellipse the axes 19 and 0.6 * 19, an equilateral
    triangle (one corner up at angle 0) the circumradius 9.5, so that any angle fits the cell. A
    pixel is ink when its centre is inside the outline. No pixel centre is within 1e-5 of an
    outline, so rounding in cos and sin cannot make masks differ between machines.
    """
    shape, scale, angle = (grid.ravel() for grid in np.meshgrid(
        np.arange(len(SHAPES)), SCALES, ANGLES, indexing="ij"))
    masks = outline_distance(shape, scale, angle) <= 0
    attributes = {"scale": scale.astype(np.float32), "angle": angle.astype(np.float32)}
    return Sprites(masks, shape, keep_cell=False, attributes=attributes)


def outline_distance(shape: np.ndarray, scale: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """(S, 19, 19) at pixel centres: negative inside the outline, growing outwards (no metric)."""
    offset = np.arange(CELL) - CELL // 2
    dy, dx = np.meshgrid(offset, offset, indexing="ij")
    cos, sin, size = (v[:, None, None] for v in (np.cos(angle), np.sin(angle), CELL / 2 * scale))
    u, v = cos * dx + sin * dy, cos * dy - sin * dx  # in the sprite's own axes
    square = np.maximum(np.abs(u), np.abs(v)) - size / np.sqrt(2)
    ellipse = np.hypot(u, v / 0.6) - size
    triangle = np.maximum(v, (np.sqrt(3) * np.abs(u) - v) / 2) - size / 2
    return np.choose(shape[:, None, None], [square, ellipse, triangle])


SIZE = (64, 64, 3)
SPEC = DatasetSpec("multi-dsprites", SIZE, SHAPES, SpriteScenes(sprites, SIZE), crowded=True)
