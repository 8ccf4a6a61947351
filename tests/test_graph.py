"""Scene graphs against hand-worked values, and their way through JSON, GraphML and tensors."""

import json
import math
from dataclasses import replace

import networkx as nx
import pytest
import torch

from pyro_scenes import graph
from pyro_scenes.errors import UserError
from pyro_scenes.scene import Scene

NAN = math.nan


def scene(kind: bool = True, what: bool = True, pose: bool = True) -> Scene:
    """Objects in slots 0, 2 and 3 of the first image, in slot 1 of the second, none in the third.
    """
    present = torch.tensor(
        [[True, False, True, True], [False, True, False, False], [False] * 4]
    )
    where, boxes = torch.full((3, 4, 2), NAN), torch.full((3, 4, 4), NAN)
    poses, whats = torch.full((3, 4, 5), NAN), torch.zeros(3, 4, 2)
    where[0, 0], where[0, 2] = torch.tensor([10.0, 20.0]), torch.tensor([13.0, 16.0])
    where[0, 3], where[1, 1] = torch.tensor([10.0, 30.0]), torch.tensor([1.0, 2.0])
    boxes[present] = torch.cat([where[present], torch.tensor([[4.0, 6.0]]).expand(4, 2)], 1)
    poses[present] = torch.tensor([
        [1.0, 1.0, 3.0, 0.0, 0.0], [0.5, 0.25, -3.0, 0.1, -0.1], [1.0, 2.0, 0.5, 0.0, 0.0],
        [1.0, 1.0, 0.0, 0.0, 0.0],
    ])
    whats[present] = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [5.0, 5.0]])
    kinds = torch.full((3, 4), -1)
    kinds[present] = torch.tensor([2, 0, 2, 1])
    return Scene(present, where, boxes, kinds if kind else None, whats if what else None,
                 (64, 64), poses if pose else None)


def test_nodes_and_edges_by_hand() -> None:
    first, second, third = graph.graphs(scene())
    assert [len(g) for g in (first, second, third)] == [3, 1, 0]
    assert [g.number_of_edges() for g in (first, second, third)] == [6, 0, 0]
    assert first.nodes[1] == pytest.approx({
        "x": 13.0, "y": 16.0, "box_x": 13.0, "box_y": 16.0, "box_width": 4.0, "box_height": 6.0,
        "scale_x": 0.5, "scale_y": 0.25, "angle": -3.0, "shear_x": 0.1, "shear_y": -0.1,
        "what_0": 3.0, "what_1": 4.0, "kind": 0,
    })
    assert isinstance(first.nodes[1]["kind"], int)
    assert first.edges[0, 1] == pytest.approx({
        "dx": -3.0, "dy": 4.0, "distance": 5.0,
        "direction": math.atan2(-4.0, 3.0),  # up and to the right
        "d_scale_x": 0.5, "d_scale_y": 0.75, "d_angle": 6.0 - 2 * math.pi,
        "d_shear_x": -0.1, "d_shear_y": 0.1,
        "what_distance": 5.0, "same_kind": False,
    })
    # The third object lies straight below the first, and is of its category.
    assert first.edges[0, 2]["direction"] == pytest.approx(math.pi / 2)
    assert first.edges[0, 2]["same_kind"] is True
    back = first.edges[1, 0]
    assert (back["dx"], back["dy"], back["distance"]) == (3.0, -4.0, 5.0)


def test_what_a_model_does_not_have_is_left_out() -> None:
    bare = graph.graphs(scene(kind=False, what=False, pose=False))[0]
    assert set(bare.nodes[0]) == {"x", "y", "box_x", "box_y", "box_width", "box_height"}
    assert set(bare.edges[0, 1]) == {"dx", "dy", "distance", "direction"}


def test_a_distance_between_attributes_of_ones_own() -> None:
    def city_block(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one - other).abs().sum(-1)

    scenes = scene()
    for first in (graph.graphs(scenes, what_distance=city_block)[0],
                  nx.node_link_graph(graph.to_json(scenes, None, city_block)[0], edges="edges"),
                  nx.parse_graphml(graph.to_graphml(scenes, None, city_block)[0], node_type=int)):
        assert first.edges[0, 1]["what_distance"] == first.edges[1, 0]["what_distance"] == 7.0
        assert first.edges[0, 2]["what_distance"] == 1.0
    with pytest.raises(UserError, match="a number for each pair"):
        graph.tensors(scenes, what_distance=lambda one, other: one - other)


