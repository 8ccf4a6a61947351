"""A data set of scenes in memory: images kept as bits where they are binary, and their truth."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_scenes.errors import UserError

Index = int | slice | np.ndarray
# Images packed, unpacked or written at a time, so that no whole data set is ever held in bytes.
BLOCK = 4096


@dataclass(frozen=True)
class Origin:
    """What data were generated from: a data set, the range of objects, the folder with MNIST."""

    name: str
    objects: tuple[int, int]
    mnist: Path | None


@dataclass(frozen=True, eq=False)
class SceneData:
    """N images of H x W pixels and C channels, with what is known of their objects.

    An image has up to M objects, listed in the first slots of the arrays below when they were
    generated; a slot without an object holds -1 (`categories`) or NaN (`boxes`). What is not
    known is None.

    | field | type | meaning |
    |---|---|---|
    | name | str | a registered name, or the file's |
    | shape | (H, W, C) | C is 1 or 3 |
    | pixels | uint8 (N, H, W, C) or (N, bits / 8) | bytes, or packed bits in order (C, H, W) |
    | counts | int64 (N,) | objects in the image, 0..M |
    | categories | int64 (N, M) | index into `class_names` |
    | boxes | float32 (N, M, 4) | tight ink boxes: centre x, y, width, height in pixels |
    | segmentation | uint8 (N, H, W) | 0 background, i + 1 for the object in slot i |
    | attributes | name -> (N, M) | generated data only, see the data set's file |
    | class_names | strings | empty when unknown |
    | origin | Origin | generated data only |

    Two white images and a black one, and what is known of them:

    >>> images = np.zeros((3, 4, 4, 1), np.uint8)
    >>> images[:2] = 255
    >>> data = SceneData.from_images("mine", images, counts=np.array([1, 1, 0]))
    >>> len(data), data.shape, data.binary
    (3, (4, 4, 1), True)
    >>> data.batch(slice(1, 3)).amax((1, 2, 3)).tolist()
    [1.0, 0.0]
    >>> data[data.counts == 0].counts.tolist()
    [0]
    """

    name: str
    shape: tuple[int, int, int]
    pixels: np.ndarray
    counts: np.ndarray | None = None
    categories: np.ndarray | None = None
    boxes: np.ndarray | None = None
    segmentation: np.ndarray | None = None
    attributes: dict[str, np.ndarray] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    origin: Origin | None = None

    @classmethod
    def from_images(cls, name: str, images: np.ndarray, **truth: Any) -> SceneData:
        """Wrap images (uint8 (N, H, W, C)), as bits where every byte is 0 or 255."""
        height, width, channels = images.shape[1:]
        blocks = (images[i:i + BLOCK] for i in range(0, len(images), BLOCK))
        pixels = images
        every = images.ravel("K")  # in memory's order, so that nothing is copied
        # By numbers of bytes, not of images: a single image may be all there is.
        parts = (every[i:i + BLOCK**2] for i in range(0, len(every), BLOCK**2))
        if all(np.all((part == 0) | (part == 255)) for part in parts):
            flat = (b.transpose(0, 3, 1, 2).reshape(len(b), -1) for b in blocks)
            pixels = np.concatenate([np.packbits(block, axis=1) for block in flat])
        return cls(name, (height, width, channels), pixels, **truth)

    @property
    def binary(self) -> bool:
        """Whether every pixel is 0 or 255, so that the images are kept as bits."""
        return self.pixels.ndim == 2

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: Index = slice(None)) -> np.ndarray:
        """The images at `index`, uint8 (n, H, W, C), 0..255."""
        if not self.binary:
            return self.pixels[_plural(index)]
        return self._bits(index).transpose(0, 2, 3, 1) * np.uint8(255)

    def batch(self, index: Index = slice(None)) -> torch.Tensor:
        """The images at `index`, float32 (n, C, H, W), 0..1."""
        if self.binary:
            return torch.from_numpy(self._bits(index)).float()
        pixels = torch.from_numpy(self.pixels[_plural(index)])
        return pixels.permute(0, 3, 1, 2).float().div_(255).contiguous()

    def blocks(self) -> Iterator[np.ndarray]:
        """All images in order, uint8 (n, H, W, C), a few thousand at a time."""
        for start in range(0, len(self), BLOCK):
            yield self.images(slice(start, start + BLOCK))

    def digest(self) -> str:
        """What tells these images from others: the beginning of their SHA-256."""
        found = hashlib.sha256(f"{self.shape}".encode())
        found.update(np.ascontiguousarray(self.pixels).data)
        return found.hexdigest()[:12]

    def __getitem__(self, index: Index) -> SceneData:
        """The scenes at `index` with all their truth; an int gives a data set of one.

        Chosen by anything but a slice they are no fair sample: where they are from, and with it
        the entropy of what made them, is not known any more.
        """
        at = _plural(index)
        arrays: dict[str, Any] = {
            f.name: value[at] for f in fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray)}
        arrays["attributes"] = {name: value[at] for name, value in self.attributes.items()}
        origin = self.origin if isinstance(index, slice) else None
        return replace(self, origin=origin, **arrays)

    def _bits(self, index: Index) -> np.ndarray:
        height, width, channels = self.shape
        packed = self.pixels[_plural(index)]
        bits = np.unpackbits(packed, axis=1, count=channels * height * width)
        return bits.reshape(-1, channels, height, width)


def split_held_out(data: SceneData) -> tuple[SceneData, SceneData]:
    """(training, held-out) parts: held out is the last 5%, at least 1 and at most 10,000 images.

    Raises UserError for a single image, which leaves nothing to train on.
    """
    if len(data) < 2:
        raise UserError(f"{data.name} has 1 image; training needs at least 2, one is held out")
    cut = len(data) - min(max(len(data) // 20, 1), 10_000)
    return data[:cut], data[cut:]


def _plural(index: Index) -> slice | np.ndarray:
    """An index that keeps the first axis."""
    return np.asarray([index]) if isinstance(index, int | np.integer) else index
