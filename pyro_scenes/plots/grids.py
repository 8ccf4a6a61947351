"""Images in rows: samples, swaps, and all in which one thing changes from image to image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

from pyro_scenes.plots.scenes import colours_of, outline
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


def samples_figure(
    images: ArrayLike, columns: int | None = None, title: str | None = None
) -> Figure:
    """Show (B, C, H, W) images in a grid, row by row: figures 2, 4, 9 and 10 of the LAVAE paper.

    Default: about one and a half times as many columns as rows.
    """
    pictures = as_pictures(images, 4, "images")
    across = columns or math.ceil(len(pictures) / round(math.sqrt(len(pictures) / 1.5)))
    return _grid([pictures[i:i + across] for i in range(0, len(pictures), across)], title=title)


def traversal_figure(
    rows: ArrayLike,
    labels: Sequence[str] | None = None,
    headings: Sequence[str] | None = None,
    outlined: Scene | None = None,
) -> Figure:
    """Show rows of images in which one latent variable changes: LAVAE's figures 3, 7, 8 and 11.

    So are templates and their attributes, and images drawn step by step: figures 6 to 9 of the
    Discrete-AIR paper.

    Args:
        rows: (R, T, C, H, W), R traversals of T steps each.
        labels: R names of the rows, on their left.
        headings: T names of the columns, above them.
        outlined: one scene, to outline its objects in the first image of each row.

    Raises:
        ValueError: also where there are not R labels or T headings.
    """
    pictures = as_pictures(rows, 5, "rows")
    if labels is not None and len(labels) != len(pictures):
        raise ValueError(f"{len(pictures)} rows need as many labels, not {len(labels)}")
    if headings is not None and len(headings) != pictures.shape[1]:
        raise ValueError(f"{pictures.shape[1]} columns need as many headings, not {len(headings)}")
    return _grid(list(pictures), labels, headings, outlined)


def swap_figure(before: ArrayLike, after: ArrayLike) -> Figure:
    """Show (B, C, H, W) reconstructions above the same with objects swapped, as LAVAE's figure 6.

    Raises:
        ValueError: also where before and after differ in shape.
    """
    first, second = as_pictures(before, 4, "before"), as_pictures(after, 4, "after")
    if first.shape != second.shape:
        raise ValueError(f"before and after differ in shape: {first.shape} and {second.shape}")
    return _grid([first, second], ("reconstruction", "swapped"))


def _grid(
    rows: Sequence[NDArray[Any]], labels: Sequence[str] | None = None,
    headings: Sequence[str] | None = None, outlined: Scene | None = None, title: str | None = None,
) -> Figure:
    """Rows of (T, H, W, 3) pictures, labelled on the left and above."""
    width, height = fit(rows[0].shape[1:3], SMALL)
    indent = max(map(len, labels)) * CHARACTER + GAP if labels else 0
    top = HEADING if headings else 0
    sheet = Sheet(
        indent + len(rows[0]) * (width + GAP) - GAP, top + len(rows) * (height + GAP) - GAP, title
    )
    for t, heading in enumerate(headings or ()):
        sheet.text(indent + t * (width + GAP) + width / 2, HEADING / 2, heading)
    for r, row in enumerate(rows):
        y = top + r * (height + GAP)
        if labels:
            sheet.text(indent - GAP, y + height / 2, labels[r], align="right")
        for t, picture in enumerate(row):
            axes = sheet.image(picture, indent + t * (width + GAP), y, width, height)
            if outlined is not None and t == 0:
                boxes = as_numpy(outlined.boxes)[0, as_numpy(outlined.present)[0]]
                outline(axes, boxes, colours_of(outlined)[0])
    return sheet.figure
