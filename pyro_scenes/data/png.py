"""Images to look at: one npz file, PNG files, or a folder of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pyro_scenes.data.npz import load_npz
from pyro_scenes.errors import UserError

MODES = {1: "L", 3: "RGB"}  # Pillow's names for grey and colour


def load_images(paths: Sequence[str | Path], shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 (N, H, W, C) of the `shape` (H, W, C) wanted.

    Args:
        paths: one npz file; or PNG files and folders, whose *.png are taken in order of name.
            PNGs are turned to grey (C = 1, luma) or colour (C = 3); an npz must match.

    Raises:
        UserError: nothing there, an unreadable file, another size or an npz of other channels.
    """
    if len(paths) == 1 and Path(paths[0]).suffix == ".npz":
        data = load_npz(paths[0])
        if data.shape != shape:
            raise UserError(f"{paths[0]} has images of {_size(data.shape)} (height x width x "
                            f"channels); {_size(shape)} is needed")
        return data.images()
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
    return np.stack([_read_png(file, shape) for file in files])


def _read_png(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    height, width, channels = shape
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.size != (width, height):
                raise UserError(f"{path} is {image.height} x {image.width} pixels (height x "
                                f"width); {height} x {width} is needed")
            if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
                raise UserError(f"{path} has pixels of mode {image.mode}; save it with 8 bits a "
                                "channel")
            pixels = np.asarray(image.convert(MODES[channels]))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is no PNG file; give an npz file or PNG files") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read ({error}); save it again as PNG") from None
    return pixels.reshape(shape)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
