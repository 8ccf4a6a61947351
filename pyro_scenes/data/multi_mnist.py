"""Multi-MNIST, of two papers.

LAVAE's (section 3.1): binary digits of 15 x 15 pixels on 64 x 64. AIR's and Discrete-AIR's (section
3.2): grey digits of many sizes on 50 x 50.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from pyro_scenes.data.generator import CHUNK, DatasetSpec, Maker, Sprites, SpriteScenes
from pyro_scenes.data.grey import GreyCanvas, until_clear
from pyro_scenes.data.mnist import read_mnist
from pyro_scenes.data.placing import Draws

CELL = 15  # pixels: a digit's width and height, margins included


def resize_sums(digits: np.ndarray) -> np.ndarray:
    """Bilinear 28 -> 15, half-pixel centres, no antialiasing: 900 times the result, int32.

    Output pixel i samples at (i + 1/2) 28/15 - 1/2 = (56 i + 13) / 30, so weights are whole
    thirtieths and the sums (n, 15, 15) of uint8 (n, 28, 28) are exact, 0..900 * 255.
    """
    left, weight = np.divmod(56 * np.arange(CELL, dtype=np.int32) + 13, 30)
    digits = digits.astype(np.int32)
    rows = digits[:, left] * (30 - weight)[:, None] + digits[:, left + 1] * weight[:, None]
    return rows[:, :, left] * (30 - weight) + rows[:, :, left + 1] * weight


@lru_cache(maxsize=2)
def sprites(mnist: Path | None, pool: int) -> Sprites:
    """The first `pool` training digits; `digit` is the index in the training set.

    Ink is what rounds to 1; exactly one half rounds to 0, to even, as numpy and torch round.
    Whole cells keep clear of each other, so that an object's place is its cell's centre pixel.
    """
    images, labels = read_mnist("train", mnist, first=pool)
    masks = 2 * resize_sums(images) > 900 * 255
    return Sprites(masks, labels.astype(np.int64), keep_cell=True,
                   attributes={"digit": np.arange(pool)})


DIGITS = tuple("0123456789")
SIZE = (64, 64, 1)
SPEC_1K, SPEC_10K = (
    DatasetSpec(name, SIZE, DIGITS, SpriteScenes(partial(sprites, pool=pool), SIZE), crowded=True)
    for name, pool in (("multi-mnist-1k", 1_000), ("multi-mnist-10k", 10_000))
)

# --- grey digits of many sizes ----------------------------------------------------------------

CANVAS = 50  # pixels
# How many times smaller a digit gets. AIR's users know a normal variable of mean 1.3 and standard
# deviation 0.1; this uniform one has both.
SHRINK = 1.3 - 0.1 * 3**0.5, 1.3 + 0.1 * 3**0.5
WINDOW, INK = 27, 64  # see GreyCanvas


def grey_scenes(split: str) -> Maker:
    """Scenes of digits of MNIST's `split`; attributes `x`, `y`, `shrink` and `digit` (its index).

    Each digit in turn gets a uniform size and a uniform centre that keeps its 28 x 28 tile, made
    smaller, on the canvas, and is drawn again, as are the two, while it overlaps an earlier one:
    while some pixel's ink would add up to more than white, as in the data that AIR's users know.
    """

    def scenes(
        draws: Draws, low: int, high: int, mnist: Path | None, segmentation: bool
    ) -> dict[str, np.ndarray]:
        images, labels = _digits(split, mnist)
        counts = low + draws.below(high - low + 1, CHUNK)
        kind, digit = (np.full((CHUNK, high), -1) for _ in range(2))
        x, y, shrink = (np.full((CHUNK, high), np.nan) for _ in range(3))
        canvas = GreyCanvas(CHUNK, high, CANVAS, WINDOW, INK, segmentation)
        for slot in range(high):

            def attempt(todo: np.ndarray, slot: int = slot) -> np.ndarray:
                digit[todo, slot] = draws.below(len(images), len(todo))
                part = draws.unit((3, len(todo)))
                factor = SHRINK[0] + (SHRINK[1] - SHRINK[0]) * part[0]
                half = 14 / factor
                cx, cy = half + (CANVAS - 2 * half) * part[1:]
                x[todo, slot], y[todo, slot], shrink[todo, slot] = cx, cy, factor
                ink = shrunk(
                    images, digit[todo, slot], factor, canvas.offsets(cx), canvas.offsets(cy))
                fits = canvas.fits(todo, cx, cy, ink)
                canvas.paint(todo[fits], slot, cx[fits], cy[fits], ink[fits])
                return fits

            until_clear(np.flatnonzero(counts > slot), attempt, f"{high} digits", CANVAS)
        present = digit >= 0
        kind[present] = labels[digit[present]]
        made = canvas.arrays() | {"counts": counts, "categories": kind, "digit": digit}
        for name, values in (("x", x), ("y", y), ("shrink", shrink)):
            made[name] = values.astype(np.float32)
        return made

    return scenes


@lru_cache(maxsize=2)
def _digits(split: str, mnist: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Digits with a margin of two empty pixels, uint8 (n, 32, 32), and their labels (n,)."""
    images, labels = read_mnist(split, mnist)
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels.astype(np.int64)


def shrunk(
    images: np.ndarray, digit: np.ndarray, factor: np.ndarray, dx: np.ndarray, dy: np.ndarray
) -> np.ndarray:
    """Digits made `factor` times smaller, bilinear, uint8 (n, W, W).

    images: uint8 (N, 32, 32). digit, factor: (n,).
    dx, dy: (n, W) columns and rows of pixel centres from the digit's centre.
    """
    sides = []
    for offset in (dy, dx):
        # Beyond the tile there is margin alone.
        source = np.clip(offset * factor[:, None] + 15.5, 0, 30.999)
        first = source.astype(int)
        sides.append((first, source - first))
    (row, below), (column, right) = sides
    row, below = row[:, :, None], below[:, :, None]
    column, right = column[:, None, :], right[:, None, :]
    at = digit[:, None, None]
    upper = images[at, row, column] * (1 - right) + images[at, row, column + 1] * right
    lower = images[at, row + 1, column] * (1 - right) + images[at, row + 1, column + 1] * right
    return np.rint(upper * (1 - below) + lower * below).astype(np.uint8)


GREY = (CANVAS, CANVAS, 1)
SPEC_NEW_DIGITS = DatasetSpec("multi-mnist-new-digits", GREY, DIGITS, grey_scenes("test"),
                              objects=(0, 2), sizes={"test": 10_000})
SPEC_GREY = DatasetSpec("multi-mnist", GREY, DIGITS, grey_scenes("train"), objects=(0, 2),
                        sizes={"train": 50_000, "test": 10_000},
                        others={"new digits": SPEC_NEW_DIGITS.name})
