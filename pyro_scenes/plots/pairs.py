"""Pairs of an image and its reconstruction, each with a caption."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pyro_scenes.plots.scenes import colours_of, draw_objects
from pyro_scenes.plots.sheet import (
    CHARACTER,
    GAP,
    HEADING,
    SMALL,
    ArrayLike,
    Sheet,
    as_numpy,
    as_pictures,
    fit,
)
from pyro_scenes.scene import Scene

WIDEST = 1160  # pixels: the pairs in a row


def pairs_figure(
    images: ArrayLike,
    reconstructions: ArrayLike,
    captions: Sequence[str],
    scenes: Scene | None = None,
) -> Figure:
    """Show images beside their reconstructions, several pairs to a row, a caption above each.

    Args:
        images: (B, C, H, W).
        reconstructions: (B, C, H, W).
        captions: B lines.
        scenes: B scenes, to outline their objects in the reconstructions and write their number.

    Raises:
        ValueError: also where the arguments differ in number or size.
    """
    first = as_pictures(images, 4, "images")
    second = as_pictures(reconstructions, 4, "reconstructions")
    numbers = {len(first), len(captions), len(first if scenes is None else scenes)}
    if first.shape != second.shape or len(numbers) > 1:
        raise ValueError("images, reconstructions, captions and scenes differ in number or size")
    width, height = fit(first.shape[1:3], SMALL)
    both = 2 * width + GAP
    span = max(both, max(map(len, captions)) * CHARACTER)
    apart, below = 4 * GAP, 2 * GAP
    across = min(max((WIDEST + apart) // (span + apart), 1), len(first))
    down = math.ceil(len(first) / across)
    sheet = Sheet(across * (span + apart) - apart, down * (HEADING + height + below) - below)
    colours = colours_of(scenes) if scenes is not None else []
    for b, caption in enumerate(captions):
        x, y = b % across * (span + apart), b // across * (HEADING + height + below)
        sheet.text(x + span / 2, y + HEADING / 2, caption)
        x += (span - both) // 2
        sheet.image(first[b], x, y + HEADING, width, height)
        axes = sheet.image(second[b], x + width + GAP, y + HEADING, width, height)
        if scenes is not None:
            there = np.flatnonzero(as_numpy(scenes.present)[b])
            draw_objects(axes, as_numpy(scenes.boxes)[b, there], colours[b])
    return sheet.figure
