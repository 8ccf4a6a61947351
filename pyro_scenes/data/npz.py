"""Scenes in npz files: plain arrays only, which `np.load(path, allow_pickle=False)` reads.

| array | dtype and shape | |
|---|---|---|
| images | uint8 (N, H, W, C) | needed; C is 1 or 3 |
| counts | int (N,) | |
| categories | int (N, M) | -1 for none |
| boxes | float (N, M, 4) | centre x, y, width, height in pixels; NaN for none |
| segmentation | uint8 (N, H, W) | 0 for background |

Where there is no images, x, uint8 (N, H, W), gives grey images alone: see `pyro_mnist.py`.
"""

from __future__ import annotations

import io
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from pyro_scenes import limits
from pyro_scenes.data.scene_data import SceneData
from pyro_scenes.errors import UserError, reason
from pyro_scenes.files import atomic_write, open_zip

MOST = 255  # objects in an image, as many as a segmentation map could tell apart; and categories
HEADER = 10_000  # bytes of an array's header, which numpy limits to as many after reading it
# Kinds of dtype accepted, what they are called, and the axes.
SCHEMA = {
    "images": ("u", "uint8", ("N", "H", "W", "C")),
    "counts": ("iu", "integers", ("N",)),
    "categories": ("iu", "integers", ("N", "M")),
    "boxes": ("f", "floats", ("N", "M", "4")),
    "segmentation": ("u", "uint8", ("N", "H", "W")),
}
TRUTH = tuple(SCHEMA)[1:]
GREY = {"x": ("u", "uint8", ("N", "H", "W"))}  # in place of all the above


def save_npz(path: str | Path, data: SceneData) -> None:
    """Write images and truth (not the attributes), compressed, whole or not at all.

    The images go out block by block, so memory stays near the packed size.

    Raises:
        UserError: an image has more objects than are read again.
    """
    if data.counts is not None and data.counts.max(initial=0) > MOST:
        raise UserError(f"{path} cannot hold an image of {data.counts.max()} objects;"
                        f" {MOST} are the most")
    images = ((len(data), *data.shape), np.dtype(np.uint8), data.blocks())
    arrays: dict[str, tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray]]] = {"images": images}
    for name in TRUTH:
        value = getattr(data, name)
        if value is not None:
            arrays[name] = (value.shape, value.dtype, [value])
    with atomic_write(Path(path)) as file, \
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, dtype, blocks) in arrays.items():
            header = {"shape": shape, "fortran_order": False, "descr": npy.dtype_to_descr(dtype)}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                npy.write_array_header_1_0(entry, header)
                for block in blocks:
                    entry.write(np.ascontiguousarray(block).tobytes())


