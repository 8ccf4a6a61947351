"""What a model finds in images: objects, scene graphs, and the order in which they are drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import networkx as nx
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_scenes import graph, plots
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.pictures.common import IMAGES, pick, rich, scenes_in

TABLED = 4  # images in a picture of tables
READABLE = 3  # attributes that have a column in a table, at most
Columns = dict[str, Callable[[dict], str]]  # heading -> how a node or edge is written
# Clockwise from the right, an eighth of a turn each.
ARROWS = "\u2192\u2198\u2193\u2199\u2190\u2196\u2191\u2197"


@torch.no_grad()
def inference(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """Input, reconstruction, inferred locations and sprites of the first IMAGES images.

    LAVAE's figures 1 and 5; Discrete-AIR's figure 3. Of a model without objects, the first two.
    """
    images = images[:IMAGES]
    if not isinstance(model, SceneModel):
        seen = images.to(model.device)
        return plots.inference_figure(images, model.reconstruct(seen))
    model, scene = scenes_in(model, images, limit)
    return plots.inference_figure(images, model.render(scene), scene, sprites=model.sprites(scene))


@torch.no_grad()
def tables(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """Input, reconstruction, and the scene graph's nodes and edges, of TABLED images.

    Discrete-AIR's figures 3, 4 and 5. Places are in pixels, scales in parts of the image, angles in
    degrees; of an edge and its reverse the first is shown, see graph.py for what its numbers are.
    """
    model, scenes = scenes_in(model, images, limit)
    chosen = rich(scenes, TABLED)
    scene = pick(scenes, chosen)
    found = graph.graphs(scene)
    return plots.tables_figure(
        images[chosen.cpu()], model.render(scene), scene, _nodes(found), _edges(found)
    )


@torch.no_grad()
def steps(model: GenerativeModel, images: Tensor, limit: float | None = None) -> Figure:
    """Input, then the reconstruction from the first object, from the first two, and so on.

    Discrete-AIR's figures 8 and 9, of IMAGES images.
    """
    model, scenes = scenes_in(model, images, limit)
    chosen = rich(scenes, IMAGES)
    scene = pick(scenes, chosen)
    order = scene.present.cumsum(1)
    rows, labels = [images[chosen.cpu()].cpu()], ["input"]
    for step in range(1, max(1, int(scene.counts.max())) + 1):
        drawn = model.render(replace(scene, present=scene.present & (order <= step)))
        rows.append(drawn.cpu())
        labels.append("1 object" if step == 1 else f"{step} objects")
    return plots.traversal_figure(torch.stack(rows), labels)


def _nodes(found: list[nx.DiGraph]) -> list[plots.Table]:
    """A row for each object, numbered as in the graph."""
    nodes = [node for graph in found for _, node in graph.nodes(data=True)]
    columns = _node_columns(nodes)
    return [
        plots.Table(
            ("", *columns),
            [(str(i), *(write(node) for write in columns.values()))
             for i, node in graph.nodes(data=True)],
        )
        for graph in found
    ]


def _node_columns(nodes: list[dict]) -> Columns:
    """What is worth a column for these nodes, by its heading."""
    has = set(nodes[0]) if nodes else set()
    columns: Columns = {}
    if "kind" in has:
        columns["category"] = lambda node: str(node["kind"])
    if f"what_{READABLE}" not in has:
        columns |= {f"attribute {i}": _number(f"what_{i}", 2)
                    for i in range(READABLE) if f"what_{i}" in has}
    columns |= {"x (px)": _number("x", 1), "y (px)": _number("y", 1)}
    if "scale_x" not in has:
        return columns | {
            "width (px)": _number("box_width", 0), "height (px)": _number("box_height", 0)}
    if all(node["scale_x"] == node["scale_y"] for node in nodes):
        columns["scale"] = _number("scale_x", 2)
    else:
        columns |= {"scale x": _number("scale_x", 2), "scale y": _number("scale_y", 2)}
    if any(node["angle"] for node in nodes):
        columns["angle"] = lambda node: _degrees(node["angle"])
    return columns


def _edges(found: list[nx.DiGraph]) -> list[plots.Table]:
    """A row for each pair of objects, the one with the lower number first."""
    edges = [edge for graph in found for *_, edge in graph.edges(data=True)]
    columns = _edge_columns(edges)
    return [
        plots.Table(
            ("", *columns),
            [(f"{i} \u2192 {j}", *(write(edge) for write in columns.values()))
             for i, j, edge in graph.edges(data=True) if i < j],
        )
        for graph in found
    ]


def _edge_columns(edges: list[dict]) -> Columns:
    has = set(edges[0]) if edges else set()
    columns: Columns = {
        "dx (px)": _number("dx", 1), "dy (px)": _number("dy", 1),
        "direction": lambda edge: f"{_arrow(edge['direction'])} {_degrees(edge['direction'])}",
    }
    if "same_kind" in has:
        columns["same category"] = lambda edge: "yes" if edge["same_kind"] else "no"
    if "what_distance" in has:
        what = "attribute" if "same_kind" in has else "appearance"
        columns[f"{what} distance"] = _number("what_distance", 2)
    return columns


def _number(name: str, digits: int) -> Callable[[dict], str]:
    # What rounds to -0 is written as 0.
    return lambda features: f"{round(features[name], digits) + 0.0:.{digits}f}"


def _degrees(angle: float) -> str:
    """Radians as degrees from -180 to 180."""
    return f"{round(math.degrees(math.remainder(angle, math.tau)))}\u00b0"


def _arrow(direction: float) -> str:
    return ARROWS[round(direction / (math.pi / 4)) % 8]
