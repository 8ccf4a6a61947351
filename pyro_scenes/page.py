"""One HTML page about a trained model: its pictures are inside, and it fetches and runs nothing."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pyro_scenes import __version__, checkpoint, pictures, plots, report
from pyro_scenes.checkpoint import Checkpoint
from pyro_scenes.data import SceneData
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import BATCH, evaluate
from pyro_scenes.models import GenerativeModel, SceneModel
from pyro_scenes.scene import Scene

SHOWN = 12  # worst or miscounted images of a data set, at most
SAMPLES = 24
CHOICE = 64  # images that traversals and swaps are made from: the first that suit
# Pictures of what the model knows: heading, caption.
DRAWN = {
    "templates": ("Templates", "What each category looks like, as its attributes vary."),
    "traversal": (
        "Traversal", "One object of the first image that has one; each row changes one thing."),
    "swap": (
        "Swap", "Reconstructions, and the same scenes with each object's appearance given to the "
        "next."),
}

# Nothing is fetched and no script runs, whatever a name in the page may hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --pale: #626a73; --page: #ffffff;
  --panel: #f5f6f8; --line: #d9dde2; --link: #1f5fa8; --right: 47 155 95; --wrong: 214 69 65; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --pale: #9aa3ad; --page: #15181c; --panel: #1e2228; --line: #343a42;
    --link: #7db4f0; }
  img { filter: brightness(0.9); }
}
body { margin: 0 auto; max-width: 80rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem;
  background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 0.75rem; font-size: 1.4rem; overflow-wrap: anywhere; }
h3 { margin: 1.75rem 0 0.5rem; font-size: 1.05rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
a { color: var(--link); }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 1.5rem 0 0; padding: 0;
  list-style: none; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr));
  gap: 0.75rem 1.5rem; margin: 1.5rem 0; }
dt, figcaption, caption, footer { color: var(--pale); font-size: 0.875rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { margin: 0.5rem 0; padding: 0.75rem 1rem; overflow-x: auto; background: var(--panel);
  border-radius: 0.5rem; font-size: 0.875rem; }
summary { cursor: pointer; color: var(--pale); }
.wide { overflow-x: auto; }
figure { margin: 0.75rem 0; }
figcaption { margin-top: 0.25rem; max-width: 46rem; }
img { display: block; box-sizing: border-box; max-width: 100%; height: auto; background: white;
  border: 1px solid var(--line); border-radius: 0.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; padding-top: 0.35rem; text-align: left; }
th, td { padding: 0.35rem 0.75rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; }
thead th { white-space: normal; vertical-align: bottom; }
tr > :first-child { padding-left: 0; text-align: left; }
.counts tr > * { padding: 0.35rem 0.75rem; text-align: center; }
.counts td { min-width: 3.5rem; border: 1px solid var(--line); }
.right { background: rgb(var(--right) / calc(0.6 * var(--share))); }
.wrong { background: rgb(var(--wrong) / calc(0.15 + 0.45 * var(--share))); }
footer { margin-top: 3rem; }
@media (max-width: 48rem) { .wide > img { max-width: 56rem; } }
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""


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
    parts["Samples"] = _figure(
        plots.samples_figure(pictures.sample(model, SAMPLES, seed)),
        f"A grid of {SAMPLES} images drawn from the model",
        "Drawn from the prior: the means of the images, without the noise of their pixels.",
    )
    images = next(iter(sets.values())).batch(slice(0, CHOICE))
    for name in pictures.applying(model):
        if name in DRAWN:
            heading, caption = DRAWN[name]
            parts[heading] = _changed(name, model, images, caption)
    return _page(trained, {heading: part for heading, part in parts.items() if part})


def _page(trained: Checkpoint, parts: Mapping[str, str]) -> str:
    name = escape(_name(trained.path))
    links, sections = [], []
    for i, (heading, part) in enumerate(parts.items()):
        links.append(f'<li><a href="#part-{i}">{escape(heading)}</a></li>')
        sections.append(
            f'<section aria-labelledby="part-{i}">\n<h2 id="part-{i}">{escape(heading)}</h2>\n'
            f"{part}\n</section>"
        )
    return "\n".join((
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',  # or browsers ask the server for one
        f"<title>{name}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f"<header>\n<h1>{name}</h1>\n{_about(trained)}\n</header>",
        '<nav aria-label="Parts of this page">',
        "<ul>",
        *links,
        "</ul>",
        "</nav>",
        "<main>",
        *sections,
        "</main>",
        f"<footer>Written by svi-report of pyro_scenes {__version__}.</footer>",
        "</body>",
        "</html>",
        "",
    ))


def _name(path: Path) -> str:
    """What a checkpoint is called: its run's folder, or the file."""
    return path.resolve().parent.name if path.name == checkpoint.FILE else path.stem


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
    return _figure(
        plots.training_curves(history), f"Curves of {', '.join(history)} over the training steps"
    )


