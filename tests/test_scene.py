"""Scenes: counts, JSON, joining batches of different numbers of slots."""

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from pyro_scenes.scene import Scene

NAN = float("nan")


def scene(kind: bool = True, what: bool = True) -> Scene:
    """Two images: objects in slots 0 and 2 of the first, none in the second."""
    present = torch.tensor([[True, False, True], [False, False, False]])
    where = torch.full((2, 3, 2), NAN)
    where[0, 0], where[0, 2] = torch.tensor([1.5, 2.5]), torch.tensor([10.0, 0.1])
    boxes = torch.full((2, 3, 4), NAN)
    boxes[0, 0] = torch.tensor([1.5, 2.0, 3.0, 4.0])
    boxes[0, 2] = torch.tensor([10.0, 0.5, 2.0, 1.0])
    kinds = torch.tensor([[4, -1, 0], [-1, -1, -1]])
    appearances = torch.zeros(2, 3, 2)
    appearances[0, 0], appearances[0, 2] = torch.tensor([0.25, -1.0]), torch.tensor([0.1, 3.0])
    return Scene(present, where, boxes, kinds if kind else None, appearances if what else None,
                 (6, 12))


def equal(one: Scene, two: Scene) -> bool:
    for f in fields(Scene):
        a, b = getattr(one, f.name), getattr(two, f.name)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if a.dtype != b.dtype or not torch.equal(a.nan_to_num(-7), b.nan_to_num(-7)):
                return False
        elif a != b:
            return False
    return True


def test_counts_and_length() -> None:
    assert scene().counts.tolist() == [2, 0] and len(scene()) == 2


def test_some_scenes_are_picked_by_a_slice_or_a_tensor() -> None:
    present = torch.tensor([[True, False], [True, True], [False, False]])
    scenes = Scene(present, torch.rand(3, 2, 2), torch.rand(3, 2, 4), kind=torch.ones(3, 2).long(),
                   size=(8, 9))
    for index in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True])):
        some = scenes[index]
        assert some.counts.tolist() == [2, 0] and some.size == (8, 9) and some.what is None
        assert torch.equal(some.where, scenes.where[1:]) and torch.equal(some.kind, scenes.kind[1:])
    one: Any
    for one in (0, np.int64(0), torch.tensor(0)):
        with pytest.raises(TypeError, match="batch of one"):
            scenes[one]


def test_json_has_the_objects_that_are_there_and_round_trips() -> None:
    content = scene().to_json()
    # allow_nan=False: NaN is no JSON, and no reader outside Python takes it.
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    f32 = torch.tensor(0.1).item()  # what float32 makes of 0.1, to the bit
    assert content == [
        {"count": 2, "objects": [
            {"x": 1.5, "y": 2.5, "box": [1.5, 2.0, 3.0, 4.0], "kind": 4, "what": [0.25, -1.0]},
            {"x": 10.0, "y": f32, "box": [10.0, 0.5, 2.0, 1.0], "kind": 0, "what": [f32, 3.0]},
        ]},
        {"count": 0, "objects": []},
    ]


def test_json_leaves_out_what_the_model_does_not_have() -> None:
    first = scene(kind=False, what=False).to_json()[0]["objects"][0]
    assert first.keys() == {"x", "y", "box"}


def test_joining_pads_with_absent_slots() -> None:
    few = Scene(torch.tensor([[True]]), torch.tensor([[[3.0, 4.0]]]), torch.ones(1, 1, 4),
                torch.tensor([[2]]), torch.ones(1, 1, 2), (6, 12))
    joined = Scene.concatenate([few, scene()])
    assert joined.counts.tolist() == [1, 2, 0] and joined.size == (6, 12)
    assert joined.present[0].tolist() == [True, False, False]
    assert joined.where[0, 0].tolist() == [3.0, 4.0]
    assert joined.where[0, 1:].isnan().all() and joined.boxes[0, 1:].isnan().all()
    assert joined.kind[0].tolist() == [2, -1, -1]
    assert joined.what[0].tolist() == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
    parts: dict[str, Any] = {f.name: getattr(joined, f.name)[1:] for f in fields(Scene)[:5]}
    after = Scene(**parts, size=joined.size)
    assert equal(after, scene())
    assert joined.to_json() == few.to_json() + scene().to_json()


def test_joining_batches_without_any_slot() -> None:
    empty = Scene(torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, 2), torch.zeros(2, 0, 4))
    assert Scene.concatenate([empty, empty]).counts.tolist() == [0] * 4
    assert Scene.concatenate([empty, empty]).kind is None


def test_moving_keeps_everything() -> None:
    assert equal(scene().to("cpu"), scene())
    moved = scene(kind=False).to("meta")
    assert {getattr(moved, name).device.type for name in ("present", "where", "boxes", "what")} == {
        "meta"}
    assert moved.kind is None and moved.size == (6, 12)


def test_a_scene_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        setattr(scene(), "kind", None)
