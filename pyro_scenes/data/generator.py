"""What the generated data sets share, and scenes of binary sprites on a black canvas."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyro_scenes.data.placing import Draws, place
from pyro_scenes.data.scene_data import Origin, SceneData
from pyro_scenes.errors import UserError

# Scenes made from one seed. Part of what defines the data: another value gives other images.
MOST_IMAGES = 10**8  # more would be a slip
CHUNK = 1024
STREAMS = {"train": 0, "test": 1}
# Objects in test scenes with more than any training scene has: the paper's test of generalisation.
CROWDED = (7, 7)
# Segmentation labels are bytes, 0 is the background.
MOST_OBJECTS = 255


@dataclass
class Sprites:
    """The S different pieces of ink that a data set is made of.

    masks: (S, D, D) bool, D odd, the sprite's centre in the middle pixel.
    category: (S,) int.
    keep_cell: whether the whole D x D cell must lie inside the canvas and clear of other cells,
        or only the tight box round the ink.
    attributes: name -> (S,), reported with every object.
    """

    masks: np.ndarray
    category: np.ndarray
    keep_cell: bool
    attributes: dict[str, np.ndarray]
    ink_box: np.ndarray = field(init=False)  # (S, 4) left, top, right, bottom from the centre
    ink: np.ndarray = field(init=False)  # (P, 2) row, column from the centre, sprite by sprite
    first: np.ndarray = field(init=False)  # (S + 1,) where a sprite's pixels begin in `ink`

    def __post_init__(self) -> None:
        half = self.masks.shape[1] // 2
        per_sprite = self.masks.sum((1, 2))
        if not per_sprite.all():
            raise UserError(f"sprite {int(per_sprite.argmin())} of the pool has no ink; "
                            "use the original MNIST files")
        rows, columns = np.any(self.masks, axis=2), np.any(self.masks, axis=1)
        edges = [columns.argmax(1), rows.argmax(1),
                 2 * half - columns[:, ::-1].argmax(1), 2 * half - rows[:, ::-1].argmax(1)]
        self.ink_box = np.stack(edges, 1) - half
        self.ink = np.argwhere(self.masks)[:, 1:] - half
        self.first = np.concatenate([[0], per_sprite.cumsum()])

    @property
    def room(self) -> np.ndarray:
        """(S, 4) what a sprite keeps for itself, as `placing.place` takes it."""
        half = self.masks.shape[1] // 2
        cell = np.array([-half, -half, half, half])
        return np.broadcast_to(cell, self.ink_box.shape) if self.keep_cell else self.ink_box


# Makes CHUNK scenes from draws, the fewest and most objects, the folder with MNIST if any, and
# whether a segmentation is wanted: the arrays of SceneData, and attributes, by name. Binary images
# are packed bits; bytes are taken for grey ones, of which no Bernoulli model has a likelihood.
Maker = Callable[[Draws, int, int, Path | None, bool], dict[str, np.ndarray]]


@dataclass(frozen=True)
class DatasetSpec:
    """A data set that can be generated."""

    name: str
    shape: tuple[int, int, int]  # H, W, C
    class_names: tuple[str, ...]
    scenes: Maker
    objects: tuple[int, int] = (0, 3)  # fewest and most
    sizes: Mapping[str, int] = field(default_factory=lambda: {"train": 190_000, "test": 10_000})
    # What else a model that is trained on it is measured on: scenes of CROWDED objects, and other
    # registered data sets, by what their scenes have that the training's have not.
    crowded: bool = False
    others: Mapping[str, str] = field(default_factory=dict)

    def objects_range(self, objects: tuple[int, int] | None) -> tuple[int, int]:
        """The fewest and the most objects: those asked for, or the data set's own for None.

        :raises UserError: if they are no range, or more than MOST_OBJECTS.
        """
        low, high = self.objects if objects is None else objects
        if not 0 <= low <= high <= MOST_OBJECTS:
            raise UserError(f"objects {low}-{high}: give the fewest and the most objects a scene, "
                            f"within 0-{MOST_OBJECTS}")
        return low, high

    def generate(
        self, images: int, *, objects: tuple[int, int] | None = None, seed: int = 0,
        stream: str = "test", mnist: Path | None = None, segmentation: bool = True,
    ) -> SceneData:
        """Make `images` scenes; see `registry.make`."""
        low, high = self.objects_range(objects)
        if images < 1:
            raise UserError(f"{images} images asked for; ask for at least 1")
        if images > MOST_IMAGES:
            raise UserError(f"{images} images asked for; ask for {MOST_IMAGES:,} at most")
        if stream not in STREAMS:
            raise UserError(f"unknown stream {stream!r}; one of {', '.join(STREAMS)}")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed}: give a whole number from 0 to 2**64 - 1")
        key = (zlib.crc32(self.name.encode()), STREAMS[stream], low, high)
        made: dict[str, np.ndarray] = {}
        for start in range(0, images, CHUNK):
            draws = Draws(seed, (*key, start // CHUNK))
            for name, values in self.scenes(draws, low, high, mnist, segmentation).items():
                if name not in made:
                    made[name] = np.empty((images, *values.shape[1:]), values.dtype)
                made[name][start:start + CHUNK] = values[:images - start]
        known = {name: made.pop(name, None)
                 for name in ("counts", "categories", "boxes", "segmentation")}
        return SceneData(self.name, self.shape, made.pop("pixels"), attributes=made,
                         class_names=self.class_names,
                         origin=Origin(self.name, (low, high), mnist), **known)


@dataclass(frozen=True)
class SpriteScenes:
    """Scenes of binary sprites from a pool, which overlap nothing.

    With 3 channels each object also has a colour: `colour` 1..7, whose bits 0, 1 and 2 are red,
    green and blue.
    """

    pool: Callable[[Path | None], Sprites]
    shape: tuple[int, int, int]  # H, W, C

    def __call__(
        self, draws: Draws, low: int, high: int, mnist: Path | None, segmentation: bool
    ) -> dict[str, np.ndarray]:
        height, width, channels = self.shape
        sprites = self.pool(mnist)
        counts = low + draws.below(high - low + 1, CHUNK)
        colour = 1 + draws.below(2**channels - 1, (CHUNK, high))
        chosen, centres = place(draws, sprites.room, counts, high, height, width)
        present = np.arange(high) < counts[:, None]
        canvas = render(sprites, chosen, centres, present, colour, height, width)
        made = {
            "pixels": np.packbits(
                np.concatenate([canvas & (1 << c) for c in range(channels)], axis=1), axis=1),
            "counts": counts,
            "categories": np.where(present, sprites.category[chosen], -1),
            "boxes": _boxes(sprites.ink_box[chosen], centres, present),
        }
        if segmentation:
            label = np.broadcast_to(np.arange(1, high + 1), chosen.shape)
            made["segmentation"] = render(
                sprites, chosen, centres, present, label, height, width
            ).reshape(-1, height, width)
        for axis, name in enumerate("xy"):
            made[name] = np.where(present, centres[..., axis] + 0.5, np.nan).astype(np.float32)
        for name, values in sprites.attributes.items():
            none = -1 if values.dtype.kind == "i" else np.float32(np.nan)
            made[name] = np.where(present, values[chosen], none)
        if channels > 1:
            made["colour"] = np.where(present, colour, -1)
        return made


def render(
    sprites: Sprites, chosen: np.ndarray, centres: np.ndarray, present: np.ndarray,
    values: np.ndarray, height: int, width: int,
) -> np.ndarray:
    """Canvases, uint8 (n, height * width): 0, or the value of the object whose ink is there.

    chosen, present, values: (n, M) sprite, whether there is one, and 1..255 to write;
    centres: (n, M, 2) column, row.
    """
    canvas = np.zeros((len(chosen), height * width), np.uint8)
    scene, slot = np.nonzero(present)
    sprite, (column, row) = chosen[scene, slot], centres[scene, slot].T
    offsets = sprites.ink[:, 0] * width + sprites.ink[:, 1]
    start, size = sprites.first[sprite], np.diff(sprites.first)[sprite]
    # Only ink is written: entry j of an object's run is pixel `start + j` of the list of ink.
    run = np.arange(size.sum()) + np.repeat(start - (size.cumsum() - size), size)
    corner = (scene * height + row) * width + column
    canvas.reshape(-1)[offsets[run] + np.repeat(corner, size)] = np.repeat(
        values[scene, slot].astype(np.uint8), size)
    return canvas


def _boxes(ink_box: np.ndarray, centres: np.ndarray, present: np.ndarray) -> np.ndarray:
    """float32 (n, M, 4) centre x, y, width, height of inclusive pixel boxes, NaN where absent."""
    size = ink_box[..., 2:] - ink_box[..., :2] + 1
    middle = centres + ink_box[..., :2] + size / 2
    boxes = np.concatenate([middle, size], -1).astype(np.float32)
    boxes[~present] = np.nan
    return boxes
