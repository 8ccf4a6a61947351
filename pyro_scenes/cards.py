"""Model cards: the checkpoints that ship inside the package, with figures of every seed.

Everything a card says is read from runs and measured here; nothing is typed.
"""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_scenes import checkpoint, pictures, plots, tables
from pyro_scenes.checkpoint import Checkpoint
from pyro_scenes.config import RunConfig
from pyro_scenes.data import DATASETS
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.files import atomic_write, read_json, write_json
from pyro_scenes.report import CROWDED_LABEL, held_out

# A seed has succeeded if so many of its counts are right, on scenes like those of its training.
SUCCESS = 0.9
DRAWN = 6  # scenes in the picture
ENTRY = {"seed", "steps", "training_seconds", "machine", "figures"}  # of each run
# Columns of a card where they apply: heading, figure, digits.
COLUMNS = (
    ("count right", "count_accuracy", 4),
    ("correspondence", "category_correspondence", 4),
    ("right in place", "placed_correspondence", 4),
    ("purity", "purity", 4),
    ("-log p(x) <= ({likelihood})", "nll", 2),
    ("standard error", "nll_stderr", 2),
    ("ARI", "ari", 4),
)
NOTES = {
    "category_correspondence": "Correspondence is of categories, wherever their objects are; right"
    " in place and purity match objects by place first.",
    "nll": "The bound on -log p(x), in nats per image, has exact discrete masses; its standard"
    " error is over images.",
    "ari": "ARI is of the foreground.",
}


def ship(
    name: str,
    runs: list[Path],
    *,
    folder: Path = checkpoint.SHIPPED,
    images: int = 10_000,
    particles: int = 100,
    nll_images: int | None = None,
    add: bool = False,
    mnist: Path | None = None,
    device: str = "auto",
) -> str:
    """Write ``name``.pt (the weights of the first run), .json (figures of all), and the card, .md
    and .png.

    :param runs: finished runs of one command that differ in their seeds alone.
    :param images: test images of each kind. :param nll_images: of those, the likelihood of so many.
    :param add: give what has that name these seeds too; its weights and its seeds' figures stay.
    :return: the card.
    :raises UserError: if a run is missing, unfinished or not of the same command, a name would
        lead out of the folder, or files of that name are there that are no checkpoint's; with
        ``add``, if nothing has that name, or if its seeds were measured otherwise.
    """
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"{name!r} is not a name: it has folders in it")
    others = [folder / f"{name}{ending}" for ending in (".json", ".md", ".png")]
    foreign = next((path for path in others if path.exists()), None)
    if foreign and not (folder / f"{name}.pt").exists():
        raise UserError(f"{foreign} is there already, and of no checkpoint: ship by another name")
    before = content_of(folder / f"{name}.json") if add else None
    if before:
        if not (folder / f"{name}.png").is_file():
            raise UserError(f"{name}.png is missing: ship all seeds anew, without --add")
        _measured_alike(before, images, particles, nll_images)
    loaded = [checkpoint.load(run, device) for run in runs]
    _same_command(loaded, before)
    entries = []
    for trained in loaded:
        checkpoint.rounded(trained.model)  # what is measured is what ships
        entries.append(_measure(trained, images, particles, nll_images, mnist))
    if before:
        if any(entry["figures"].keys() != before["runs"][0]["figures"].keys() for entry in entries):
            raise UserError(f"the seeds of {name} were measured on other scenes than those of now")
        content = before | {"runs": before["runs"] + entries}
    else:
        config = loaded[0].config
        content = {
            "name": name,
            "settings": config.to_dict(),
            "parameters": sum(p.numel() for p in loaded[0].model.parameters()),
            "runs": entries,
        }
        _draw(folder / f"{name}.png", loaded[0], mnist)
        model, step = loaded[0].model.cpu(), loaded[0].step
        checkpoint.save(folder / f"{name}.pt", config, model, step, half=True)
    card = _card(content)
    write_json(folder / f"{name}.json", content)
    with atomic_write(folder / f"{name}.md") as file:
        file.write(card.encode())
    return card


def rewrite(folder: Path = checkpoint.SHIPPED) -> None:
    """Write the cards anew from their figures."""
    for path in sorted(folder.glob("*.json")):
        with atomic_write(path.with_suffix(".md")) as file:
            file.write(_card(content_of(path)).encode())


