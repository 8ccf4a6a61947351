"""Multi-MNIST as AIR's users have it: the file of `pyro.contrib.examples.multi_mnist`.

| array | dtype and shape | |
|---|---|---|
| x | uint8 (N, H, W) | grey images |
| y | object (N,), or (N, M) where all have M digits | a list of digits each, pickled |

`load_npz` takes x and leaves y alone. Here y is read too, with no trust in the pickle: it may hold
lists, tuples, numbers and text, and name what numpy makes arrays with, which an inert class stands
in for. Anything else is refused, and nothing of the file or of numpy is called.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyro_scenes import pickles
from pyro_scenes.data.npz import MOST, load_npz, read_header, readable
from pyro_scenes.data.scene_data import SceneData
from pyro_scenes.errors import UserError
from pyro_scenes.files import open_zip, read_entry

IMAGE_BYTES = 1024  # of pickle an image, at most, against files that claim too much
# What numpy pickles an array of lists of ints with, in all its versions. `encode` makes bytes.
NAMES = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"), ("_codecs", "encode"),
}


def load_pyro_mnist(path: str | Path, trust: bool = False) -> SceneData:
    """Read images with the counts and categories that the labels tell.

    Args:
        trust: whether to read the pickled labels at all, as told above.

    Raises:
        UserError: not trusted, or not such a file, or one whose pickle holds anything else.
    """
    path = Path(path)
    data = load_npz(path)
    with readable(path), open_zip(path) as archive:
        if "images.npy" in archive.namelist() or "y.npy" not in archive.namelist():
            raise UserError(f"{path} is not from Pyro's multi_mnist, whose files have x and y; "
                            "--data takes it as it is")
        with archive.open("y.npy") as entry:
            shape, dtype = read_header("y", entry)
            if dtype != object or len(shape) not in (1, 2) or shape[0] != len(data):
                raise UserError(f"{path}: y is {dtype} of shape {shape}; it must be a list of "
                                f"digits for each of {len(data)} images, pickled")
            if not trust:
                raise UserError(
                    f"{path}: its labels are pickled, and unpickling runs code from whoever made "
                    "the file; add --trust-pickled-labels to read them as lists of numbers alone")
            if archive.getinfo("y.npy").file_size > IMAGE_BYTES * (1 + len(data)):
                raise UserError(f"{path}: y is too long for labels of {len(data)} images")
            header = entry.tell()
        pickled = bytes(read_entry(archive, archive.getinfo("y.npy"))[header:])
    rows = _unpickle(path, pickled)
    if len(shape) == 2 and len(rows) == shape[0] * shape[1]:
        rows = [rows[i * shape[1]:(i + 1) * shape[1]] for i in range(shape[0])]
    if len(rows) != len(data):
        raise UserError(f"{path}: y has other labels than its shape {shape} tells")
    for i, row in enumerate(rows):
        if type(row) is not list or len(row) > MOST or not all(
                type(digit) is int and 0 <= digit <= 9 for digit in row):
            raise UserError(f"{path}: y[{i}] is not a list of at most {MOST} digits, 0 to 9")
    counts = np.array([len(row) for row in rows], np.int64)
    categories = np.full((len(rows), counts.max()), -1, np.int64)
    for slots, row in zip(categories, rows):
        slots[:len(row)] = row
    return replace(data, counts=counts, categories=categories)


def _unpickle(path: Path, pickled: bytes) -> list[Any]:
    """The elements of a pickled array of objects, in order."""
    try:
        array, _ = pickles.look(pickled, NAMES)
        *_, elements = array.state
        if type(elements) is not list:
            raise TypeError("has no list")
    except Exception as error:  # a pickle may fail in any way
        raise UserError(f"{path}: y is no pickled array of lists of digits, and nothing else is "
                        f"read ({ascii(str(error)[:100])})") from None
    return elements