def test_a_distance_between_categories_of_ones_own() -> None:
    table = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    first = graph.graphs(scene(), table)[0]
    assert first.edges[0, 1]["kind_distance"] == 6.0  # from category 2 to 0
    assert first.edges[1, 0]["kind_distance"] == 2.0
    assert "same_kind" not in first.edges[0, 1]
    plain = graph.tensors(scene(), table).edge_attr
    for given in (table.double(), table.long()):
        found = graph.tensors(scene(), given).edge_attr
        assert found.dtype == plain.dtype and torch.equal(found, plain)
    for wrong in (table[:2, :2], table[:2], table[0]):
        with pytest.raises(UserError, match="square of at least 3 rows"):
            graph.graphs(scene(), wrong)
    with pytest.raises(UserError, match="no categories"):
        graph.graphs(scene(kind=False), table)


def test_json_round_trip() -> None:
    graphs = graph.graphs(scene())
    text = json.dumps(graph.to_json(scene()), allow_nan=False)
    read = [nx.node_link_graph(entry) for entry in json.loads(text)]
    for ours, theirs in zip(graphs, read, strict=True):
        assert theirs.is_directed() and not theirs.is_multigraph()
        assert nx.utils.graphs_equal(ours, theirs)


def test_graphml_round_trip() -> None:
    for ours, text in zip(graph.graphs(scene()), graph.to_graphml(scene()), strict=True):
        theirs = nx.parse_graphml(text, node_type=int)
        assert theirs.is_directed() and theirs.adj == ours.adj
        assert dict(theirs.nodes.data()) == dict(ours.nodes.data())


def test_tensors_hold_what_the_graphs_hold() -> None:
    padded = graph.tensors(scene())
    assert padded.nodes.shape == (3, 4, 14) and padded.edge_attr.shape == (3, 12, 11)
    assert padded.node_mask.sum(1).tolist() == [3, 1, 0]
    assert padded.edge_mask.sum(1).tolist() == [6, 0, 0]
    assert not padded.nodes[~padded.node_mask].any()
    assert not padded.edge_attr[~padded.edge_mask].any()
    assert padded.nodes.isfinite().all() and padded.edge_attr.isfinite().all()
    pairs = {tuple(pair) for pair in padded.edge_index.T.tolist()}
    assert pairs == {(i, j) for i in range(4) for j in range(4) if i != j}
    first, number = graph.graphs(scene())[0], {0: 0, 2: 1, 3: 2}
    for e, pair in enumerate(padded.edge_index.T.tolist()):
        if padded.edge_mask[0, e]:
            edge = first.edges[tuple(number[slot] for slot in pair)]
            assert padded.edge_attr[0, e].tolist() == pytest.approx(
                [float(edge[name]) for name in padded.edge_names])


def test_an_equal_appearance_has_a_gradient() -> None:
    """The distance of two equal attributes is 0, its slope not NaN."""
    equal = scene()
    what = torch.zeros(3, 4, 2, requires_grad=True)
    padded = graph.tensors(Scene(equal.present, equal.where, equal.boxes, what=what))
    padded.edge_attr.sum().backward()
    assert what.grad.isfinite().all()


def test_places_have_gradients_whoever_is_absent_or_in_the_same_place() -> None:
    """Of the distance and the direction by hand: (3, -4) / 5 and (4, 3) / 25."""
    present = torch.tensor([[True, True, True, False]])
    where = torch.tensor([[[10.0, 20.0], [13.0, 16.0], [10.0, 20.0], [NAN, NAN]]])
    where.requires_grad_()
    boxes = torch.cat([where.detach(), torch.ones(1, 4, 2)], -1)
    padded = graph.tensors(Scene(present, where, boxes))
    edge = [tuple(pair) for pair in padded.edge_index.T.tolist()].index((0, 1))
    for name, expected in (("distance", [-0.6, 0.8]), ("direction", [-0.16, -0.12])):
        column = padded.edge_names.index(name)
        slope, = torch.autograd.grad(padded.edge_attr[0, edge, column], where, retain_graph=True)
        assert slope[0, 0].tolist() == pytest.approx(expected)
        assert slope[0, 1].tolist() == pytest.approx([-v for v in expected])
        assert not slope[0, 2:].any()
    padded.edge_attr.sum().backward()
    assert where.grad is not None and where.grad.isfinite().all()


def test_scenes_without_slots() -> None:
    empty = Scene(torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, 2), torch.zeros(2, 0, 4))
    assert [len(g) for g in graph.graphs(empty)] == [0, 0]
    padded = graph.tensors(empty)
    assert padded.nodes.shape == (2, 0, 6) and padded.edge_index.shape == (2, 0)
    empty = replace(empty, kind=torch.zeros(2, 0, dtype=torch.long))
    assert graph.tensors(empty, torch.zeros(1, 1)).edge_names[-1] == "kind_distance"
