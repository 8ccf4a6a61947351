"""The table of all models: every shipped checkpoint on every data set that it can read.

A cell is one checkpoint on scenes of one kind. Its figures are a file of their own, so that a suite
goes on where it was interrupted, and the page is made from these files, the cards and the papers'
figures alone.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from pyro_scenes import cards, checkpoint, tables
from pyro_scenes.checkpoint import Checkpoint
from pyro_scenes.data import DATASETS, load, make
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.files import read_json, write_json
from pyro_scenes.models import SceneModel
from pyro_scenes.report import CROWDED_LABEL

HEADING, ORIGIN = "# Results", "Written by `bin/svi-eval --suite`"  # how the page begins
OBJECTS = (5, 7, 9, 12)  # of crowded scenes, where so many fit
# What the papers report, means over seeds: Table 1 of LAVAE's, whose baseline is the convolutional
# VAE, and Table 1 of Discrete-AIR's, ten there; 0.871 and the best are its sections' 3.1 and 3.2.
PAPERS: dict[tuple[str, str], dict[str, str]] = {
    ("lavae", "multi-dsprites"): {"nll": "43.9 +- 1.0", "count": ">= 0.999"},
    ("lavae", "multi-mnist-1k"): {"nll": "42.2 +- 1.1", "count": ">= 0.999"},
    ("lavae", "multi-mnist-10k"): {"nll": "60.4 +- 2.8", "count": ">= 0.997"},
    ("conv-vae", "multi-dsprites"): {"nll": "45.8 +- 0.7"},
    ("conv-vae", "multi-mnist-1k"): {"nll": "51.6 +- 0.6"},
    ("conv-vae", "multi-mnist-10k"): {"nll": "64.6 +- 0.8"},
    ("discrete-air", "multi-sprites"): {"count": "0.985", "correspondence": "0.945 (best 0.967)"},
    ("discrete-air", "multi-mnist"): {"count": "0.984", "correspondence": "0.871 (best 0.913)"},
    ("air", "multi-sprites"): {"count": "0.981"},
    ("air", "multi-mnist"): {"count": "0.985"},
}
# What a paper's figure is called in ours, and whether a larger one is better.
FIGURES = {
    "nll": ("nll", False), "count": ("count_accuracy", True),
    "correspondence": ("category_correspondence", True),
}
# Where to read what was tried, by model.
TRIED = {
    "lavae": "RUNS.md#lavae-on-multi-dsprites-fast-preset-batches-of-64",
    "discrete-air": "RUNS.md#discrete-air", "air": "RUNS.md#air",
    "conv-vae": "RUNS.md#the-convolutional-vae",
}
NOTES = (
    "+- is the standard deviation over seeds; the error over images is the standard error of one"
    " seed's bound, and of how many images. mixture:K is p(z_app), N(0, I) in the paper: a mixture"
    " of K, about one for each object that the data's are drawn from, fitted to training scenes."
    " It takes nats off and has no part in counts ([what it gains](RUNS.md#what-shipped), with"
    " the nats of trainings with N(0, I)). A grid in phases has a learned prior of each phase given"
    " those before; it is N(0, I) in the paper. K deformations are z_attr, which in the paper is"
    " one number that is added to a template's code, and here bends templates and makes them bold"
    " ([what it gains](RUNS.md#discrete-air)). Discrete-AIR's training gives categories that are"
    " hardly used nats or a new start, and has templates explain images before attributes do; the"
    " paper's has nothing that asks for categories ([what it gains](RUNS.md#discrete-air))."
    " Contrast sharpens what is drawn on the canvas by an"
    " exponent that is learned ([what it gains](RUNS.md#air)). Correspondence gives each category a"
    " label of its own, wherever objects are; purity any, of objects matched by place, so where"
    " there are more categories than labels it is purity that says how pure they are. Of 7 objects"
    " LAVAE's paper has no figure of its own, but says that counts are right on almost all images"
    " of all test sets, these too. ARI is of the"
    " foreground. Seconds are of counts, places, categories and segmentations, of the shipped"
    " weights, each at the time when its cell was measured, beside whatever else ran there then."
)


@dataclass(frozen=True)
class Cell:
    """One checkpoint on scenes of so many objects of one data set."""

    checkpoint: str
    data: str
    objects: tuple[int, int]

    def file(self, folder: Path) -> Path:
        low, high = self.objects
        return folder / self.checkpoint / f"{self.data}-{low}-{high}.json"


def cells(trained: Checkpoint, name: str, mnist: Path | None) -> Iterator[Cell]:
    """What a checkpoint can be measured on: sets of images that it reads, then crowded scenes.

    :raises UserError: if MNIST cannot be had.
    """
    model = trained.model
    for data, spec in DATASETS.items():
        try:
            model.check(make(data, 1, mnist=mnist, segmentation=False).batch())
        except UserError:
            # MNIST that is missing is not a set that the model does not read.
            make(data, 1, mnist=mnist, segmentation=False)
            continue
        yield Cell(name, data, spec.objects)
        # A model that finds no more objects than its data's scenes have is not asked for more.
        for count in OBJECTS if isinstance(model, SceneModel) and model.most >= OBJECTS[0] else ():
            try:
                make(data, 1, objects=(count, count), mnist=mnist, segmentation=False)
            except UserError:
                break  # so many do not fit
            yield Cell(name, data, (count, count))


def run(
    folder: Path,
    names: Iterable[str],
    *,
    images: int,
    nll_images: int,
    particles: int,
    chunk: int | None = None,
    mnist: Path | None = None,
    device: str = "auto",
) -> Iterator[str]:
    """Measure the cells that are not in the folder yet; yields a line a cell.

    Likelihoods are of scenes with a data set's own counts: no prior was fitted to crowded ones.
    Files of checkpoints that were shipped anew since are measured again.

    :param names: of shipped checkpoints. :param images: test scenes of a cell.
    :param nll_images: of those, the likelihood of so many. :param particles: an image.
    :param chunk: particles times images at a time, see `evaluate`.
    """
    for name in names:
        trained = checkpoint.load(name, device)
        asked = {
            "weights": checkpoint.digest(trained.path),
            "asked": [images, nll_images, particles],
        }
        for cell in cells(trained, name, mnist):
            file = cell.file(folder)
            kept = _read(file)
            if {key: kept.get(key) for key in asked} == asked:
                continue
            figures = asked | _measure(
                trained, cell, images, nll_images, particles, chunk, mnist
            )
            write_json(file, figures)
            yield f"{file}: {figures.get('error') or 'measured'}"


def _measure(
    trained: Checkpoint, cell: Cell, images: int, nll_images: int, particles: int,
    chunk: int | None, mnist: Path | None,
) -> dict:
    own = cell.objects == DATASETS[cell.data].objects
    try:
        data = load(cell.data, images=images, objects=cell.objects, mnist=mnist)
        start = time.perf_counter()
        figures = evaluate(trained.model, data, particles=0, limit=math.inf)
        if isinstance(trained.model, SceneModel):
            figures["seconds_per_1000"] = 1000 * (time.perf_counter() - start) / images
        if own:
            scored = evaluate(trained.model, data[:nll_images], particles=particles, chunk=chunk,
                              limit=math.inf)
            wanted = ("particles", "nll", "nll_stderr", "nll_images", "curve", "ess", "split",
                      "entropy")
            figures |= {key: scored[key] for key in wanted}
    except UserError as error:
        return {"error": str(error)}
    return figures


# --- the page ------------------------------------------------------------------------------------


def head(folder: Path) -> str:
    """The checkpoints on test scenes of their own data, beside the papers: a Markdown table."""
    return _head(folder, _kept(folder), _contents())


def _head(folder: Path, kept: Mapping[Path, dict], contents: Mapping[str, dict]) -> str:
    headings = (
        "data", "model", "seeds", "-log p(x) <=", "its error over images", "paper", "entropy",
        "count right", "paper", CROWDED_LABEL, "correspondence", "paper", "purity", "ARI",
        "s / 1,000 images",
    )
    rows = []
    for name, content in contents.items():
        settings, runs = content["settings"], content["runs"]
        data, model = settings["data"], settings["model"]
        labelled = cards.by_label(runs)
        figures, crowded = next(iter(labelled.values())), labelled.get(CROWDED_LABEL, [])
        paper = PAPERS.get((model, data), {})
        measured = kept.get(Cell(name, data, DATASETS[data].objects).file(folder), {})
        rows.append((
            data, f"[{model}](pyro_scenes/checkpoints/{name}.md){_departure(settings)}",
            str(len(runs)),
            tables.bound(figures), tables.images_error(figures), paper.get("nll", "-"),
            _entropy(measured),
            tables.spread(figures, "count_accuracy", 4), paper.get("count", "-"),
            tables.spread(crowded, "count_accuracy", 4), cards.correspondence(content, figures),
            paper.get("correspondence", "-"), tables.spread(figures, "purity", 4),
            tables.spread(figures, "ari", 3), _number(measured, "seconds_per_1000", 1),
        ))
    return "\n".join(tables.lines(headings, sorted(rows), keep=0)) + "\n\n" + NOTES


def _departure(settings: Mapping) -> str:
    """The prior, what attributes do to a template, and how it is drawn, where not as in the paper.
    """
    net, found = settings["net"], []
    if net.get("combine") == "deform":
        found.append(f"{net['attributes']} deformations")
    if net.get("contrast"):
        found.append("contrast")
    if net.get("networks") == "fast" and settings["model"] == "conv-vae":
        found.append("grid in phases")
    if net.get("appearance_prior", "normal") != "normal":
        found.append(net["appearance_prior"])
    return "".join(f", {name}" for name in found)


def check_page(path: Path) -> None:
    """:raises UserError: if a file is there that no suite has written."""
    begins = f"{HEADING}\n\n{ORIGIN}"
    if path.exists() and not path.read_text(errors="replace").startswith(begins):
        raise UserError(f"{path} is not a page of svi-eval --suite, which would replace it: move it"
                        " away, or go to another folder")


def page(folder: Path) -> str:
    """RESULTS.md: the head, then for each data set what every checkpoint makes of it."""
    kept, contents = _kept(folder), _contents()
    lines = [
        HEADING, "",
        f"{ORIGIN}; every figure is measured on held-out scenes. In this"
        " table figures are means over the seeds that the cards list. -log p(x) is an"
        " importance-weighted bound in nats an image, under the likelihood beside it: those of"
        " different names do not compare, and of grey images there is none under a Bernoulli"
        " likelihood. The entropy of the data is the limit of a Bernoulli one.", "",
        _head(folder, kept, contents), "", *_short(contents.values()),
    ]
    headings = (
        "checkpoint", "-log p(x) <=", "entropy", "count right",
        *(f"{n} objects" for n in OBJECTS), "correspondence", "purity", "ARI", "s / 1,000 images",
    )
    for data, spec in DATASETS.items():
        rows, asked, crowds = [], defaultdict(list), False
        for name, content in contents.items():
            own = kept.get(Cell(name, data, spec.objects).file(folder))
            if not own:
                continue
            trained_on = content["settings"]["data"]
            label = name if trained_on == data else f"{name} (trained on {trained_on})"
            crowded = [kept.get(Cell(name, data, (n, n)).file(folder), {}) for n in OBJECTS]
            row = (
                own.get("error") or _bound(own), _entropy(own), _number(own, "count_accuracy", 4),
                *(_number(cell, "count_accuracy", 4) for cell in crowded),
                *(_number(own, key, 4) for key in ("category_correspondence", "purity")),
                _number(own, "ari", 3), _number(own, "seconds_per_1000", 1),
            )
            if set(row) == {"-"}:
                continue  # nothing applies, as to a model without objects of grey images
            asked[tuple(own["asked"])].append(name)
            crowds |= any(crowded)
            rows.append((label, *row))
        if rows:
            lines += ["", f"## {data}", "", _amounts(spec.objects, asked, crowds), ""]
            lines += tables.lines(headings, rows, keep=1)
    lines += ["", "## Where the nats go", "", "Parts of the bound of one sample, in nats an image,"
              " and how many samples of the importance weights count.", ""]
    rows = []
    for name, content in contents.items():
        data = content["settings"]["data"]
        own = kept.get(Cell(name, data, DATASETS[data].objects).file(folder), {})
        if own.get("split"):
            parts = " + ".join(f"{part} {value:.1f}" for part, value in own["split"].items())
            curve = ", ".join(f"{point['nll']:.1f}" for point in own["curve"])
            sizes = ", ".join(f"{point['particles']:,}" for point in own["curve"])
            rows.append((name, parts, f"{curve} (K = {sizes})", _number(own["ess"], "mean", 1)))
    headings = "checkpoint", "parts", "bound by samples", "samples that count"
    lines += tables.lines(headings, rows)
    return "\n".join(lines) + "\n"


def _short(contents: Iterable[dict]) -> list[str]:
    """Which of our means are not as good as a paper's, and where RUNS.md says what was tried."""
    found = []
    for content in contents:
        data, model = content["settings"]["data"], content["settings"]["model"]
        figures = next(iter(cards.by_label(content["runs"]).values()))
        for name, text in PAPERS.get((model, data), {}).items():
            key, larger = FIGURES[name]
            paper = float(text.removeprefix(">= ").split()[0])
            values = tables.known(figures, key)
            if key == "nll" and figures[0]["likelihood"] != "bernoulli":
                continue  # the papers' are nats of binary images
            if values and (mean(values) < paper if larger else mean(values) > paper):
                found.append(f"the {name} of [{model} on {data}]({TRIED[model]})")
    if not found:
        return ["Each of these figures, with the priors named, is at least as good as its paper's."]
    return ["All but these are, with the priors named, at least as good as their papers':"
            f" {', '.join(found)}. The links lead to what was tried."]


