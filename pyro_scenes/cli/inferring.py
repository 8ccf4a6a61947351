"""svi-infer."""

from __future__ import annotations

import math
from pathlib import Path

import click

from pyro_scenes.cli.options import (
    FILE,
    PICTURED,
    Command,
    device_option,
    force_option,
    given,
    limit_option,
    mnist_option,
    prior_option,
    seed_option,
    version_option,
)


@click.command("svi-infer", cls=Command)
@click.argument("checkpoint")
@click.argument("images", type=FILE, nargs=-1)
@click.option("--out", type=FILE, metavar="FILE",
              help="Write the objects as JSON; with --sample or --render, the images as npz.")
# Options of pictures go by the pictures' names inside.
@click.option("--figure", "inference", type=FILE, metavar="FILE",
              help="Draw inputs, reconstructions, places and sprites; with --sample or --render, "
              "the first 64 of the images.")
@click.option("--traverse", "traversal", type=FILE, metavar="FILE",
              help="Draw one object as it is moved and as its appearance is changed.")
@click.option("--swap", type=FILE, metavar="FILE", help="Draw scenes with their objects swapped.")
@click.option("--steps", type=FILE, metavar="FILE", help="Draw scenes object after object.")
@click.option("--tables", type=FILE, metavar="FILE",
              help="Draw scenes as graphs, with tables of their nodes and edges.")
@click.option("--templates", type=FILE, metavar="FILE",
              help="Draw what each category looks like, and what its attributes change.")
@click.option("--graph", type=click.Choice(["json", "graphml"]),
              help="Write scene graphs in place of objects: a list of node-link objects, or a "
              "folder with a GraphML file an image.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N",
              help="Draw N images from the model in place of IMAGES; --seed, --prior and --mnist "
              "go with it.")
@click.option("--render", type=FILE, metavar="FILE",
              help="Draw the scenes in a JSON file, such as --out writes, perhaps changed or "
              "written by hand, on a canvas of the training's size, in place of finding those in "
              "IMAGES.")
@click.option("--data", metavar="NAME|FILE",
              help="With --sample and a prior that is fitted: where the run's images are now.")
@prior_option
@limit_option
@seed_option
@device_option
@mnist_option
@force_option
@version_option
def infer(checkpoint: str, images: tuple[Path, ...], out: Path | None, graph: str | None,
          sample: int | None, render: Path | None, data: str | None, priors: tuple[str, ...],
          max_objects: int | None, seed: int, device: str, mnist: Path | None, force: bool,
          **drawings: Path | None) -> None:
    """Find the objects in IMAGES (an npz file, or PNG files and folders of them).

    CHECKPOINT is a run's folder, a file, or the name of a shipped checkpoint (svi-eval --list).
    Pictures show the first images that suit.
    """
    if bool(images) + bool(sample) + bool(render) != 1:
        raise click.UsageError("give either IMAGES, --sample N or --render FILE")
    wanted = {name: path for name, path in drawings.items() if path}
    if render and out and out.resolve() == render.resolve():
        raise click.UsageError("--out would take the place of the scenes that --render reads")
    if not out and not wanted:
        raise click.UsageError("nothing to write: give --out, --figure or another picture")
    if not images and wanted.keys() - {"inference"}:
        raise click.UsageError(
            "--traverse, --swap, --steps, --tables and --templates need IMAGES")
    if graph and not (images and out):
        raise click.UsageError("--graph needs IMAGES and --out")
    if priors and not sample:
        raise click.UsageError("--prior goes with --sample")
    if data and not priors:
        raise click.UsageError("--data goes with --sample and --prior")
    if not images and max_objects is not None:
        raise click.UsageError("--max-objects goes with IMAGES")
    if not sample and (given("mnist") or given("seed")):
        raise click.UsageError("--seed and --mnist go with --sample")
    from pyro_scenes import checkpoint as checkpoints
    from pyro_scenes import limits, pictures, plots, report, swaps
    from pyro_scenes.data import SceneData, save_npz
    from pyro_scenes.evaluate import infer as find
    from pyro_scenes.files import check_absent, read_json

    if graph == "graphml" and out:  # whatever --force says
        check_absent(out)
    report.claim([out], wanted.values(), force)
    trained = checkpoints.load(checkpoint, device)
    model = trained.model
    if sample:
        swapped = swaps.parse(
            priors, model, lambda: report.source(trained, data), mnist=mnist, seed=seed
        )
        with model.priors(**swapped):
            made, counts = pictures.sample_counted(model, sample, seed)
    elif render:
        composed = pictures.with_objects(model).compose(read_json(render, kind=list))
        limits.check(render, 8 * len(composed) * math.prod(model.image_shape))
        made, counts = pictures.rendered(model, composed), composed.counts.cpu()
    if not images:
        drawn = {path: plots.samples_figure(made[:PICTURED]) for path in wanted.values()}
        if out:
            pixels = (made * 255).round().byte().permute(0, 2, 3, 1).numpy()
            truth = {} if counts is None else {"counts": counts.numpy()}
            save_npz(out, SceneData.from_images("samples", pixels, **truth))
    else:
        scenes = report.read_images(model, images)
        drawn = pictures.draw(model, scenes.batch(slice(0, PICTURED)), wanted, max_objects)
        if out:
            found, _ = find(pictures.with_objects(model), scenes, max_objects)
            report.write_objects(out, found, graph)
    for path, picture in drawn.items():
        plots.save(picture, path)
