"""Images to look at: PNG files and folders of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pyro_scenes import limits
from pyro_scenes.errors import UserError, reason
from pyro_scenes.files import check_regular

BYTES = 4  # that a pixel takes while it is read, or less; twice as many with transparency
MODES = {1: "L", 3: "RGB"}  # Pillow's names for grey and colour


def load_pngs(paths: Sequence[str | Path], channels: int) -> np.ndarray:
    """uint8 (N, H, W, C) of PNG files, all of one size.

    Args:
        paths: files, and folders whose *.png are taken in order of name.
        channels: C; pixels are turned to grey (1, luma) or colour (3), on black where they are
            transparent.

    Raises:
        UserError: nothing there, an unreadable file, files of different sizes, or more pixels
            than may be taken, see `limits`.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() == ".png")
            if not found:
                raise UserError(f"{path} has no PNG files")
        files += found
    if not files:
        raise UserError("no images given; give an npz file, PNG files or a folder of them")
    images: list[np.ndarray] = []
    for file in files:
        before = len(images) * images[0].size // channels if images else 0
        images.append(_read_png(file, channels, before))
        if images[-1].shape != images[0].shape:
            raise UserError(f"{file} is {_size(images[-1])} and {files[0]} is {_size(images[0])} "
                            "pixels (height x width): give images of one size at a time")
    return np.stack(images)


def _read_png(path: Path, channels: int, before: int) -> np.ndarray:
    """One file. :param before: pixels that the files before it had."""
    try:
        check_regular(path)
        # What is odd about a file is said once, and not by Pillow.
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            limits.check(path, path.stat().st_size)
            # In memory a read of what a chunk claims to have ends where the file does.
            with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as image:
                every = before + image.width * image.height
                limits.check(path, BYTES * every * (1 + image.has_transparency_data))
                if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                    raise UserError(f"{path} has pixels of mode {image.mode}; save it with 8 bits "
                                    "a channel")
                shown: Image.Image = image
                if image.has_transparency_data:  # its hidden pixels may have any colour
                    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
                    shown = Image.alpha_composite(black, image.convert("RGBA"))
                pixels = np.asarray(shown.convert(MODES[channels]))
                return pixels.reshape(image.height, image.width, channels)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is no PNG file; give an npz file or PNG files") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file makes Pillow fail in any way
        raise UserError(f"{path} cannot be read ({reason(error)}); save it again as PNG") from None


def _size(image: np.ndarray) -> str:
    return " x ".join(map(str, image.shape[:2]))