def content_of(path: Path) -> dict:
    """What a card is made from. :raises UserError: if it is not there or damaged."""
    content = read_json(path, ("name", "settings", "parameters", "runs"))
    runs = content["runs"]
    if not (isinstance(runs, list) and runs and all(_is_entry(run) for run in runs)
            and all(run["figures"].keys() == runs[0]["figures"].keys() for run in runs)):
        raise UserError(f"{path} is not what it should be (its runs): remove it, or get it again")
    return content


def _is_entry(run: Any) -> bool:
    """Whether it may be what `_measure` has written."""
    return (
        isinstance(run, dict) and ENTRY <= run.keys() and isinstance(run["figures"], dict)
        and bool(run["figures"]) and all(isinstance(v, dict) for v in run["figures"].values())
    )


def table(folder: Path = checkpoint.SHIPPED) -> str:
    """A Markdown table of what has shipped, a row a checkpoint: means over its seeds."""
    headings = (
        "checkpoint", "seeds", "count right", f"count right, {CROWDED_LABEL}", "correspondence",
        "-log p(x) <=", "its error over images", "training, minutes",
    )
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = content_of(path)
        runs = content["runs"]
        labelled = by_label(runs)
        figures = next(iter(labelled.values()))
        rows.append((
            f"[{content['name']}](pyro_scenes/checkpoints/{content['name']}.md)",
            str(len(runs)),
            tables.spread(figures, "count_accuracy", 4),
            tables.spread(labelled.get(CROWDED_LABEL, []), "count_accuracy", 4),
            correspondence(content, figures),
            tables.bound(figures),
            tables.images_error(figures),
            f"{statistics.mean(run['training_seconds'] for run in runs) / 60:.0f}",
        ))
    return "\n".join(tables.lines(headings, rows))


def by_label(runs: list[dict]) -> dict[str, list[dict]]:
    """The figures of all seeds by the label of what they were measured on, its own data first."""
    return {label: [run["figures"][label] for run in runs] for label in runs[0]["figures"]}


def _draw(path: Path, trained: Checkpoint, mnist: Path | None) -> None:
    """Inferred test scenes with objects, two of them of each kind that is not the training's."""
    model = trained.model
    sets = held_out(trained, 40, mnist)
    batches = []
    for i, data in enumerate(sets.values()):
        number = 2 if i else DRAWN - 2 * (len(sets) - 1)
        full = np.arange(len(data)) if data.counts is None else data.counts.nonzero()[0]
        batches.append(data.batch(full[:number]))
    plots.save(pictures.inference(model, torch.cat(batches), math.inf), path)


def _measured_alike(before: dict, images: int, particles: int, nll_images: int | None) -> None:
    figures = next(iter(before["runs"][0]["figures"].values()))
    kept = {key: figures.get(key) for key in ("images", "particles", "nll_images")}
    some = min(nll_images or images, images)
    asked = {"images": images, "particles": particles, "nll_images": some}
    if figures.get("nll") is None:  # there is no density of such images
        kept["nll_images"] = asked["nll_images"]
    if kept != asked:
        raise UserError(
            f"the seeds of {before['name']} were measured with --images {kept['images']}"
            f" --particles {kept['particles']} --nll-images {kept['nll_images']}: measure those"
            " that are added alike"
        )


def _same_command(loaded: list[Checkpoint], before: dict | None) -> None:
    """:param before: what the runs are added to, if anything."""
    config = RunConfig.from_dict(before["settings"]) if before else loaded[0].config
    first, whose = config.to_dict() | {"seed": None}, before["name"] if before else "the first run"
    for trained in loaded:
        if trained.config.to_dict() | {"seed": None} != first:
            raise UserError(f"{trained.path} was trained with other settings than {whose}")
        if trained.config.data not in DATASETS:
            raise UserError("a shipped checkpoint is trained on a registered data set")
        if trained.training is None or trained.step < trained.config.train.steps:
            raise UserError(f"{trained.path} is not a finished run")
    seeds = [run["seed"] for run in before["runs"]] if before else []
    seeds += [trained.config.seed for trained in loaded]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"of the runs two have the same seed: {', '.join(map(str, seeds))}")


