"""Figures of scenes and of training, after those of the LAVAE and Discrete-AIR papers.

Functions take images as torch tensors or numpy arrays of floats in [0, 1] (values outside are
clipped), channels first, with 1 or 3 channels, and return a `matplotlib.figure.Figure`; images of
another rank, type or number of channels raise ValueError. pyplot is never touched, so that nothing
is shared between figures, threads or notebooks. `save` writes figures to files.

Figures are laid out in whole screen pixels, and an image pixel covers a whole number of them
(unless the image is very large): images stay crisp, and a mark one pixel wide stays visible.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from pyro_scenes.errors import UserError
from pyro_scenes.scene import Scene

ArrayLike = NDArray[Any] | Tensor

DPI = 150
# Lengths in screen pixels.
MARGIN, GAP, HEADING = 16, 8, 30
LARGE, SMALL = 192, 128    # the side of an image, about
WIDEST = 1900              # two images and what was inferred from them, side by side
CHARACTER = 10             # the mean width of a character, generously, at FONT points
FONT = 8
INK, PALE, CURVE = "#222222", "#888888", "#1f5fa8"
# Bright enough for a black canvas, dark enough for a white page; one for each object in turn.
OBJECTS = ("#ff5c5c", "#3d9bff", "#f2b705", "#2fbf71", "#c264f0",
           "#ff8a1f", "#14b8c4", "#f0609e", "#8fbf1f", "#9aa5b1")
FORMATS = (".png", ".pdf", ".svg")


def inference_figure(
    images: ArrayLike,
    reconstructions: ArrayLike,
    scenes: Scene | None = None,
    sprites: ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """Show what was inferred from images: figures 1, 5 and 8 of the LAVAE paper.

    A row per image: input; reconstruction, with the inferred count in its corner and a box round
    each object, as in figure 3 of the Discrete-AIR paper; inferred locations, the pixel under each
    object's centre in white; the sprite of each object, framed in the colour of its box.
    Four images or more stand two to a row if they fit.

    Args:
        images: (B, C, H, W).
        reconstructions: (B, C, H, W).
        scenes: B scenes; an object whose box is NaN is counted but not outlined. Default: a model
            without objects, input and reconstruction alone.
        sprites: (B, M, C, S, S), one per slot of the scenes. Default: no such column.
        title: a line above the figure.

    Raises:
        ValueError: also where the arguments do not hold the same images or slots.
    """
    columns = {
        "input": _pictures(images, 4, "images"),
        "reconstruction": _pictures(reconstructions, 4, "reconstructions"),
    }
    slots: list[NDArray[Any]] = []      # those that hold an object, for each image
    if scenes is not None:
        slots = [np.flatnonzero(present) for present in _numpy(scenes.present)]
        columns["locations"] = _location_maps(scenes, columns["input"].shape[1:3])
    if len({pictures.shape for pictures in columns.values()}) > 1:
        raise ValueError("images, reconstructions and scenes differ in number or size")
    number, rows, cols, _ = columns["input"].shape
    width, height = _fit((rows, cols), LARGE)
    block = len(columns) * (width + GAP) - GAP
    if sprites is not None:
        drawn = _pictures(sprites, 5, "sprites")
        if scenes is None or drawn.shape[:2] != scenes.present.shape:
            raise ValueError(f"{drawn.shape[:2]} sprites: there must be one per slot of the scenes")
        side = _fit(drawn.shape[2:4], (height - GAP) // 2, whole=True)
        most = max(map(len, slots))
        strip = max((most + 1) // 2 * (side[0] + GAP) - GAP, 2 * HEADING)
        block += 2 * GAP + strip

    apart, below = 5 * GAP, 3 * GAP // 2
    across = 2 if number >= 4 and 2 * block <= WIDEST else 1
    down = math.ceil(number / across)
    sheet = _Sheet(
        across * (block + apart) - apart, HEADING + down * (height + below) - below, title
    )
    for b in range(number):
        x, y = b // down * (block + apart), HEADING + b % down * (height + below)
        for name, pictures in columns.items():
            axes = sheet.image(pictures[b], x, y, width, height)
            if b % down == 0:
                sheet.text(x + width / 2, HEADING / 2, name)
            if name == "reconstruction" and scenes is not None:
                _draw_objects(axes, _numpy(scenes.boxes)[b, slots[b]])
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
            sheet.image(drawn[b, slot], left, top, *side, edge=_colour(i), linewidth=1.5)
    return sheet.figure


def samples_figure(
    images: ArrayLike, columns: int | None = None, title: str | None = None
) -> Figure:
    """Show (B, C, H, W) images in a grid, row by row: figures 2, 4 and 9 of the LAVAE paper.

    Default: about one and a half times as many columns as rows.
    """
    pictures = _pictures(images, 4, "images")
    across = columns or math.ceil(len(pictures) / round(math.sqrt(len(pictures) / 1.5)))
    return _grid([pictures[i:i + across] for i in range(0, len(pictures), across)], None, title)


def traversal_figure(
    rows: ArrayLike, labels: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Show rows of images in which one latent variable changes: figures 3 and 7 of the LAVAE paper.

    Args:
        rows: (R, T, C, H, W), R traversals of T steps each.
        labels: R names of the rows, on their left.
        title: a line above the figure.

    Raises:
        ValueError: also where there are not R labels.
    """
    pictures = _pictures(rows, 5, "rows")
    if labels is not None and len(labels) != len(pictures):
        raise ValueError(f"{len(pictures)} rows need as many labels, not {len(labels)}")
    return _grid(list(pictures), labels, title)


