"""Scenes: images, what was made of them, and the objects outlined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from pyro_scenes.plots.sheet import (
    FONT,
    GAP,
    HEADING,
    LARGE,
    PALE,
    ArrayLike,
    Sheet,
    as_numpy,
    as_pictures,
    fit,
)
from pyro_scenes.scene import Scene

WIDEST = 1900  # pixels: two images and what was inferred from them, side by side
# Bright enough for a black canvas, dark enough for a white page.
PALETTE = ("#ff5c5c", "#3d9bff", "#f2b705", "#2fbf71", "#c264f0",
           "#ff8a1f", "#14b8c4", "#f0609e", "#8fbf1f", "#9aa5b1")
TONES = (0.4, 0.9), (0.5, 0.6)  # saturation and value of further colours: pale, dark
STROKE = [withStroke(linewidth=2, foreground="black")]


def inference_figure(
    images: ArrayLike,
    reconstructions: ArrayLike,
    scenes: Scene | None = None,
    sprites: ArrayLike | None = None,
) -> Figure:
    """Show what was inferred from images: figures 1 and 5 of the LAVAE paper.

    A row per image: input; reconstruction, with the inferred count in its corner and a box round
    each object, in the colour of its category if it has one, as in figure 3 of the Discrete-AIR
    paper; inferred locations, the pixel under each object's centre in white; the sprite of each
    object, framed in the colour of its box. Four images or more stand two to a row if they fit.

    Args:
        images: (B, C, H, W).
        reconstructions: (B, C, H, W).
        scenes: B scenes; an object whose box is NaN is counted but not outlined. Default: a model
            without objects, input and reconstruction alone.
        sprites: (B, M, C, S, S), one per slot of the scenes. Default: no such column.

    Raises:
        ValueError: also where the arguments do not hold the same images or slots.
    """
    columns = {
        "input": as_pictures(images, 4, "images"),
        "reconstruction": as_pictures(reconstructions, 4, "reconstructions"),
    }
    slots: list[NDArray[Any]] = []      # those that hold an object, for each image
    colours: list[list[str]] = []       # of those
    if scenes is not None:
        slots = [np.flatnonzero(present) for present in as_numpy(scenes.present)]
        colours = colours_of(scenes)
        columns["locations"] = _location_maps(scenes, columns["input"].shape[1:3])
    if len({pictures.shape for pictures in columns.values()}) > 1:
        raise ValueError("images, reconstructions and scenes differ in number or size")
    number, rows, cols, _ = columns["input"].shape
    width, height = fit((rows, cols), LARGE)
    block = len(columns) * (width + GAP) - GAP
    if sprites is not None:
        drawn = as_pictures(sprites, 5, "sprites")
        if scenes is None or drawn.shape[:2] != scenes.present.shape:
            raise ValueError(f"{drawn.shape[:2]} sprites: there must be one per slot of the scenes")
        side = fit(drawn.shape[2:4], (height - GAP) // 2, whole=True)
        most = max(map(len, slots))
        strip = max((most + 1) // 2 * (side[0] + GAP) - GAP, 2 * HEADING)
        block += 2 * GAP + strip

    apart, below = 5 * GAP, 3 * GAP // 2
    across = 2 if number >= 4 and 2 * block <= WIDEST else 1
    down = math.ceil(number / across)
    sheet = Sheet(across * (block + apart) - apart, HEADING + down * (height + below) - below)
    for b in range(number):
        x, y = b // down * (block + apart), HEADING + b % down * (height + below)
        for name, pictures in columns.items():
            axes = sheet.image(pictures[b], x, y, width, height)
            if b % down == 0:
                sheet.text(x + width / 2, HEADING / 2, name)
            if name == "reconstruction" and scenes is not None:
                draw_objects(axes, as_numpy(scenes.boxes)[b, slots[b]], colours[b])
            x += width + GAP
        if sprites is None:
            continue
        x += GAP
        if b % down == 0:
            sheet.text(x + strip / 2, HEADING / 2, "sprites")
        if not len(slots[b]):
            sheet.text(x + strip / 2, y + height / 2, "none", color=PALE)
        for i, slot in enumerate(slots[b]):
            left, top = x + i // 2 * (side[0] + GAP), y + i % 2 * (side[1] + GAP)
            sheet.image(drawn[b, slot], left, top, *side, edge=colours[b][i], linewidth=1.5)
    return sheet.figure


def draw_objects(
    axes: Axes, boxes: NDArray[Any], colours: Sequence[str], numbered: bool = False
) -> None:
    """Write the number of the (n, 4) boxes of cx, cy, w, h (pixels) and outline the finite ones.

    With `numbered`, 0 to n - 1 stand beside them.
    """
    outline(axes, boxes, colours, numbered)
    axes.text(
        0.04, 0.96, str(len(boxes)), transform=axes.transAxes, ha="left", va="top",
        color="white", fontsize=FONT + 2, fontweight="bold", path_effects=STROKE,
    )


def outline(
    axes: Axes, boxes: NDArray[Any], colours: Sequence[str], numbered: bool = False
) -> None:
    """The same without the number of the boxes."""
    (_, columns), (rows, _) = axes.get_xlim(), axes.get_ylim()
    for i, (x, y, w, h) in enumerate(boxes.tolist()):
        if not math.isfinite(x + y + w + h):
            continue
        axes.add_patch(Rectangle(
            (x - w / 2, y - h / 2), w, h, fill=False, edgecolor=colours[i], linewidth=1.2
        ))
        if numbered:
            # Right of the box, or inside it at the image's edge.
            left = min(x + w / 2 + 0.01 * columns, (0.98 - 0.07 * len(str(i))) * columns)
            middle = min(max(y, 0.06 * rows), 0.94 * rows)
            axes.text(
                left, middle, str(i), ha="left", va="center_baseline",
                color=colours[i], fontsize=FONT, fontweight="bold", path_effects=STROKE,
            )


def colours_of(scenes: Scene) -> list[list[str]]:
    """The colour of each object of each scene: its category's, or its own without categories."""
    present = as_numpy(scenes.present)
    if scenes.kind is None:
        chosen = [range(count) for count in present.sum(1)]
    else:
        chosen = [kind[there] for kind, there in zip(as_numpy(scenes.kind), present)]
    return [[colour(int(i)) for i in numbers] for numbers in chosen]


def colour(number: int) -> str:
    """The colour of a category: of PALETTE; then ten hues that are pale, ten that are dark, ..."""
    if number < len(PALETTE):
        return PALETTE[number]
    # A step just above a tenth: ten hues go round the circle, and the next ten miss them.
    tone = TONES[(number // 10 - 1) % len(TONES)]
    rgb = colors.hsv_to_rgb(((0.09 + 0.101 * number) % 1, *tone))
    return colors.to_hex(rgb.tolist())


def _location_maps(scenes: Scene, size: tuple[int, ...]) -> NDArray[Any]:
    """(B, H, W, 3) black maps with a white mark at each object's centre.

    The mark is the pixel under the centre; on images of more than 64 pixels, which are drawn
    smaller, it is as many pixels wide as keeps it visible.
    """
    maps = np.zeros((len(scenes.present), *size, 3), dtype=np.float32)
    where, span = as_numpy(scenes.where), math.ceil(max(size) / 64)
    for b, slot in zip(*np.nonzero(as_numpy(scenes.present))):
        column, row = (
            max(0, min(int(centre - (span - 1) / 2), length - span))
            for centre, length in zip(where[b, slot], size[::-1])
        )
        maps[b, row:row + span, column:column + span] = 1
    return maps
