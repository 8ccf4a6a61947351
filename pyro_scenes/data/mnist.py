"""MNIST from a folder, a cache or a download; the IDX format.

Looked for in this order: the folder given, the folder named by PYRO_SCENES_MNIST, the cache
(~/.cache/pyro_scenes/mnist, or under XDG_CACHE_HOME), and a download into the cache. A folder
that the user names is taken as it is; what is downloaded or cached must be the original files.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import math
import os
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from pyro_scenes.errors import UserError, reason
from pyro_scenes.files import atomic_write

VARIABLE = "PYRO_SCENES_MNIST"
MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
# Of the decompressed bytes: mirrors compress differently.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
LIMIT = 200_000_000  # bytes of one file, compressed or not; the largest original has 47 million
TIMEOUT = 30  # seconds without an answer before the next mirror is tried


def read_mnist(
    split: str, folder: Path | None = None, *, first: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 (n, 28, 28), and labels, uint8 (n,) 0..9, of "train" or "test".

    Args:
        folder: with the IDX files, gzipped or not; None looks where the module says.
        first: only the first so many digits.

    Raises:
        UserError: files that are missing, damaged, too few digits, or nothing found and no
            network.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    if folder is None and os.environ.get(VARIABLE):
        folder = Path(os.environ[VARIABLE])
    (images, image_file), (labels, label_file) = (
        _from_folder(folder, name) if folder else _from_cache(name) for name in names)
    if images.shape[1:] != (28, 28):
        raise UserError(f"{image_file} has shape {images.shape}; MNIST has images of 28 x 28")
    if labels.ndim != 1 or len(labels) != len(images) or labels.max(initial=0) > 9:
        raise UserError(f"{label_file} does not label the {len(images)} images beside it with "
                        "digits 0 to 9; use files of one set")
    if first is not None and len(images) < first:
        raise UserError(f"{image_file} has {len(images)} images; {first} are needed")
    return images[:first], labels[:first]


def parse_idx(content: bytes, source: str) -> np.ndarray:
    """The uint8 array in the bytes of an IDX file; `source` names it in errors.

    The format: two zero bytes, the dtype (8 is uint8), the number of axes, each axis' length as
    a big-endian 32-bit integer, then the elements. Raises UserError when the bytes differ.
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UserError(f"{source} is no IDX file; use the original MNIST files, gzipped or not")
    if content[2] != 8:
        raise UserError(f"{source} holds elements of type 0x{content[2]:02x}; only uint8 (0x08) "
                        "is read")
    if content[3] > 3:
        raise UserError(f"{source} has {content[3]} axes; MNIST's images have 3, and labels 1")
    start = 4 + 4 * content[3]
    if content[3] == 0 or len(content) < start:
        raise UserError(f"{source} has an incomplete IDX header; get the file again")
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    if len(content) - start != math.prod(shape):
        raise UserError(f"{source} has {len(content) - start} bytes of data where its header says "
                        f"{math.prod(shape)}; get the file again")
    if not math.prod(shape):
        raise UserError(f"{source} has no elements; get the file again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _from_folder(folder: Path, name: str) -> tuple[np.ndarray, Path]:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return parse_idx(_decompressed(path, _read(path)), str(path)), path
    raise UserError(f"{folder} has no {name} or {name}.gz; --mnist and {VARIABLE} name a folder "
                    "with MNIST's IDX files")


def _read(path: Path) -> bytes:
    """A file's bytes, or so many that it is refused as too large."""
    with open(path, "rb") as file:
        return file.read(LIMIT + 1)


def _from_cache(name: str) -> tuple[np.ndarray, Path]:
    """From the cache, filled by a download where the file is missing or not the original."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, as in some containers
        raise UserError("there is no home to keep MNIST in: name a folder with its files by --mnist"
                        f" or {VARIABLE}") from None
    path = home / "pyro_scenes" / "mnist" / f"{name}.gz"
    try:
        content = _verified(path, _read(path))
    except (OSError, UserError):
        content = _download(path)
    return parse_idx(content, str(path)), path


def _download(path: Path) -> bytes:
    """Fetch the file that belongs at `path` from the first mirror that has it; decompressed."""
    reasons = []
    for mirror in MIRRORS:
        url = mirror + path.name
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                packed = answer.read(LIMIT + 1)
            content = _verified(url, packed)
        except (OSError, http.client.HTTPException, UserError) as error:
            reasons.append(f"{url}: {reason(error)}")
            continue
        try:
            with atomic_write(path) as file:
                file.write(packed)
        except OSError:
            pass  # A cache that cannot be written costs a download next time, nothing now.
        return content
    raise UserError("MNIST is needed: name a folder with its IDX files (--mnist DIR or "
                    f"{VARIABLE}), or connect to a network for the download "
                    f"({'; '.join(reasons)})")


def _verified(source: object, packed: bytes) -> bytes:
    content = _decompressed(source, packed)
    name = Path(str(source)).stem
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise UserError(f"{source} is not the original file (checksum)")
    return content


def _decompressed(source: object, content: bytes) -> bytes:
    """The bytes, unzipped where they are gzip's; UserError when damaged or larger than LIMIT."""
    if content[:2] == b"\x1f\x8b":
        try:
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(LIMIT + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source} is damaged ({reason(error)}); get the file again") from None
    if len(content) > LIMIT:
        raise UserError(f"{source} holds more than {LIMIT} bytes; this is not MNIST")
    return content
