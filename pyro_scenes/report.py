"""What the commands write and print: tables, JSON, and the figures at the end of a training."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyro_scenes import checkpoint, graph, pictures, plots
from pyro_scenes.config import RunConfig
from pyro_scenes.data import CROWDED, DATASETS, SceneData, load, load_npz, load_pngs, split_held_out
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.files import atomic_write, new_folder, write_json
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.scene import Scene

# Held-out images and particles after a training: enough to see that it worked, in a short time.
IMAGES, PARTICLES = 1000, 10
CROWDED_LABEL = f"{CROWDED[0]} objects"


def claim(
    files: Iterable[Path | None], figures: Iterable[Path | None], force: bool
) -> None:
    """Check outputs before any work is done for them.

    Raises:
        UserError: one exists and may not be overwritten, or cannot be written, or is named twice,
            or is a figure of an unknown format.
    """
    drawn = [path for path in figures if path]
    paths = [path for path in files if path] + drawn
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if path.exists() and not (force and path.is_file()):
            raise UserError(f"{path} exists: give another name, or --force to overwrite a file")
        if places.count(place) > 1:
            raise UserError(f"{path} is named for two outputs: give each its own")
        if path in drawn and path.suffix.lower() not in plots.FORMATS:
            raise UserError(f"{path} is to be a figure: end its name in {', '.join(plots.FORMATS)}")
        there = next(folder for folder in place.parents if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{path} cannot be written: {there} is no folder that takes files")


def read_images(model: GenerativeModel, paths: Sequence[Path]) -> SceneData:
    """Images for a model, from an npz file or from PNG files and folders of them.

    Raises:
        UserError: unreadable files, or images that the model does not take.
    """
    if len(paths) == 1 and (paths[0].suffix == ".npz" or _is_archive(paths[0])):
        data = load_npz(paths[0])
    else:
        data = SceneData.from_images("images", load_pngs(paths, model.image_shape[0]))
    model.check(data.batch(slice(0, 1)))
    return data


def _is_archive(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def write_objects(out: Path, scene: Scene, form: str | None) -> None:
    """Inferred objects as JSON; with a form, their graphs: json, or graphml, a folder of files.

    :raises UserError: if there is anything where the folder is to be.
    """
    if form == "graphml":
        documents = graph.to_graphml(scene)
        digits = len(str(len(documents)))
        with new_folder(out) as folder:
            for i, document in enumerate(documents):
                (folder / f"{i:0{digits}}.graphml").write_bytes(document.encode())
    else:
        write_json(out, graph.to_json(scene) if form else scene.to_json())


def columns(figures: Mapping[str, dict[str, Any]]) -> dict[str, list[str]]:
    """The figures of `evaluate` in words, by heading; a dash where one does not apply.

    Columns that apply to no row are left out.

    :param figures: by data set, a row each.
    """
    told = {
        "": list(figures),
        "images": [f"{row['images']:,}" for row in figures.values()],
    }
    for heading, write in COLUMNS.items():
        cells = [write(row) for row in figures.values()]
        if any(cell != "-" for cell in cells):
            told[heading] = cells
    return told


def table(figures: Mapping[str, dict[str, Any]]) -> str:
    """The same as lines of text, and why there is no likelihood where there is none."""
    return "\n".join([_aligned(columns(figures)), *missing(figures)])


def missing(figures: Mapping[str, dict[str, Any]]) -> list[str]:
    """Why rows that were measured with particles have no likelihood, a line for each likelihood."""
    names = {
        row["likelihood"] for row in figures.values()
        if row["particles"] and row["nll_images"] is None
    }
    return [f"no -log p(x): {grey(name)}" for name in sorted(names)]


def grey(name: object) -> str:
    """Why a likelihood of that name is none of the images."""
    return (f"the images are grey, and a {name} likelihood is of binary ones;"
            " models of the package have one of them if trained with --set likelihood=normal")


def likelihood(row: dict[str, Any]) -> str:
    """What `evaluate` found about a likelihood beside its bound, to print below the table.

    The bound by particles, how many of these count, and the parts of the bound of one.
    """
    ess, split = row["ess"], row["split"]
    curve = {
        "particles": [f"{point['particles']:,}" for point in row["curve"]],
        "-log p(x) <= (nats)": [_with_error(point) for point in row["curve"]],
    }
    # None stands for infinity, see `evaluate`.
    split = {name: math.inf if part is None else part for name, part in split.items()}
    parts = " + ".join(f"{name} {part:.2f}" for name, part in split.items())
    lines = [
        _aligned(curve),
        "",
        f"particles that count, of {row['particles']:,}: {ess['mean']:.1f} on average,"
        f" {ess['median']:.1f} in the median image, at most {ess['decile']:.1f} in one of ten",
        f"parts at 1 particle (nats): {parts} = {sum(split.values()):.2f}",
    ]
    if row["entropy"]:
        of_data = " + ".join(f"{name} {row['entropy'][name]:.2f}" for name in ENTROPY_PARTS)
        lines.append(f"entropy of the data (nats): {of_data} = {_entropy(row)}")
    return "\n".join(lines)


def calibration(guides: dict[str, dict[str, Any]]) -> str:
    """The figures of `calibration.summary`, a table for each guide, by name."""
    parts = []
    for label, figures in guides.items():
        rows = figures["ranks"].values()
        columns = {
            label: list(figures["ranks"]),
            "numbers": [str(row["numbers"]) for row in rows],
            "scenes": [f"{row['scenes']:,}" for row in rows],
            "mean rank": [f"{row['mean']:.2f}" for row in rows],
            "spread": [f"{row['spread']:.2f}" for row in rows],
            "distance": [f"{row['distance']:.3f}" for row in rows],
            "limit": [f"{row['limit']:.3f}" for row in rows],
        }
        levels = dict.fromkeys(level for row in rows for level in row["covers"])
        columns |= {f"{level} covers": [f"{row['covers'][level]:.0%}" for row in rows]
                    for level in levels}
        parts.append(_aligned(columns))
        if "counts" in figures:
            counts = figures["counts"]
            masses = ", ".join(f"{n}: {part['mass']:.1%} ({part['scenes']:,} scenes)"
                               for n, part in counts["by count"].items())
            parts.append(f"counts: the likeliest is right in {counts['right']:.1%}, with a mass of"
                         f" {counts['sure']:.1%}\nmass of the true count, {masses}")
    return "\n\n".join(parts)


def entropy(label: str, figures: dict[str, float]) -> str:
    """What `scene_entropy` found, as a table."""
    parts = {name: [f"{figures[name]:.2f}"] for name in ENTROPY_PARTS}
    return _aligned({"": [label], **parts, ENTROPY: [_entropy({"entropy": figures})]})


def _aligned(columns: dict[str, list[str]]) -> str:
    """Cells under their headings."""
    aligned = []
    for heading, cells in columns.items():
        width = max(map(len, (heading, *cells)))
        aligned.append([cell.ljust(width) for cell in (heading, *cells)])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned))


def _nll(row: dict[str, Any]) -> str:
    """With its likelihood, and how many images it is of if not of all."""
    if row["nll_images"] is None:
        return "-"
    few = "" if row["nll_images"] == row["images"] else f"; {row['nll_images']:,} images"
    if row["impossible"]:
        few += f"; {row['impossible']:,} of counts that the prior gives no mass"
    return f"{_with_error(row)} ({row['likelihood']}{few})"


def _entropy(row: dict[str, Any]) -> str:
    figures = row["entropy"]
    return f"{figures['total']:.2f} +- {figures['stderr']:.2f}" if figures else "-"


def _with_error(row: dict[str, Any]) -> str:
    error = "" if row["nll_stderr"] is None else f" +- {row['nll_stderr']:.2f}"
    return f"{math.inf if row['nll'] is None else row['nll']:.2f}{error}"


def _written(key: str, form: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "-" if row[key] is None else form.format(row[key])


ENTROPY = "entropy (nats)"
ENTROPY_PARTS = ("count", "places", "appearances")
COLUMNS = {
    "priors": lambda row: ", ".join(row["priors"]) or "-",
    "count right": _written("count_accuracy", "{:.2%}"),
    "-log p(x) <= (nats)": _nll,
    ENTROPY: _entropy,
    "categories right": _written("category_correspondence", "{:.2%}"),
    "classes": _written("classes", "{}"),
    "right in place": _written("placed_correspondence", "{:.2%}"),
    "purity": _written("purity", "{:.2%}"),
    "ARI": _written("ari", "{:.3f}"),
}


def insert(page: Path, command: str, text: str) -> None:
    """Put what a command measured between its two marks in a page.

    Raises:
        UserError: the page lacks the marks.
    """
    before, begin, end, after = marked(page, command)
    newline = "\r\n" if begin.endswith("\r\n") else "\n"
    text = f"{text}\n".replace("\n", newline)
    with atomic_write(page.resolve()) as file:  # of a link, what it leads to
        file.write(f"{before}{begin}{text}{end}{after}".encode())


def marked(page: Path, command: str) -> tuple[str, str, str, str]:
    """A page's part before the first mark of a command, the two marks, and its part after them.

    Raises:
        UserError: the page lacks the marks, or is no text.
    """
    begin, end = f"<!-- {command} --readme -->", f"<!-- end of {command} -->"
    try:
        content = page.read_bytes().decode() if page.is_file() else ""
    except UnicodeDecodeError:
        raise UserError(f"{page} is no text in UTF-8") from None
    parts = re.split(f"({re.escape(begin)}\r?\n)(.*?)({re.escape(end)})", content,
                     maxsplit=1, flags=re.DOTALL)
    if len(parts) == 1:
        raise UserError(f"{page} has no lines {begin} and {end}")
    before, first, _, last, after = parts
    return before, first, last, after


def unseen(
    trained: checkpoint.Checkpoint, data: str, images: int | None, objects: tuple[int, int] | None,
    mnist: Path | None,
) -> SceneData:
    """Scenes to measure a run on: `load`'s, but of the images that it was trained on the last part.

    A file is known again wherever it lies now, by its images, and by its path in older runs. PNG
    files get the channels that the model takes.

    :param images: only the first so many.
    :raises UserError: as `load` does.
    """
    if data in DATASETS:
        return load(data, images=images, objects=objects, mnist=mnist)
    scenes = load(data, objects=objects, channels=trained.model.image_shape[0])
    if not _trained_on(trained, data, scenes):
        return scenes[:images]
    return replace(split_held_out(scenes)[1][:images], name=f"{scenes.name}, held out")


def _trained_on(trained: checkpoint.Checkpoint, data: str, scenes: SceneData) -> bool:
    """Whether the scenes of a file are all that a run was trained on and has held out."""
    if trained.images:
        return trained.images == scenes.digest()
    own = trained.config.data
    return own not in DATASETS and Path(data).resolve() == Path(own).resolve()


def source(trained: checkpoint.Checkpoint, data: str | None = None) -> str | SceneData:
    """What a run was trained on: the name of a data set, or the scenes of its file's first part.

    :param data: where that file may lie now; else it is where it lay.
    :raises UserError: if the file is not there, or has other images by now.
    """
    own = trained.config.data
    if own in DATASETS:
        return own
    if data and data not in DATASETS:
        scenes = load(data, channels=trained.model.image_shape[0])
        if _trained_on(trained, data, scenes):
            return split_held_out(scenes)[0]
        if not Path(own).exists():
            raise UserError(f"{data} has other images than those that the run was trained on, which"
                            f" were in {own!r}: bring that back, or say where it is now")
    return split_held_out(_own(trained))[0]


def _own(trained: checkpoint.Checkpoint) -> SceneData:
    """All scenes of the file that a run was trained on, where it lay."""
    data = trained.config.data
    if not Path(data).exists():
        raise UserError(f"no data set and no file is called {data!r} any more, as what the run"
                        " was trained on: bring it back, or say where it is now by --data")
    scenes = load(data)
    if trained.images and trained.images != scenes.digest():
        raise UserError(f"{data} has other images than those that the run was trained on: what it"
                        " has not seen of them is not known")
    return scenes


def held_out(
    trained: checkpoint.Checkpoint, images: int, mnist: Path | None
) -> dict[str, SceneData]:
    """Scenes to measure a run on, by label.

    The first are like those of the training: of a file that it was trained on, the last part. After
    them come, where there are such, scenes of more objects if the model finds as many, and those of
    the data set's `others`, such as new digits.

    :raises UserError: if the file has other images by now.
    """
    model, data = trained.model, trained.config.data
    if data not in DATASETS:
        return {"held out": split_held_out(_own(trained))[1][:images]}
    spec = DATASETS[data]
    low, high = spec.objects
    sets = {f"{low}-{high} objects": load(data, images=images, mnist=mnist)}
    if spec.crowded and isinstance(model, SceneModel) and model.most >= CROWDED[1]:
        sets[CROWDED_LABEL] = load(data, images=images, objects=CROWDED, mnist=mnist)
    for label, other in spec.others.items():
        sets[label] = load(other, images=images, mnist=mnist)
    return sets


def finish(config: RunConfig, out: Path, device: str, mnist: Path | None) -> str:
    """Measure a trained run on held-out scenes and draw some into its folder.

    Returns:
        A table and the place of the picture, to print.
    """
    trained = checkpoint.load(out, device)
    model, sets = trained.model, held_out(trained, IMAGES, mnist)
    # No limit on objects: a run that was stopped early may see them everywhere.
    figures = {
        name: evaluate(model, data, particles=PARTICLES, limit=math.inf)
        for name, data in sets.items()
    }
    images = next(iter(sets.values())).batch(slice(0, pictures.IMAGES))
    plots.save(pictures.inference(model, images, math.inf), out / checkpoint.PICTURE)
    return (f"{config.data}, held-out scenes, {PARTICLES} particles:\n{table(figures)}\n"
            f"Picture: {out / checkpoint.PICTURE}")
