"""Scenes: one type for the truth of a data set and for what a guide infers.

Coordinates are pixels, x to the right and y down; the pixel in row r and column c covers
``[c, c + 1) x [r, r + 1)``, so its centre is ``(c + 0.5, r + 0.5)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pyro_scenes import limits
from pyro_scenes.errors import UserError

# Columns of a pose: what makes an object of a template, factors and radians.
POSE = ("scale_x", "scale_y", "angle", "shear_x", "shear_y")
MOST = 255  # objects in a scene that is read
FARTHEST = 1e4  # what a number of one may be, from 0


@dataclass(frozen=True)
class Scene:
    """A batch of scenes with M slots each; slots without an object are padding.

    ========  ==============  ====================================================
    field     shape           meaning
    ========  ==============  ====================================================
    present   (B, M) bool     the slot holds an object
    where     (B, M, 2)       centre x, y in pixels, NaN where absent
    boxes     (B, M, 4)       centre x, y, width, height in pixels, NaN where absent
    kind      (B, M) long     category, -1 where absent; None if the model has none
    what      (B, M, L)       appearance, 0 where absent; None if unknown
    size      (H, W)          of the canvas, pixels; None for the model's own
    pose      (B, M, 5)       see POSE, NaN where absent; None if the model has none
    ========  ==============  ====================================================

    Two scenes, of one object and of two:

    >>> nan = float("nan")
    >>> present = torch.tensor([[True, False], [True, True]])
    >>> where = torch.tensor([[[10.0, 20.0], [nan, nan]], [[5.0, 5.0], [8.0, 1.0]]])
    >>> scenes = Scene(present, where, torch.cat([where, torch.full_like(where, 4.0)], -1))
    >>> scenes.counts.tolist()
    [1, 2]
    >>> scenes.to_json()[0]
    {'count': 1, 'objects': [{'x': 10.0, 'y': 20.0, 'box': [10.0, 20.0, 4.0, 4.0]}]}
    """

    present: Tensor
    where: Tensor
    boxes: Tensor
    kind: Tensor | None = None
    what: Tensor | None = None
    size: tuple[int, int] | None = None
    pose: Tensor | None = None

    def __len__(self) -> int:
        return len(self.present)

    def __getitem__(self, index: slice | Tensor) -> Scene:
        """Some of the scenes.

        :param index: a slice, or a tensor (K,) of numbers, or (B,) of bool.
        """
        if self.present[index].dim() != 2:
            raise TypeError("one scene is a batch of one: scenes[i : i + 1]")
        return self.each(lambda values: values[index])

    @property
    def counts(self) -> Tensor:
        """Objects in each scene, (B,) long."""
        return self.present.sum(-1)

    def to_json(self) -> list[dict]:
        """One dictionary a scene: its count and its objects, in numbers that JSON can hold."""
        return [
            {
                "count": int(self.present[b].sum()),
                "objects": [self._object(b, m) for m in self.present[b].nonzero().flatten()],
            }
            for b in range(len(self))
        ]

    def _object(self, b: int, m: Tensor) -> dict:
        x, y = self.where[b, m].tolist()
        entry = {"x": x, "y": y, "box": self.boxes[b, m].tolist()}
        if self.pose is not None:
            entry |= zip(POSE, self.pose[b, m].tolist(), strict=True)
        if self.kind is not None:
            entry["kind"] = int(self.kind[b, m])
        if self.what is not None:
            entry["what"] = self.what[b, m].tolist()
        return entry

    @staticmethod
    def from_json(
        scenes: Any, *, appearance: int = 0, classes: int = 0, pose: Sequence[float] | None = None
    ) -> Scene:
        """What `to_json` wrote, perhaps changed, or written by hand; boxes are NaN.

        An object needs ``x`` and ``y``, a ``kind`` where there are categories, and where there are
        none its ``what``, which is 0 where an object of a category has none. ``box`` and ``count``
        are not read.

        :param appearance: L, 0 if nothing is known of it. :param classes: K, 0 if there are none.
        :param pose: what is not said of a pose, see POSE; None for objects without.
        :raises UserError: which says of which object what is wrong.

        >>> Scene.from_json([{"objects": [{"x": 3, "y": 4, "kind": 1}]}], classes=2).kind.tolist()
        [[1]]
        """
        if not isinstance(scenes, list) or not scenes:
            raise UserError("scenes are a list of at least one")
        rows = []
        for b, entry in enumerate(scenes, 1):
            objects = entry.get("objects") if isinstance(entry, dict) else None
            if not isinstance(objects, list) or len(objects) > MOST:
                raise UserError(
                    f"scene {b} is no dictionary with a list of objects, {MOST} at most"
                )
            rows.append([
                _parsed(f"object {m} of scene {b}", object, appearance, classes, pose)
                for m, object in enumerate(objects, 1)
            ])
        slots = max(1, *map(len, rows))
        limits.check("the scenes", len(rows) * slots * (appearance + 12) * limits.OBJECTS)

        def column(name: str, fill: Any) -> Tensor:
            return torch.tensor([
                [row[m][name] if m < len(row) else fill for m in range(slots)] for row in rows
            ])

        nan = math.nan
        return Scene(
            column("present", False), column("where", [nan] * 2), column("boxes", [nan] * 4),
            kind=column("kind", -1) if classes else None,
            what=column("what", [0.0] * appearance) if appearance else None,
            pose=None if pose is None else column("pose", [nan] * len(POSE)),
        )

    def to(self, device: torch.device | str) -> Scene:
        """The same scenes on another device."""
        return self.each(lambda values: values.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Scene:
        """With each tensor changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict = {k: change(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    @staticmethod
    def concatenate(scenes: list[Scene]) -> Scene:
        """Join batches of scenes, padding the slots to the largest M."""
        slots = max(s.present.shape[1] for s in scenes)

        def join(name: str, fill) -> Tensor | None:
            parts = [getattr(s, name) for s in scenes]
            if any(p is None for p in parts):
                return None
            return torch.cat([_pad(p, slots, fill) for p in parts])

        nan = float("nan")
        present = join("present", False)
        where, boxes = join("where", nan), join("boxes", nan)
        assert present is not None and where is not None and boxes is not None
        kind, what, pose = join("kind", -1), join("what", 0.0), join("pose", nan)
        return Scene(present, where, boxes, kind, what, scenes[0].size, pose)


def _parsed(
    who: str, entry: Any, appearance: int, classes: int, pose: Sequence[float] | None
) -> dict[str, Any]:
    """An object's values by field. :raises UserError: see `Scene.from_json`."""
    known = {"kind": classes > 0, "what": appearance > 0}
    own = ["x", "y", *(POSE if pose else ()), *(name for name in known if known[name])]
    if not isinstance(entry, Mapping):
        raise UserError(f"{who} is no dictionary")
    for name in entry:
        if name not in ("box", *own):
            raise UserError(f"{who} has {name!r:.40}: objects of this model have {', '.join(own)}")
    for name in own:
        usual_is_known = name in POSE or (name == "what" and classes > 0)
        if name not in entry and not usual_is_known:
            raise UserError(f"{who} has no {name}")

    def number(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= FARTHEST:
            raise UserError(f"{who} has {name} {value!r:.40}: give a number up to {FARTHEST:g}")
        return float(value)

    found: dict[str, Any] = {
        "present": True, "where": [number(name, entry[name]) for name in "xy"],
        "boxes": [math.nan] * 4,
    }
    if pose:
        usual = dict(zip(POSE, pose, strict=True))
        found["pose"] = [number(name, entry.get(name, usual[name])) for name in POSE]
        if min(found["pose"][:2]) <= 0:
            raise UserError(f"{who} has a scale of {min(found['pose'][:2]):g}: scales are above 0")
    if classes:
        found["kind"] = kind = entry["kind"]
        if type(kind) is not int or not 0 <= kind < classes:
            raise UserError(f"{who} has kind {kind!r:.40}: categories are 0 to {classes - 1}")
    if appearance:
        what = entry.get("what", [0.0] * appearance)
        if not isinstance(what, list) or len(what) != appearance:
            raise UserError(f"{who} has what {what!r:.40}: give a list of {appearance} numbers")
        found["what"] = [number("what", value) for value in what]
    return found


def _pad(values: Tensor, slots: int, fill) -> Tensor:
    """Pad dimension 1 to ``slots`` with ``fill``."""
    missing = slots - values.shape[1]
    padding = values.new_full((values.shape[0], missing, *values.shape[2:]), fill)
    return torch.cat([values, padding], 1)
