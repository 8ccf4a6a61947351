"""Scene graphs: objects as nodes, what lies between them as directed edges.

Discrete-AIR, section 2.4 and appendix C.3; distances are of the centres alone, in pixels. An
edge (i, j) embeds z_where^i - z_where^j with the direction in which j lies from i, the L2 distance
of the attributes, and whether the categories are equal; the user may give other distances of
attributes, and a distance between categories. Every number has a name, the same in the networkx
graph, in JSON and GraphML, and in the tensors.

Nodes: ``x``, ``y`` (centre) and ``box_x``, ``box_y``, ``box_width``, ``box_height`` in pixels;
``scale_x``, ``scale_y``, ``angle`` (radians), ``shear_x``, ``shear_y`` where the model has a pose;
``what_0``, ``what_1``, ... the attributes or appearance; ``kind``, the category.

Edges: ``dx``, ``dy`` (pixels, source less target), ``distance`` (pixels), ``direction`` (radians
from the x axis, clockwise as displayed, in which the target lies from the source);
``d_scale_x`` and so on for the pose, angles within -pi and pi; ``what_distance``;
``same_kind`` (0 or 1) or ``kind_distance``.

Two objects, of which the second lies to the right of the first:

>>> where = torch.tensor([[[10.0, 20.0], [13.0, 20.0]]])
>>> boxes = torch.cat([where, torch.full_like(where, 4.0)], -1)
>>> scene = Scene(torch.tensor([[True, True]]), where, boxes, kind=torch.tensor([[2, 2]]))
>>> graph = graphs(scene)[0]
>>> graph.nodes[0]["x"], graph.nodes[1]["kind"]
(10.0, 2)
>>> graph.edges[0, 1]["dx"], graph.edges[0, 1]["distance"], graph.edges[0, 1]["same_kind"]
(-3.0, 3.0, True)
>>> tensors(scene).edge_attr.shape
torch.Size([1, 2, 5])
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

from pyro_scenes.errors import UserError
from pyro_scenes.scene import POSE, Scene

BOX = ("box_x", "box_y", "box_width", "box_height")
WHOLE = {"kind": int, "same_kind": bool}  # what is not a float in a networkx graph
Distance = Callable[[Tensor, Tensor], Tensor]


def euclidean(one: Tensor, other: Tensor) -> Tensor:
    """L2, (..., L) and (..., L) -> (...)."""
    return torch.linalg.vector_norm(one - other, dim=-1)


@dataclass(frozen=True)
class GraphTensors:
    """The graphs of B scenes, padded to M nodes; 0 where there is no node or edge.

    ==========  ==============  ===================================================
    field       shape           meaning
    ==========  ==============  ===================================================
    nodes       (B, M, F)       features of the nodes, in the order of node_names
    node_mask   (B, M) bool     the slot holds an object
    edge_index  (2, E) long     source and target slot, the same for all scenes
    edge_attr   (B, E, G)       features of the edges, in the order of edge_names
    edge_mask   (B, E) bool     both ends hold an object
    ==========  ==============  ===================================================

    E = M (M - 1). The category is one column, ``kind``: one-hot it as the network needs.
    """

    nodes: Tensor
    node_mask: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    edge_mask: Tensor
    node_names: tuple[str, ...]
    edge_names: tuple[str, ...]


def tensors(
    scene: Scene, kind_distance: Tensor | None = None, what_distance: Distance = euclidean
) -> GraphTensors:
    """:param kind_distance: (K, K), replaces the equality of categories.
    :param what_distance: of attributes, (..., L) and (..., L) -> (...); they may broadcast.
    :raises UserError: if the distances do not cover the categories, or there are none, or those of
        attributes are not a number for each pair.
    """
    slots = scene.present.shape[1]
    nodes, edges = _nodes(scene), _edges(scene, kind_distance, what_distance)
    others = ~torch.eye(slots, dtype=torch.bool, device=scene.present.device)
    source, target = others.nonzero(as_tuple=True)
    edge_mask = (scene.present[:, :, None] & scene.present[:, None, :])[:, source, target]
    edge_attr = torch.stack(list(edges.values()), -1)[:, source, target]
    return GraphTensors(
        torch.where(scene.present[..., None], torch.stack(list(nodes.values()), -1), 0.0),
        scene.present,
        torch.stack([source, target]),
        torch.where(edge_mask[..., None], edge_attr, 0.0),
        edge_mask,
        tuple(nodes),
        tuple(edges),
    )


def graphs(
    scene: Scene, kind_distance: Tensor | None = None, what_distance: Distance = euclidean
) -> list[nx.DiGraph]:
    """One graph a scene, its nodes numbered from 0. Parameters as for `tensors`."""
    padded = tensors(scene.to("cpu"), kind_distance, what_distance)
    result = []
    for b in range(len(scene)):
        graph = nx.DiGraph()
        number: dict[int, int] = {}
        for slot in padded.node_mask[b].nonzero().flatten().tolist():
            number[slot] = len(number)
            graph.add_node(number[slot], **_named(padded.node_names, padded.nodes[b, slot]))
        for e in padded.edge_mask[b].nonzero().flatten().tolist():
            source, target = (number[slot] for slot in padded.edge_index[:, e].tolist())
            graph.add_edge(source, target, **_named(padded.edge_names, padded.edge_attr[b, e]))
        result.append(graph)
    return result


def to_json(
    scene: Scene, kind_distance: Tensor | None = None, what_distance: Distance = euclidean
) -> list[dict]:
    """One node-link object a scene, which ``networkx.node_link_graph`` reads.

    Before networkx 3.6 that has to be told ``edges="edges"``.
    """
    made = graphs(scene, kind_distance, what_distance)
    return [nx.node_link_data(graph, edges="edges") for graph in made]


def to_graphml(
    scene: Scene, kind_distance: Tensor | None = None, what_distance: Distance = euclidean
) -> list[str]:
    """One GraphML document a scene, which ``networkx.parse_graphml`` reads."""
    made = graphs(scene, kind_distance, what_distance)
    return ["\n".join(nx.generate_graphml(graph)) for graph in made]


def _nodes(scene: Scene) -> dict[str, Tensor]:
    """Features of each slot by name, (B, M); anything where absent."""
    features = dict(zip("xy", scene.where.unbind(-1), strict=True))
    features |= zip(BOX, scene.boxes.unbind(-1), strict=True)
    if scene.pose is not None:
        features |= zip(POSE, scene.pose.unbind(-1), strict=True)
    if scene.what is not None:
        features |= {f"what_{i}": value for i, value in enumerate(scene.what.unbind(-1))}
    if scene.kind is not None:
        features["kind"] = scene.kind.to(scene.where.dtype)
    return features


def _edges(
    scene: Scene, kind_distance: Tensor | None, what_distance: Distance
) -> dict[str, Tensor]:
    """Features of each pair of slots by name, (B, M, M), source first; anything where absent."""
    # What is absent is NaN, whose gradient would be that of objects that are there too.
    apart = _differences(scene.where.masked_fill(~scene.present[..., None], 0.0))
    dx, dy = apart.unbind(-1)
    # Between an object and itself, or another in its place, there is no direction, nor a gradient.
    together = (dx == 0) & (dy == 0)
    features = {
        "dx": dx,
        "dy": dy,
        "distance": torch.linalg.vector_norm(apart, dim=-1),
        "direction": torch.atan2(-dy, torch.where(together, torch.ones_like(dx), -dx)),
    }
    if scene.pose is not None:
        for name, value in zip(POSE, _differences(scene.pose).unbind(-1), strict=True):
            if name == "angle":
                value = torch.remainder(value + math.pi, 2 * math.pi) - math.pi
            features[f"d_{name}"] = value
    if scene.what is not None:
        far = what_distance(scene.what[:, :, None], scene.what[:, None])
        if far.shape != dx.shape:
            raise UserError(
                f"a distance between attributes is a number for each pair, of shape"
                f" {tuple(dx.shape)}, not {tuple(far.shape)}"
            )
        features["what_distance"] = far.to(dx)
    if kind_distance is not None:
        features["kind_distance"] = _kind_distance(scene, kind_distance)
    elif scene.kind is not None:
        same = scene.kind[:, :, None] == scene.kind[:, None, :]
        features["same_kind"] = same.to(scene.where.dtype)
    return features


def _kind_distance(scene: Scene, distance: Tensor) -> Tensor:
    if scene.kind is None:
        raise UserError("the scenes have no categories: leave out the distance between them")
    most = int(scene.kind.max()) if scene.kind.numel() else -1
    if distance.dim() != 2 or len(distance) != distance.shape[1] or len(distance) <= most:
        raise UserError(
            f"a distance between categories is a square of at least {most + 1} rows, not of shape"
            f" {tuple(distance.shape)}"
        )
    kind = scene.kind.clamp(min=0)
    return distance.to(scene.where)[kind[:, :, None], kind[:, None, :]]


def _differences(values: Tensor) -> Tensor:
    """(B, M, K) -> (B, M, M, K), row less column."""
    return values[:, :, None] - values[:, None, :]


def _named(names: tuple[str, ...], values: Tensor) -> dict:
    return {
        name: WHOLE.get(name, float)(value)
        for name, value in zip(names, values.tolist(), strict=True)
    }