def load_npz(path: str | Path) -> SceneData:
    """Read and check a file of the schema above; other arrays in it are ignored.

    Raises:
        UserError: the file is missing, damaged or no npz, holds pickled objects, lacks images, or
            an array's dtype, shape or values break the schema. The line says which and how.
    """
    path = Path(path)
    with readable(path):
        with open_zip(path) as archive:
            arrays = {}
            for name in _check_headers(path, archive):
                with archive.open(f"{name}.npy") as entry:
                    arrays[name] = npy.read_array(entry, allow_pickle=False)
    if "x" in arrays:
        arrays["images"] = arrays.pop("x")[..., None]
    if "boxes" in arrays:
        with np.errstate(over="ignore", under="ignore"):  # what is left of them is checked
            arrays["boxes"] = arrays["boxes"].astype(np.float32)
    _check_values(path, arrays)
    truth: dict[str, np.ndarray | None] = {name: arrays.get(name) for name in TRUTH}
    for name in ("counts", "categories"):
        if name in arrays:
            truth[name] = arrays[name].astype(np.int64)
    return SceneData.from_images(path.name, arrays["images"], **truth)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what a missing or damaged npz file raises into a UserError."""
    try:
        # numpy warns of a header that is damaged, and then fails or reads it.
        with warnings.catch_warnings(action="ignore"):
            yield
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError,
            RuntimeError, OSError, tokenize.TokenError) as error:
        raise UserError(f"{path} is no readable npz file ({reason(error)}); write it with numpy's "
                        "savez_compressed") from None


def read_header(name: str, entry: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """An array's shape and dtype; the entry is left where its values begin.

    :raises ValueError: if it is damaged or of a format that is not known.
    """
    beginning = io.BytesIO(entry.read(HEADER))
    version = npy.read_magic(beginning)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has the npy format {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, _, dtype = read(beginning)
    except Exception as error:  # a damaged header makes numpy fail in any way
        raise ValueError(f"{name} has a header that cannot be read: {error}") from error
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} has the shape {shape}")
    entry.seek(beginning.tell())
    return shape, dtype


def _check_headers(path: Path, archive: zipfile.ZipFile) -> list[str]:
    """Check dtypes and shapes from the arrays' headers alone; the names of those present."""
    entries = {info.filename: info for info in archive.infolist()}
    present = [name for name in SCHEMA if f"{name}.npy" in entries]
    lengths: dict[str, int] = {"4": 4}
    taken = 0
    if "images" not in present:
        if "x.npy" not in entries:
            raise UserError(f"{path} has no array called images; it needs one, uint8 (N, H, W, C)")
        present, lengths["C"] = list(GREY), 1
    for name in present:
        kinds, called, axes = (SCHEMA | GREY)[name]
        info = entries[f"{name}.npy"]
        with archive.open(info) as entry:
            shape, dtype = read_header(name, entry)
            header = entry.tell()
        wanted = f"{called} ({', '.join(axes)}{',' * (len(axes) == 1)})"
        if dtype.hasobject:
            raise UserError(f"{path}: {name} holds pickled Python objects; save it as {wanted}")
        if dtype.kind not in kinds or (called == "uint8" and dtype != np.uint8):
            raise UserError(f"{path}: {name} is {dtype}; it must be {wanted}")
        if len(shape) != len(axes):
            raise UserError(f"{path}: {name} has shape {shape}; it must be {wanted}")
        size = math.prod(shape) * dtype.itemsize
        # Numbers that are no pixels are kept in 8 bytes at most, whatever they come in.
        taken += size if called == "uint8" else math.prod(shape) * max(dtype.itemsize, 8)
        limits.check(f"{path}: {name}", taken)
        if header + size > info.file_size:
            raise ValueError(f"{name} is cut short")
        for axis, length in zip(axes, shape):
            if lengths.setdefault(axis, length) != length:
                raise UserError(f"{path}: {name} has shape {shape}, but {axis} is "
                                f"{lengths[axis]} by the arrays before it; it must be {wanted}")
    if not all(lengths[axis] for axis in "NHW"):
        raise UserError(f"{path} has no pixels: {present[0]} has N, H, W = "
                        f"{', '.join(str(lengths[axis]) for axis in 'NHW')}")
    if lengths["C"] not in (1, 3):
        raise UserError(f"{path}: images has {lengths['C']} channels; it must be uint8 "
                        "(N, H, W, C) with C = 1 or 3")
    return present


def _check_values(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Whether counts, categories and boxes tell the same story."""
    counts, categories, boxes = (arrays.get(name) for name in ("counts", "categories", "boxes"))
    if counts is not None and (counts.min() < 0 or counts.max() > MOST):
        worst = counts.min() if counts.min() < 0 else counts.max()
        raise UserError(f"{path}: counts has {worst}; a count is 0 to {MOST}")
    told = {}
    if categories is not None:
        if categories.size and (categories.min() < -1 or categories.max() > MOST):
            worst = categories.min() if categories.min() < -1 else categories.max()
            raise UserError(f"{path}: categories has {worst}; a category is 0 to {MOST}, or -1 for "
                            "none")
        told["categories"] = categories >= 0
    if boxes is not None:
        given = ~np.isnan(boxes)
        if np.any(given.any(-1) != given.all(-1)):
            raise UserError(f"{path}: boxes has boxes that are NaN in part; a box is four numbers, "
                            "or four NaN for none")
        real = boxes[given.all(-1)]
        if not np.isfinite(real).all() or np.any(real[:, 2:] <= 0):
            raise UserError(f"{path}: boxes has boxes that are infinite or without width or "
                            "height; give centre x, y, width, height in pixels")
        told["boxes"] = given.all(-1)
    if len(told) == 2 and np.any(told["categories"] != told["boxes"]):
        raise UserError(f"{path}: categories and boxes disagree on where objects are; -1 and NaN "
                        "must be in the same places")
    for name, objects in told.items():
        if counts is not None and np.any(objects.sum(-1) != counts):
            image = int(np.argmax(objects.sum(-1) != counts))
            raise UserError(f"{path}: image {image} has {counts[image]} objects by counts but "
                            f"{objects[image].sum()} by {name}; make them agree")
