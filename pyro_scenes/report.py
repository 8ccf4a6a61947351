"""What the commands write and print: tables, JSON, and the figures at the end of a training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pyro_scenes import checkpoint, graph, pictures, plots
from pyro_scenes.config import RunConfig
from pyro_scenes.data import DATASETS, SceneData, load, load_npz, load_pngs, split_held_out
from pyro_scenes.data.files import atomic_write, write_json
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import CROWDED, evaluate
from pyro_scenes.models import GenerativeModel
from pyro_scenes.scene import Scene

# Held-out images and particles after a training: enough to see that it worked, in a short time.
IMAGES, PARTICLES = 1000, 10


def claim(
    files: Iterable[Path | None], figures: Iterable[Path | None], force: bool
) -> None:
    """Check outputs before any work is done for them, and make their folders.

    Raises:
        UserError: one exists and may not be overwritten, or is named twice, or is a figure of an
            unknown format.
    """
    drawn = [path for path in figures if path]
    paths = [path for path in files if path] + drawn
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise UserError(f"{path} exists: give another name, or --force to overwrite a file")
        if paths.count(path) > 1:
            raise UserError(f"{path} is named for two outputs: give each its own")
        if path in drawn and path.suffix.lower() not in plots.FORMATS:
            raise UserError(f"{path} is to be a figure: end its name in {', '.join(plots.FORMATS)}")
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)


def read_images(model: GenerativeModel, paths: Sequence[Path]) -> SceneData:
    """Images for a model, from an npz file or from PNG files and folders of them.

    Raises:
        UserError: unreadable files, or images that the model does not take.
    """
    if len(paths) == 1 and paths[0].suffix == ".npz":
        data = load_npz(paths[0])
    else:
        data = SceneData.from_images("images", load_pngs(paths, model.image_shape[0]))
    model.check(data.batch(slice(0, 1)))
    return data


def write_objects(out: Path, scene: Scene, form: str | None) -> None:
    """Inferred objects as JSON; with a form, their graphs: json, or graphml, a folder of files."""
    if form == "graphml":
        out.mkdir(exist_ok=True)
        documents = graph.to_graphml(scene)
        digits = len(str(len(documents)))
        for i, document in enumerate(documents):
            with atomic_write(out / f"{i:0{digits}}.graphml") as file:
                file.write(document.encode())
    else:
        write_json(out, graph.to_json(scene) if form else scene.to_json())


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures of `evaluate`, a row a data set; a dash where one does not apply."""
    rows = [(
        "", "images", "count right", "-log p(x) <= (nats)", "categories right", "classes",
        "right in place", "purity", "ARI",
    )]
    for name, row in figures.items():
        nll = _number(row["nll"], "{:.2f}")
        if row["nll_stderr"] is not None:
            nll += f" +- {row['nll_stderr']:.2f}"
        rows.append((
            name, f"{row['images']:,}", _number(row["count_accuracy"], "{:.2%}"), nll,
            _number(row["category_correspondence"], "{:.2%}"), _number(row["classes"], "{}"),
            _number(row["placed_correspondence"], "{:.2%}"), _number(row["purity"], "{:.2%}"),
            _number(row["ari"], "{:.3f}"),
        ))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )


def insert(page: Path, command: str, text: str) -> None:
    """Put what a command measured between its two marks in a page.

    Raises:
        UserError: the page lacks the marks.
    """
    begin, end = f"<!-- {command} --readme -->\n", f"\n<!-- end of {command} -->"
    content = page.read_text() if page.is_file() else ""
    if begin not in content or end not in content:
        raise UserError(f"{page} has no lines {begin.strip()} and {end.strip()}")
    before, _, rest = content.partition(begin)
    with atomic_write(page) as file:
        file.write((before + begin + text + end + rest.partition(end)[2]).encode())


def finish(config: RunConfig, out: Path, device: str, mnist: Path | None) -> str:
    """Measure a trained run on held-out scenes and draw some into its folder.

    Returns:
        A table and the place of the picture, to print.
    """
    model = checkpoint.load(out, device).model
    if config.data in DATASETS:
        spec = DATASETS[config.data]
        sets = {
            f"{low}-{high} objects" if low < high else f"{low} objects":
                load(config.data, images=IMAGES, objects=(low, high), mnist=mnist)
            for low, high in (spec.objects, CROWDED)
        }
    else:
        sets = {"held out": split_held_out(load(config.data))[1][:IMAGES]}
    # No limit on objects: a run that was stopped early may see them everywhere.
    figures = {
        name: evaluate(model, data, particles=PARTICLES, limit=math.inf)
        for name, data in sets.items()
    }
    images = next(iter(sets.values())).batch(slice(0, pictures.IMAGES))
    plots.save(pictures.inference(model, images, math.inf), out / "inference.png")
    return (f"{config.data}, held-out scenes, {PARTICLES} particles:\n{table(figures)}\n"
            f"Picture: {out / 'inference.png'}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
