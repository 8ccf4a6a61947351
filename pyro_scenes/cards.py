"""Model cards: the checkpoints that ship inside the package, with figures of every seed.

Everything a card says is read from runs and measured here; nothing is typed.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from pathlib import Path

import torch

from pyro_scenes import checkpoint, pictures, plots
from pyro_scenes.checkpoint import Checkpoint
from pyro_scenes.config import RunConfig, make_config
from pyro_scenes.data import DATASETS, load
from pyro_scenes.data.files import atomic_write, write_json
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import CROWDED, evaluate
from pyro_scenes.models import SceneModel


def ship(
    name: str,
    runs: list[Path],
    *,
    folder: Path = checkpoint.SHIPPED,
    images: int = 10_000,
    particles: int = 100,
    mnist: Path | None = None,
    device: str = "auto",
) -> str:
    """Write ``name``.pt (the weights of the first run), .json (figures of all) and .md (the card).

    :param runs: finished runs of one command that differ in their seeds alone.
    :param images: test images of each kind. :return: the card.
    :raises UserError: if a run is missing, unfinished or not of the same command.
    """
    loaded = [checkpoint.load(run, device) for run in runs]
    _same_command(loaded)
    entries = []
    for run, trained in zip(runs, loaded, strict=True):
        entries.append(_measure(run, trained, images, particles, mnist))
    config = loaded[0].config
    content = {
        "name": name,
        "command": _command(config),
        "settings": config.to_dict(),
        "parameters": sum(p.numel() for p in loaded[0].model.parameters()),
        "runs": entries,
    }
    card = _card(content)
    folder.mkdir(exist_ok=True)
    _draw(folder / f"{name}.png", loaded[0], mnist)
    checkpoint.save(folder / f"{name}.pt", config, loaded[0].model.cpu(), loaded[0].step)
    write_json(folder / f"{name}.json", content)
    with atomic_write(folder / f"{name}.md") as file:
        file.write(card.encode())
    return card


def table(folder: Path = checkpoint.SHIPPED) -> str:
    """A Markdown table of what has shipped, a row a checkpoint: means over its seeds."""
    rows = [
        f"| checkpoint | seeds | count right, 0-3 objects | {CROWDED[0]} objects | -log p(x) <= |"
        " training, minutes |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        runs = content["runs"]
        few, crowded = [r["few"] for r in runs], [r["crowded"] for r in runs]
        minutes = statistics.mean(run["training_seconds"] for run in runs) / 60
        rows.append(
            f"| [{content['name']}](pyro_scenes/checkpoints/{content['name']}.md) | {len(runs)} |"
            f" {_spread(few, 'count_accuracy', 4)} | {_spread(crowded, 'count_accuracy', 4)} |"
            f" {_spread(few, 'nll', 1)} | {minutes:.0f} |"
        )
    return "\n".join(rows)


def _draw(path: Path, trained: Checkpoint, mnist: Path | None) -> None:
    """Inferred test scenes, half of them crowded."""
    model = trained.model
    assert isinstance(model, SceneModel)
    data = trained.config.data
    few = load(data, images=20, mnist=mnist)
    assert few.counts is not None
    crowded = load(data, images=2, objects=CROWDED, mnist=mnist)
    images = torch.cat([few.batch(few.counts.nonzero()[0][:4]), crowded.batch()])
    plots.save(pictures.inference(model, images, math.inf), path)


def _command(config: RunConfig) -> str:
    """What trains such a run, with every setting that is not the preset's."""
    usual = make_config(config.model, config.data, config.preset)
    changed = [
        f" --set {name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for part in RunConfig.parts
        for name, value in vars(getattr(config, part)).items()
        if value != getattr(getattr(usual, part), name)
    ]
    command = f"bin/svi-train --model {config.model} --data {config.data} --preset {config.preset}"
    return command + "".join(changed) + " --seed SEED"


def _same_command(loaded: list[Checkpoint]) -> None:
    first = loaded[0].config.to_dict() | {"seed": None}
    for trained in loaded:
        if trained.config.to_dict() | {"seed": None} != first:
            raise UserError(f"{trained.path} was trained with other settings than the first run")
        if trained.config.data not in DATASETS:
            raise UserError("a shipped checkpoint is trained on a registered data set")
        if trained.training is None or trained.step < trained.config.train.steps:
            raise UserError(f"{trained.path} is not a finished run")


def _measure(
    run: Path, trained: Checkpoint, images: int, particles: int, mnist: Path | None
) -> dict:
    """One seed's entry; kept beside the run, so that measuring many can be interrupted."""
    weights = hashlib.sha256(trained.path.read_bytes()).hexdigest()[:12]
    kept = run / f"figures-{images}x{particles}-{weights}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    data = trained.config.data
    assert trained.training is not None
    entry = {
        "seed": trained.config.seed,
        "steps": trained.step,
        "training_seconds": round(trained.training["seconds"]),
        "machine": trained.training["machine"],
        "few": evaluate(
            trained.model,
            load(data, images=images, mnist=mnist),
            particles=particles,
            limit=math.inf,
        ),
        "crowded": evaluate(
            trained.model,
            load(data, images=images, objects=CROWDED, mnist=mnist),
            particles=0,
            limit=math.inf,
        ),
    }
    write_json(kept, entry)
    return entry


def _card(content: dict) -> str:
    runs = content["runs"]
    few, crowded = [r["few"] for r in runs], [r["crowded"] for r in runs]
    columns = (
        (few, "count_accuracy", 4),
        (crowded, "count_accuracy", 4),
        (few, "nll", 2),
        (few, "nll_stderr", 2),
        (few, "ari", 4),
        (crowded, "ari", 4),
    )
    rows = [
        "| " + " | ".join([str(run["seed"]), *cells, f"{run['training_seconds'] / 60:.1f}"]) + " |"
        for run, *cells in zip(
            runs,
            *([_number(figure[key], digits) for figure in kind] for kind, key, digits in columns),
            strict=True,
        )
    ]
    means = [_spread(*column) for column in columns]
    train = content["settings"]["train"]
    return "\n".join(
        [
            f"# {content['name']}",
            "",
            f"![Inferred test scenes]({content['name']}.png)",
            "",
            f"Trained by `{content['command']}`: {train['steps']:,} steps of"
            f" {train['batch_size']} images; {content['parameters']:,} parameters. The weights are"
            f" those of seed {runs[0]['seed']}; every seed that was run is listed.",
            "",
            f"Measured on {few[0]['images']:,} held-out scenes of the training's counts and"
            f" {crowded[0]['images']:,} of {CROWDED[0]} objects, a number never trained on. The"
            f" bound on -log p(x), in nats per image, is with {few[0]['particles']} importance"
            " samples and exact discrete masses; its standard error is over images. ARI is of the"
            " foreground.",
            "",
            f"| seed | count right | count right, {CROWDED[0]} objects | -log p(x) <= |"
            f" standard error | ARI | ARI, {CROWDED[0]} objects | training, minutes |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            f"| mean +- sd | {' | '.join(means)} | |",
            "",
            f"Trained on: {'; '.join(sorted({run['machine'] for run in runs}))}.",
            "",
        ]
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(figures: list[dict], key: str, digits: int) -> str:
    """Mean +- standard deviation over seeds."""
    values = [figure[key] for figure in figures if figure[key] is not None]
    if not values:
        return "-"
    mean = _number(statistics.mean(values), digits)
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
