"""Multi-MNIST (LAVAE paper, section 3.1): binary digits of 15 x 15 pixels."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from pyro_scenes.data.generator import DatasetSpec, Sprites
from pyro_scenes.data.mnist import read_mnist

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
SPEC_1K = DatasetSpec("multi-mnist-1k", (64, 64, 1), DIGITS, partial(sprites, pool=1_000))
SPEC_10K = DatasetSpec("multi-mnist-10k", (64, 64, 1), DIGITS, partial(sprites, pool=10_000))
