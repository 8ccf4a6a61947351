"""Scenes: counts, JSON, joining batches of different numbers of slots."""

import json
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from pyro_scenes.errors import UserError
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


# --- scenes from JSON ----------------------------------------------------------------------------


def test_scenes_in_json_are_read_as_they_were_written() -> None:
    for kind in (True, False):
        written = scene(kind=kind)
        content = json.loads(json.dumps(written.to_json()))
        read = Scene.from_json(content, appearance=2, classes=5 * kind)
        assert read.counts.tolist() == [2, 0] and read.pose is None
        for mine, theirs in ((read.where, written.where), (read.what, written.what),
                             (read.kind, written.kind)):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:  # objects come one after the other now
                assert torch.equal(mine[0], theirs[0, [0, 2]])
        assert read.boxes.isnan().all() and read.where[1].isnan().all()


def test_scenes_by_hand_have_what_is_usual_where_they_say_nothing() -> None:
    usual = [0.5, 0.25, 0.1, 0.0, 0.0]
    content = [{"objects": [{"x": 1, "y": 2.5, "kind": 3, "angle": -1}]}, {"objects": []}]
    read = Scene.from_json(content, appearance=2, classes=4, pose=usual)
    assert read.present.tolist() == [[True], [False]]
    assert read.where[0].tolist() == [[1.0, 2.5]] and read.where[1].isnan().all()
    assert read.kind is not None and read.kind.tolist() == [[3], [-1]]
    assert read.what is not None and read.what.tolist() == [[[0.0, 0.0]], [[0.0, 0.0]]]
    assert read.pose is not None and read.pose[1].isnan().all()
    assert torch.equal(read.pose[0, 0], torch.tensor([0.5, 0.25, -1.0, 0.0, 0.0]))


HERE = {"x": 1, "y": 2, "kind": 0}


@pytest.mark.parametrize("content, said", [
    ({}, "a list"), ([], "a list"), ([[]], "scene 1 is no dictionary"),
    ([{"objects": []}, {"count": 1}], "scene 2 is no dictionary with a list of objects"),
    ([{"objects": [HERE] * 256}], "255 at most"), ([{"objects": [3]}], "object 1 of scene 1 is no"),
    ([{"objects": [HERE, {"x": 1, "kind": 0}]}], "object 2 of scene 1 has no y"),
    ([{"objects": [{"x": 1, "y": 2}]}], "has no kind"),
    *[([{"objects": [HERE | {"x": x}]}], "has x") for x in (NAN, 1e5, 10**400, True, "1", None)],
    *[([{"objects": [HERE | {"kind": k}]}], "categories are 0 to 1") for k in (2, -1, 0.0, True)],
    *[([{"objects": [HERE | {"what": w}]}], "2 numbers") for w in ([1.0], 1.0, None)],
    ([{"objects": [HERE | {"what": [0, NAN]}]}], "has what nan"),
    ([{"objects": [HERE | {"scale_y": 0}]}], "scales are above 0"),
    ([{"objects": [HERE | {"scale": 1}]}], "'scale': objects of this model have x, y, scale_x"),
])
def test_scenes_that_are_none_are_refused(content: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Scene.from_json(content, appearance=2, classes=2, pose=[1.0, 1.0, 0.0, 0.0, 0.0])


def test_what_the_model_does_not_know_or_needs_is_said() -> None:
    for entry, said in ((HERE, "'kind'"), ({"x": 1, "y": 2, "angle": 0.0}, "'angle'"),
                        ({"x": 1, "y": 2}, "has no what")):
        with pytest.raises(UserError, match=said):
            Scene.from_json([{"objects": [entry]}], appearance=2)


def test_scenes_that_would_take_too_much_memory_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("PYRO_SCENES_MEMORY", "0.001")
    content: list[dict] = [{"objects": []}] * 99 + [{"objects": [HERE] * 200}]
    with pytest.raises(UserError, match="the scenes claims"):
        Scene.from_json(content, classes=1)
    Scene.from_json(content[:99], classes=1)
