"""The page that figures are drawn on, in screen pixels, and how images come to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from pyro_scenes.errors import UserError
from pyro_scenes.files import atomic_write

ArrayLike = NDArray[Any] | Tensor

DPI = 150
# Lengths in screen pixels.
MARGIN, GAP, HEADING = 16, 8, 30
LARGE, SMALL = 192, 128    # the side of an image, about
CHARACTER = 10             # the mean width of a character, generously, at FONT points
FONT = 8
INK, PALE = "#222222", "#888888"
FORMATS = (".png", ".pdf", ".svg")


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format that the extension names: .png, .pdf or .svg.

    The file appears whole or not at all: an older one is replaced when the new one is complete.

    Raises:
        UserError: an unknown extension, or a folder that cannot be made or written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"figure {path}: its name must end in {', '.join(FORMATS)}")
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=figure.dpi)
    except OSError as error:
        raise UserError(f"cannot write figure {path}: {error.strerror}") from error


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """What a figure looks like on screen, (rows, columns, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


class Sheet:
    """A figure whose contents are placed in screen pixels, right and down from the top left."""

    def __init__(self, width: int, height: int, title: str | None = None) -> None:
        headroom = HEADING if title else 0
        self.width = max(width, CHARACTER * len(title or "")) + 2 * MARGIN
        self.height = height + headroom + 2 * MARGIN
        self.left, self.top = (self.width - width) // 2, MARGIN + headroom
        self.figure = Figure((self.width / DPI, self.height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        if title:
            self.text(width / 2, -HEADING / 2 - GAP / 2, title, size=FONT + 1)

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


def fit(size: tuple[int, ...], target: int, whole: bool = False) -> tuple[int, int]:
    """The width and height on screen of a picture of (H, W) whose longer side is about target.

    That is a whole multiple of (H, W), unless target is too short for it; at most target if whole.
    """
    ratio = target / max(size)
    scale: float = (int(ratio) if whole else round(ratio)) or ratio
    return round(size[1] * scale), round(size[0] * scale)


def as_pictures(images: ArrayLike, rank: int, name: str) -> NDArray[Any]:
    """(..., C, H, W) images to (..., H, W, 3), clipped to [0, 1].

    Raises:
        ValueError: they have another rank, no images, channels but 1 or 3, or are not floats.
    """
    array = as_numpy(images)
    if array.ndim != rank or array.shape[-3] not in (1, 3) or not len(array):
        raise ValueError(
            f"{name} must have {rank} axes, the last three 1 or 3 channels, height and width; "
            f"their shape is {array.shape}"
        )
    if array.dtype.kind != "f":
        raise ValueError(f"{name} must be floats in [0, 1], not {array.dtype}")
    array = np.moveaxis(array.clip(0, 1), -3, -1)
    return np.broadcast_to(array, (*array.shape[:-1], 3))


def as_numpy(values: ArrayLike) -> NDArray[Any]:
    """The same numbers on the CPU, detached; of bfloat16 as float32."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    # numpy has no bfloat16.
    return (values.float() if values.is_floating_point() else values).numpy()