def _contents() -> dict[str, dict]:
    """What the cards of all shipped checkpoints were made from, by name."""
    return {
        name: cards.content_of(path.with_suffix(".json"))
        for name, path in checkpoint.shipped().items()
    }


def _read(file: Path) -> dict:
    return read_json(file, ("weights", "asked")) if file.exists() else {}


def _kept(folder: Path) -> dict[Path, dict]:
    """What was measured of the weights that ship now, by file: of others it would be stale."""
    kept = {}
    for name, path in checkpoint.shipped().items():
        weights = checkpoint.digest(path)
        for file in sorted((folder / name).glob("*.json")):
            cell = _read(file)
            if cell["weights"] == weights:
                kept[file] = cell
    return kept


def _amounts(
    objects: tuple[int, int], asked: Mapping[tuple, Sequence[str]], crowds: bool
) -> str:
    """How much was measured.

    :param asked: images, those with a likelihood and particles -> checkpoints measured so.
    :param crowds: whether crowded scenes were too.
    """
    low, high = objects
    of = [
        f"{images:,} scenes of {low} to {high} objects"
        + (", and as many of each crowded kind" if crowds else "")
        + f"; -log p(x) of {nll_images:,} with {particles:,} importance samples"
        + (f" ({', '.join(names)})" if len(asked) > 1 else "")
        for (images, nll_images, particles), names in asked.items()
    ]
    return f"{'; '.join(of)}; the shipped weights."


def _bound(figures: dict) -> str:
    """A bound with its standard error over images."""
    if figures["nll"] is None:
        return "-"
    error = "" if figures["nll_stderr"] is None else f" +- {figures['nll_stderr']:.1f}"
    return f"{figures['nll']:.1f}{error} ({figures['likelihood']})"


def _entropy(figures: dict) -> str:
    entropy = figures.get("entropy")
    return f"{entropy['total']:.1f}" if entropy else "-"


def _number(figures: dict, key: str, digits: int) -> str:
    return tables.number(figures.get(key), digits)