def _measured(figures: Mapping[str, dict[str, Any]]) -> str:
    """A table with a row a data set."""
    rows = list(figures.values())
    columns = {
        "": list(figures),
        "images": [f"{row['images']:,}" for row in rows],
    }
    for heading, write in report.COLUMNS.items():
        cells = [write(row) for row in rows]
        if any(cell != "-" for cell in cells):
            columns[heading] = cells
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
        for label, *cells in zip(*columns.values())
    )
    table = (f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
             f"<tbody>\n{body}</tbody>\n</table></div>")
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
        _figure(
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
            _confusion(figures["count_confusion"]),
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
    images = images.to(next(model.parameters()).device)
    if not isinstance(model, SceneModel):
        return model.reconstruct(images), None
    scene = model.infer(images, math.inf)
    return model.render(scene), scene


def _scan(model: GenerativeModel, data: SceneData) -> tuple[Tensor, Tensor | None]:
    """The squared error of each image's reconstruction, (N,), and the objects found, (N,)."""
    errors, counts = [], []
    for start in range(0, len(data), BATCH):
        images = data.batch(slice(start, start + BATCH))
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
    return _figure(
        plots.pairs_figure(images, drawn, captions, scene),
        f"Pairs of an image and its reconstruction: {'; '.join(captions)}",
        f"{text}Each stands beside its reconstruction{boxes}.",
    )


def _confusion(confusion: dict[str, list[Any]]) -> str:
    """A row a true count, a column an inferred one; shaded by the share of the row."""
    head = "".join(f'<th scope="col">{count}</th>' for count in confusion["inferred"])
    body = ""
    for true, row in zip(confusion["true"], confusion["table"], strict=True):
        body += f'<tr><th scope="row">{true}</th>'
        for inferred, images in zip(confusion["inferred"], row, strict=True):
            kind = "right" if inferred == true else "wrong"
            mark = f' class="{kind}" style="--share: {images / sum(row):.3f}"' if images else ""
            body += f"<td{mark}>{images:,}</td>"
        body += "</tr>\n"
    return (
        '<div class="wide"><table class="counts">\n'
        "<caption>Images by their true count, down, and the count found, across.</caption>\n"
        f'<thead><tr><th scope="col">true \\ found</th>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>\n</table></div>"
    )


def _changed(name: str, model: GenerativeModel, images: Tensor, caption: str) -> str:
    """A picture of changed scenes; empty where no image has the objects that it needs."""
    try:
        figure = pictures.PICTURES[name].draw(model, images, math.inf)
    except UserError:
        return ""
    return _figure(figure, caption, caption)


def _figure(figure: Figure, alt: str, caption: str = "") -> str:
    """A figure inside the page, with what it shows in words."""
    drawn = Image.fromarray(plots.pixels(figure))
    file = BytesIO()
    drawn.save(file, "png", optimize=True)
    said = f"<figcaption>{escape(caption)}</figcaption>\n" if caption else ""
    return (
        f'<figure>\n<div class="wide"><img src="data:image/png;base64,'
        f'{b64encode(file.getvalue()).decode()}" width="{drawn.width}" height="{drawn.height}" '
        f'alt="{escape(alt)}"></div>\n{said}</figure>'
    )
