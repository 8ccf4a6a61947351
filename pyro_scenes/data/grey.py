"""Grey scenes: what Multi-Sprites and the grey Multi-MNIST share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pyro_scenes.errors import UserError

Index = tuple[np.ndarray, np.ndarray, np.ndarray]
TRIES = 1000  # of one object, before its scene is given up


def until_clear(
    todo: np.ndarray, attempt: Callable[[np.ndarray], np.ndarray], what: str, side: int
) -> None:
    """Place an object in each of some scenes, again in those where it is not clear of the others.

    Args:
        todo: (k,) scenes. attempt: draws an object for the scenes given and says where it is clear.
        what: all the objects, for the error; side: of the canvas, pixels.

    Raises:
        UserError: a scene has no room.
    """
    for _ in range(TRIES):
        if not len(todo):
            return
        todo = todo[~attempt(todo)]
    if len(todo):
        raise UserError(f"{what} do not fit on {side} x {side} pixels; ask for fewer")


class GreyCanvas:
    """Many scenes painted one object after the other, inks adding up to white at most.

    Args:
        scenes: n of them, with up to `slots` objects (M) on side x side pixels.
        window: pixels, odd; holds every object wherever its centre is in the middle pixel.
        ink: of 255, the least that counts as the object's in its box and in the segmentation.
    """

    def __init__(
        self, scenes: int, slots: int, side: int, window: int, ink: int, segmentation: bool
    ):
        self.side, self.window, self.ink = side, window, ink
        # A frame as wide as a window, for what hangs over the edge.
        self._canvas = np.zeros((scenes, side + 2 * window, side + 2 * window), np.uint8)
        self._label = np.zeros_like(self._canvas) if segmentation else None
        self._boxes = np.full((scenes, slots, 4), np.nan, np.float32)

    def offsets(self, centre: np.ndarray) -> np.ndarray:
        """Pixel centres of the windows from the objects' centres (k,), one axis, (k, W)."""
        return self._reach() + (np.floor(centre) + 0.5 - centre)[:, None]

    def fits(self, scene: np.ndarray, x: np.ndarray, y: np.ndarray, ink: np.ndarray) -> np.ndarray:
        """Whether inks, uint8 (k, W, W), add up to no more than white with what is there, (k,)."""
        clear = 255 - self._canvas[self._index(scene, x, y)] >= ink
        return np.asarray(clear.all((1, 2)))

    def paint(
        self, scene: np.ndarray, slot: int, x: np.ndarray, y: np.ndarray, ink: np.ndarray
    ) -> None:
        """Add one object to each of some different scenes.

        scene, x, y: (k,) which, and the objects' centres in pixels. ink: uint8 (k, W, W).
        """
        index, mine = self._index(scene, x, y), ink >= self.ink
        before = self._canvas[index]
        if self._label is not None:
            self._label[index] = np.where(mine & (ink > before), slot + 1, self._label[index])
        self._canvas[index] = before + np.minimum(ink, 255 - before)
        ends = []
        for axis, centre in ((1, x), (2, y)):
            line = np.asarray(mine.any(axis))
            first, last = line.argmax(1), line.shape[1] - line[:, ::-1].argmax(1)
            ends.append((np.floor(centre) - self.window // 2 + (first + last) / 2, last - first))
        (cx, width), (cy, height) = ends
        self._boxes[scene, slot] = np.stack([cx, cy, width, height], 1)

    def arrays(self) -> dict[str, np.ndarray]:
        """pixels (n, H, W, 1), boxes (n, M, 4) and, if wanted, segmentation (n, H, W)."""
        inside = slice(self.window, self.window + self.side)
        made: dict[str, np.ndarray] = {
            "pixels": self._canvas[:, inside, inside, None], "boxes": self._boxes}
        if self._label is not None:
            made["segmentation"] = self._label[:, inside, inside]
        return made

    def _reach(self) -> np.ndarray:
        return np.arange(self.window) - self.window // 2

    def _index(self, scene: np.ndarray, x: np.ndarray, y: np.ndarray) -> Index:
        row, column = (
            np.floor(centre).astype(int)[:, None] + self.window + self._reach()
            for centre in (y, x))
        return scene[:, None, None], row[:, :, None], column[:, None, :]
