"""Scenes as graphs: images with the tables of their nodes and edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from pyro_scenes.plots.scenes import colours_of, draw_objects
from pyro_scenes.plots.sheet import (
    CHARACTER,
    FONT,
    GAP,
    HEADING,
    INK,
    LARGE,
    PALE,
    ArrayLike,
    Sheet,
    as_numpy,
    as_pictures,
    fit,
)
from pyro_scenes.scene import Scene

LINE = 24  # pixels from one line of a table to the next
MOST = 12  # lines of a table; the rest is counted


@dataclass(frozen=True)
class Table:
    """A table of one image: what its columns are called, and its cells row by row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_figure(
    images: ArrayLike,
    reconstructions: ArrayLike,
    scenes: Scene,
    nodes: Sequence[Table],
    edges: Sequence[Table],
) -> Figure:
    """Show images as graphs: figures 3, 4 and 5 of the Discrete-AIR paper.

    A row per image: input; reconstruction, with the inferred count in its corner and a box and a
    number for each object, in the colour of its category if it has one; a table of the nodes, each
    row in the colour of its object; and a table of the edges.

    Args:
        images: (B, C, H, W).
        reconstructions: (B, C, H, W).
        scenes: B scenes.
        nodes: B tables with a row per object, in the order of its slot.
        edges: B tables.

    Raises:
        ValueError: also where the arguments do not hold the same number of images or objects.
    """
    first, second = as_pictures(images, 4, "images"), as_pictures(reconstructions, 4, "drawn")
    present = as_numpy(scenes.present)
    if first.shape != second.shape or {*map(len, (present, nodes, edges))} != {len(first)}:
        raise ValueError("images, reconstructions, scenes and tables differ in number or size")
    if [len(table.rows) for table in nodes] != present.sum(1).tolist():
        raise ValueError("a table of nodes must have a row for each object")
    width, height = fit(first.shape[1:3], LARGE)
    widths = [_widths(nodes), _widths(edges)]
    # The left edge of each column of the page, and where it ends.
    places = np.cumsum([0, width + GAP, width + 6 * GAP, *(sum(w) + 6 * GAP for w in widths)])
    heights = [max(height, *(_lines(table) * LINE for table in pair)) for pair in zip(nodes, edges)]
    below = 3 * GAP
    sheet = Sheet(int(places[-1]) - 6 * GAP, HEADING + sum(heights) + (len(heights) - 1) * below)
    spans = [width, width, *map(sum, widths)]
    names = "input", "reconstruction", "nodes", "edges (source less target)"
    for name, x, span in zip(names, places, spans):
        sheet.text(x + span / 2, HEADING / 2, name)
    y, colours = HEADING, colours_of(scenes)
    for b, tall in enumerate(heights):
        sheet.image(first[b], 0, y, width, height)
        axes = sheet.image(second[b], places[1], y, width, height)
        boxes = as_numpy(scenes.boxes)[b, np.flatnonzero(present[b])]
        draw_objects(axes, boxes, colours[b], numbered=True)
        _draw(sheet, places[2], y, nodes[b], widths[0], colours[b])
        _draw(sheet, places[3], y, edges[b], widths[1], ())
        y += tall + below
    return sheet.figure


def _widths(tables: Sequence[Table]) -> list[int]:
    """The widths of the columns in pixels, the same for all images."""
    cells = [row for table in tables for row in (table.columns, *table.rows[:MOST])]
    return [CHARACTER * max(map(len, column)) + GAP for column in zip(*cells, strict=True)]


def _lines(table: Table) -> int:
    return 1 + min(len(table.rows), MOST) + (len(table.rows) > MOST)


def _draw(
    sheet: Sheet, x: int, y: int, table: Table, widths: Sequence[int], colours: Sequence[str]
) -> None:
    """A table with its top left corner at (x, y), its rows marked in these colours if any."""
    shown = table.rows[:MOST]
    for i, row in enumerate((table.columns, *shown)):
        right, middle = x, y + (i + 0.5) * LINE
        if i and colours:
            sheet.text(x - 2 * GAP, middle, "\u25a0", size=FONT + 3, color=colours[i - 1])
        for width, cell in zip(widths, row, strict=True):
            right += width
            sheet.text(right - GAP, middle, cell, align="right", color=INK if i else PALE)
    if not shown:
        sheet.text(x + sum(widths) / 2, y + 1.5 * LINE, "none", color=PALE)
    if len(table.rows) > MOST:
        text = f"and {len(table.rows) - MOST} more"
        sheet.text(x + sum(widths) - GAP, y + (MOST + 1.5) * LINE, text, align="right", color=PALE)