def swap_figure(before: ArrayLike, after: ArrayLike, title: str | None = None) -> Figure:
    """Show (B, C, H, W) reconstructions above the same with objects swapped: figure 6 of LAVAE.

    Raises:
        ValueError: also where before and after differ in shape.
    """
    first, second = _pictures(before, 4, "before"), _pictures(after, 4, "after")
    if first.shape != second.shape:
        raise ValueError(f"before and after differ in shape: {first.shape} and {second.shape}")
    return _grid([first, second], ("reconstruction", "swapped"), title)


def training_curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Plot scalars against training steps, one panel for each.

    Values that are not finite leave a gap. Long series are drawn pale under their running mean.
    A series of positive values that spans more than a factor of 20 gets a logarithmic axis.

    Args:
        series: for each name, (steps, values) of one length, in the order of the steps.

    Raises:
        ValueError: no series, or steps and values that differ in length.
    """
    if not series:
        raise ValueError("training curves need at least one series")
    across = min(3, len(series))
    down = math.ceil(len(series) / across)
    figure = Figure(figsize=(3.2 * across, 2.3 * down), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    for i, (name, (steps, values)) in enumerate(series.items()):
        x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
        if x.ndim != 1 or x.shape != y.shape:
            raise ValueError(f"{name}: {x.shape} steps for {y.shape} values")
        axes = figure.add_subplot(down, across, i + 1)
        _draw_curve(axes, x, y)
        axes.set_title(name, fontsize=FONT + 1, color=INK)
        axes.set_xlabel("step", fontsize=FONT, color=INK)
        axes.tick_params(which="both", labelsize=FONT - 1, colors=INK)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format that the extension names: .png, .pdf or .svg.

    The file appears whole or not at all: an older one is replaced when the new one is complete.

    Raises:
        UserError: an unknown extension, or a folder that does not exist or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"figure {path}: its name must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UserError(f"cannot write figure {path}: there is no folder {path.parent}")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format=path.suffix[1:].lower(), dpi=figure.dpi)
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write figure {path}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


class _Sheet:
    """A figure whose contents are placed in screen pixels, right and down from the top left."""

    def __init__(self, width: int, height: int, title: str | None) -> None:
        headroom = HEADING if title else 0
        self.width = max(width, CHARACTER * len(title or "")) + 2 * MARGIN
        self.height = height + headroom + 2 * MARGIN
        self.left, self.top = (self.width - width) // 2, MARGIN + headroom
        self.figure = Figure((self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.text(width / 2, -HEADING / 2 - GAP / 2, title or "", size=FONT + 1)

    def image(
        self, picture: NDArray[Any], x: int, y: int, width: int, height: int,
        edge: str = INK, linewidth: float = 0.5,
    ) -> Axes:
        """Draw an (H, W, 3) picture; its axes are in image pixels, x right and y down."""
        axes = self.figure.add_axes((
            (self.left + x) / self.width, 1 - (self.top + y + height) / self.height,
            width / self.width, height / self.height,
        ))
        rows, columns = picture.shape[:2]
        # Left to itself, matplotlib blurs some whole multiples, for lack of exact arithmetic.
        axes.imshow(
            picture, extent=(0, columns, rows, 0), aspect="auto",
            interpolation="nearest" if width % columns == 0 else None,
        )
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(edgecolor=edge, linewidth=linewidth)
        return axes

    def text(
        self, x: float, y: float, string: str, size: int = FONT, color: str = INK,
        align: str = "center",
    ) -> None:
        self.figure.text(
            (self.left + x) / self.width, 1 - (self.top + y) / self.height, string,
            ha=align, va="center", fontsize=size, color=color,
        )


def _grid(
    rows: Sequence[NDArray[Any]], labels: Sequence[str] | None, title: str | None
) -> Figure:
    """Rows of (T, H, W, 3) pictures, labelled on the left."""
    width, height = _fit(rows[0].shape[1:3], SMALL)
    indent = max(map(len, labels)) * CHARACTER + GAP if labels else 0
    sheet = _Sheet(
        indent + len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP, title
    )
    for r, row in enumerate(rows):
        y = r * (height + GAP)
        if labels:
            sheet.text(indent - GAP, y + height / 2, labels[r], align="right")
        for t, picture in enumerate(row):
            sheet.image(picture, indent + t * (width + GAP), y, width, height)
    return sheet.figure


def _draw_objects(axes: Axes, boxes: NDArray[Any]) -> None:
    """Write the number of the (n, 4) boxes of cx, cy, w, h (pixels) and outline the finite ones."""
    for i, (x, y, w, h) in enumerate(boxes.tolist()):
        if math.isfinite(x + y + w + h):
            axes.add_patch(Rectangle(
                (x - w / 2, y - h / 2), w, h, fill=False, edgecolor=_colour(i), linewidth=1.2
            ))
    axes.text(
        0.04, 0.96, str(len(boxes)), transform=axes.transAxes, ha="left", va="top",
        color="white", fontsize=FONT + 2, fontweight="bold",
        path_effects=[withStroke(linewidth=2, foreground="black")],
    )


def _colour(i: int) -> str:
    return OBJECTS[i % len(OBJECTS)]


def _draw_curve(axes: Axes, x: NDArray[Any], y: NDArray[Any]) -> None:
    finite = np.isfinite(y)
    known = y[finite]
    window = len(known) // 40
    if window > 4:
        axes.plot(x, y, color=CURVE, alpha=0.3, linewidth=0.6)
        ones = np.ones(window)
        # Divided by the number of values under the window, so that the ends do not sag.
        mean = np.convolve(known, ones, "same") / np.convolve(np.ones_like(known), ones, "same")
        axes.plot(x[finite], mean, color=CURVE, linewidth=1.4)
    else:
        axes.plot(x, y, color=CURVE, linewidth=1.4, marker="o", markersize=2.5)
    if len(known) and known.min() > 0 and known.max() > 20 * known.min():
        axes.set_yscale("log")
        if known.max() < 1000 * known.min():
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(
        MaxNLocator(4, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
    )


def _location_maps(scenes: Scene, size: tuple[int, ...]) -> NDArray[Any]:
    """(B, H, W, 3) black maps with a white mark at each object's centre.

    The mark is the pixel under the centre; on images of more than 64 pixels, which are drawn
    smaller, it is as many pixels wide as keeps it visible.
    """
    maps = np.zeros((len(scenes.present), *size, 3), dtype=np.float32)
    where, span = _numpy(scenes.where), math.ceil(max(size) / 64)
    for b, slot in zip(*np.nonzero(_numpy(scenes.present))):
        column, row = (
            max(0, min(int(centre - (span - 1) / 2), length - span))
            for centre, length in zip(where[b, slot], size[::-1])
        )
        maps[b, row:row + span, column:column + span] = 1
    return maps


def _fit(size: tuple[int, ...], target: int, whole: bool = False) -> tuple[int, int]:
    """The width and height on screen of a picture of (H, W) whose longer side is about target.

    That is a whole multiple of (H, W), unless target is too short for it; at most target if whole.
    """
    ratio = target / max(size)
    scale: float = (int(ratio) if whole else round(ratio)) or ratio
    return round(size[1] * scale), round(size[0] * scale)


def _pictures(images: ArrayLike, rank: int, name: str) -> NDArray[Any]:
    """(..., C, H, W) images to (..., H, W, 3), clipped to [0, 1]."""
    array = _numpy(images)
    if array.ndim != rank or array.shape[-3] not in (1, 3) or not len(array):
        raise ValueError(
            f"{name} must have {rank} axes, the last three 1 or 3 channels, height and width; "
            f"their shape is {array.shape}"
        )
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must be floats in [0, 1], not {array.dtype}")
    array = np.moveaxis(array.clip(0, 1), -3, -1)
    return np.broadcast_to(array, (*array.shape[:-1], 3))


def _numpy(values: ArrayLike) -> NDArray[Any]:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    # numpy has no bfloat16.
    return (values.float() if values.is_floating_point() else values).numpy()
