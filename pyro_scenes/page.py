"""One HTML page about a trained model: what it is, its figures, and what it makes of scenes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch
from torch import Tensor

from pyro_scenes import markup, pictures, plots, report
from pyro_scenes.checkpoint import Checkpoint
from pyro_scenes.data import SceneData
from pyro_scenes.errors import NothingToDraw
from pyro_scenes.evaluate import batches, evaluate
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.scene import Scene

SHOWN = 12  # worst or miscounted images of a data set, at most
SAMPLES = 24
CHOICE = 64  # images that traversals and swaps are made from: the first that suit
# Pictures of what the model knows: heading, caption.
DRAWN = {
    "templates": (
        "Templates", "What each category looks like, as its attributes vary: of many, those two "
        "that change templates most."),
    "traversal": (
        "Traversal", "One object of the first image that has one; each row changes one thing."),
    "swap": (
        "Swap", "Reconstructions, and the same scenes with each object's appearance given to the "
        "next."),
}


def build(
    trained: Checkpoint, sets: Mapping[str, SceneData], particles: int = 10, seed: int = 0
) -> str:
    """The page. Parts that do not apply to the model, the data or the checkpoint are left out.

    :param sets: images to measure the model on and to show, by label; pictures of changed scenes
        are made from the first.
    :param particles: importance samples an image. :param seed: of those and of the samples.
    :raises UserError: if the images do not suit the model.
    """
    model = trained.model
    # No limit on objects: a run that was stopped early may see them everywhere.
    figures = {
        label: evaluate(model, data, particles=particles, seed=seed, limit=math.inf)
        for label, data in sets.items()
    }
    parts = {"Training": _training(trained), "Held-out figures": _measured(figures)}
    for label, data in sets.items():
        parts[f"Scenes: {label}"] = _scenes(model, data, figures[label])
    parts["Samples"] = markup.figure(
        plots.samples_figure(pictures.sample(model, SAMPLES, seed)),
        f"A grid of {SAMPLES} images drawn from the model",
        "Drawn from the prior: the means of the images, without the noise of their pixels.",
    )
    images = next(iter(sets.values())).batch(slice(0, CHOICE))
    for name in pictures.applying(model):
        if name in DRAWN:
            heading, caption = DRAWN[name]
            parts[heading] = _changed(name, model, images, caption)
    parts = {heading: part for heading, part in parts.items() if part}
    return markup.document(trained.name, _about(trained), parts)


def _about(trained: Checkpoint) -> str:
    """What it is, and what made it."""
    model, config, steps = trained.model, trained.config, trained.config.train.steps
    channels, height, width = model.image_shape
    facts = {
        "Model": config.model,
        "Data": config.data,
        "Preset": config.preset,
        "Seed": str(config.seed),
        "Steps": f"{trained.step:,}" + (f" of {steps:,}" if trained.step < steps else ""),
        "Parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "Images": f"{height} x {width} x {channels}",
    }
    if trained.training:
        minutes = trained.training["seconds"] / 60
        facts |= {"Trained in": f"{minutes:.0f} minutes" if minutes >= 1 else "less than a minute",
                  "Trained on": trained.training["machine"]}
    described = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd></div>"
        for name, fact in facts.items()
    )
    settings = json.dumps(config.to_dict(), indent=2)
    return (
        f"<dl>\n{described}\n</dl>\n"
        f"<p>Made by</p>\n<pre><code>{escape(config.command(config.seed))}</code></pre>\n"
        f"<details>\n<summary>Every setting</summary>\n<pre>{escape(settings)}</pre>\n</details>"
    )


def _training(trained: Checkpoint) -> str:
    """Curves; shipped checkpoints have no history."""
    history = (trained.training or {}).get("history")
    if not history:
        return ""
    return markup.figure(
        plots.training_curves(history), f"Curves of {', '.join(history)} over the training steps"
    )


def _measured(figures: Mapping[str, dict[str, Any]]) -> str:
    """A table with a row a data set."""
    rows = list(figures.values())
    table = markup.table(report.columns(figures))
    table += "".join(f"\n<p>{escape(line)}.</p>" for line in report.missing(figures))
    if all(row["nll"] is None for row in rows):
        return table
    return table + (
        "\n<p>-log p(x) is an upper bound in nats an image; importance samples:"
        f" {rows[0]['particles']:,}. Lower is better.</p>"
    )


def _scenes(model: GenerativeModel, data: SceneData, figures: dict[str, Any]) -> str:
    """What the model makes of a data set: the first images, the counts, and the worst."""
    errors, counts = _scan(model, data)
    finds = isinstance(model, SceneModel)
    shown = data.batch(slice(0, pictures.IMAGES))
    parts = [
        f"<p>{len(data):,} images of {escape(data.name)}.</p>",
        "<h3>Inferred scenes</h3>" if finds else "<h3>Reconstructions</h3>",
        markup.figure(
            pictures.inference(model, shown, math.inf),
            f"The first {len(shown)} images, each beside its reconstruction"
            + (" with boxes round the objects found, their places, and each object alone"
               if finds else ""),
        ),
    ]
    if figures["count_confusion"]:
        assert counts is not None and data.counts is not None
        true = torch.from_numpy(data.counts)
        wrong = (counts != true).nonzero().flatten()
        parts += [
            "<h3>Counts</h3>",
            f"<p>{len(data) - len(wrong):,} of {len(data):,} are right.</p>",
            markup.confusion(figures["count_confusion"]),
        ]
        if len(wrong):
            chosen = wrong[:SHOWN]
            parts += [
                "<h3>Miscounted</h3>",
                _pairs(
                    model, data, chosen,
                    [f"true {true[i]}, found {counts[i]}" for i in chosen.tolist()],
                    f"{_first(len(chosen), len(wrong))} whose count is wrong. ",
                ),
            ]
    worst = errors.argsort(descending=True)[:SHOWN]
    parts += [
        "<h3>Worst reconstructions</h3>",
        _pairs(
            model, data, worst, [f"error {errors[i]:,.2f}" for i in worst.tolist()],
            f"Of {len(data):,} images, those with the largest error: the squared difference, "
            "summed over pixels and channels. ",
        ),
    ]
    return "\n".join(parts)


def _first(number: int, total: int) -> str:
    if total == 1:
        return "The only image"
    return f"The {total:,} images" if number == total else f"The first {number} of {total:,} images"


@torch.no_grad()
def _reconstruct(model: GenerativeModel, images: Tensor) -> tuple[Tensor, Scene | None]:
    """The means of the images as the model sees them, and the scenes if it has objects."""
    images = images.to(model.device)
    if not isinstance(model, SceneModel):
        return model.reconstruct(images), None
    scene = model.infer(images, math.inf)
    return model.render(scene), scene


def _scan(model: GenerativeModel, data: SceneData) -> tuple[Tensor, Tensor | None]:
    """The squared error of each image's reconstruction, (N,), and the objects found, (N,)."""
    errors, counts = [], []
    for part in batches(data):
        images = data.batch(part)
        drawn, scene = _reconstruct(model, images)
        errors.append((drawn.cpu() - images).square().flatten(1).sum(1))
        if scene is not None:
            counts.append(scene.counts.cpu())
    return torch.cat(errors), torch.cat(counts) if counts else None


def _pairs(
    model: GenerativeModel, data: SceneData, index: Tensor, captions: Sequence[str], text: str
) -> str:
    """Some images beside their reconstructions."""
    images = data.batch(index.numpy())
    drawn, scene = _reconstruct(model, images)
    boxes = " with boxes round the objects found and their number" if scene is not None else ""
    return markup.figure(
        plots.pairs_figure(images, drawn, captions, scene),
        f"Pairs of an image and its reconstruction: {'; '.join(captions)}",
        f"{text}Each stands beside its reconstruction{boxes}.",
    )


def _changed(name: str, model: GenerativeModel, images: Tensor, caption: str) -> str:
    """A picture of changed scenes; empty where no image has the objects that it needs."""
    try:
        figure = pictures.PICTURES[name].draw(model, images, math.inf)
    except NothingToDraw:
        return ""
    return markup.figure(figure, caption, caption)