def _measure(
    trained: Checkpoint,
    images: int,
    particles: int,
    nll_images: int | None,
    mnist: Path | None,
) -> dict:
    """One seed's entry; kept beside the run, so that measuring many can be interrupted."""
    weights = checkpoint.digest(trained.path)
    name = f"figures-{images}-{nll_images or images}x{particles}-{weights}.json"
    kept = trained.path.parent / name
    if kept.exists():
        return read_json(kept, ENTRY)
    assert trained.training is not None
    entry = {
        "seed": trained.config.seed,
        "steps": trained.step,
        "training_seconds": round(trained.training["seconds"]),
        "machine": trained.training["machine"],
        "figures": {
            label: evaluate(
                trained.model,
                data,
                # The prior over counts was never fitted to crowded scenes.
                particles=0 if label == CROWDED_LABEL else particles,
                nll_images=nll_images,
                limit=math.inf,
            )
            for label, data in held_out(trained, images, mnist).items()
        },
    }
    write_json(kept, entry)
    return entry


def _card(content: dict) -> str:
    runs, config = content["runs"], RunConfig.from_dict(content["settings"])
    labelled = by_label(runs)
    own = next(iter(labelled))
    counts = [figures["count_accuracy"] for figures in labelled[own]]
    lines = [
        f"# {content['name']}",
        "",
        f"![Inferred test scenes]({content['name']}.png)",
        "",
        f"Trained by `{_launcher(runs)}{config.command('SEED')}`: {config.train.steps:,} steps of"
        f" {config.train.batch_size} images; {content['parameters']:,} parameters. The weights are"
        f" those of seed {runs[0]['seed']}; every seed that was run is listed.",
    ]
    if None not in counts:  # a model without objects does not count
        succeeded = sum(count >= SUCCESS for count in counts)
        lines += ["", f"{succeeded} of {len(runs)} seeds succeeded, that is, got at least"
                      f" {SUCCESS:.0%} of counts right on {own}."]
    used = set()
    for label, figures in labelled.items():
        columns = [c for c in COLUMNS if any(row[c[1]] is not None for row in figures)]
        used |= {key for _, key, _ in columns}
        lines += ["", f"## {label}", "", _measured(label, figures[0]), ""]
        likelihood = figures[0]["likelihood"]
        headings = ["seed", *(heading.format(likelihood=likelihood) for heading, _, _ in columns)]
        rows = [
            [str(run["seed"]), *(tables.number(row[key], digits) for _, key, digits in columns)]
            for run, row in zip(runs, figures, strict=True)
        ]
        means = ["mean +- sd", *(tables.spread(figures, key, digits) for _, key, digits in columns)]
        if label == own:
            headings.append("training, minutes")
            for run, cells in zip(runs, rows, strict=True):
                cells.append(f"{run['training_seconds'] / 60:.1f}")
            means.append("")
        lines += tables.lines(headings, [*rows, means])
    lines += ["", " ".join(note for key, note in NOTES.items() if key in used)]
    lines += ["", f"Trained on: {'; '.join(sorted({run['machine'] for run in runs}))}.", ""]
    return "\n".join(lines)


def _launcher(runs: list[dict]) -> str:
    """What a command begins with to have the processes that all of these runs had, if several."""
    first, *others = (re.findall(r", (\d+) processes$", run["machine"]) for run in runs)
    if not first or any(numbers != first for numbers in others):
        return ""
    return f"torchrun --nproc-per-node {first[0]} "


def _measured(label: str, figures: dict) -> str:
    """What the figures of a label are of."""
    text = f"{figures['images']:,} held-out scenes of {figures['data']}."
    if label == CROWDED_LABEL:
        text += " No scene of the training has so many objects."
    if figures["nll"] is not None:
        some = "all" if figures["nll_images"] == figures["images"] else f"{figures['nll_images']:,}"
        text += f" -log p(x) is of {some} of them, with {figures['particles']} importance samples."
    entropy = figures.get("entropy")  # older files have none
    if entropy:
        text += (" No model's mean goes below the entropy of the data,"
                 f" {entropy['total']:.2f} +- {entropy['stderr']:.2f} nats an image.")
    return text


def correspondence(content: dict, figures: list[dict]) -> str:
    """Category correspondence over seeds, and how many categories there are if more than labels."""
    text, settings = tables.spread(figures, "category_correspondence", 4), content["settings"]
    classes, spec = settings["net"].get("classes", 0), DATASETS.get(settings["data"])
    labels = spec.class_names if spec else ()  # one's own, of a file that is not imported now
    more = text != "-" and classes > len(labels) > 0
    return f"{text} ({classes} categories for {len(labels)})" if more else text
