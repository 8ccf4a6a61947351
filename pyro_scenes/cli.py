"""The commands: svi-train, svi-eval, svi-infer, svi-bench, svi-ship and make-scenes.

torch and Pyro are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pyro_scenes import __version__
from pyro_scenes.errors import UserError


class Command(click.Command):
    """Bad input becomes one line on stderr and exit status 2, an interruption status 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}"
        except KeyboardInterrupt as interrupt:
            click.echo(str(interrupt) or "Interrupted.", err=True)
            ctx.exit(130)
        click.echo("Error: " + " ".join(message.split()), err=True)
        ctx.exit(2)


class CountRange(click.ParamType):
    """Numbers of objects: 7, or 0-3 with both ends included, after a prefix."""

    name = "A-B"

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        low, _, high = value.removeprefix(self.prefix).partition("-")
        high = high or low
        if not (value.startswith(self.prefix) and low.isdecimal() and high.isdecimal()):
            self.fail(f"{value!r} is not like {self.prefix}7 or {self.prefix}0-3", param, ctx)
        if int(low) > int(high):
            self.fail(f"{value!r} ends before it begins", param, ctx)
        return int(low), int(high)


# Images that pictures are made from: the first so many.
PICTURED = 64

FILE = click.Path(path_type=Path)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
force_option = click.option("--force", is_flag=True, help="Overwrite files that exist.")
limit_option = click.option(
    "--max-objects", metavar="N", type=click.IntRange(min=0),
    help="Most objects in an image; default: the model's own. An image that shows more is an "
    "error.")
mnist_option = click.option(
    "--mnist", type=FILE, metavar="DIR",
    help="Folder with MNIST's four IDX files, for multi-mnist data.")
objects_option = click.option(
    "--objects", type=CountRange(),
    help="Objects a scene, such as 7 or 0-3, for data by name; default: the data set's own.")
seed_option = click.option(
    "--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True)
version_option = click.version_option(__version__, prog_name="pyro_scenes")


@click.command("svi-train", cls=Command)
@click.option("--model", metavar="NAME", required=True, help="A model by name, such as lavae.")
@click.option("--data", metavar="NAME|FILE", required=True,
              help="A data set by name, such as multi-dsprites, or an npz file, whose last 5% is "
              "held out.")
@click.option("--preset", metavar="NAME", default="fast", show_default=True,
              help="fast, or paper for the paper's networks and schedule.")
@click.option("--steps", metavar="N", type=click.IntRange(min=1),
              help="Training steps; default: the preset's.")
@seed_option
@device_option
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="Change a field of the configuration. May be repeated.")
@click.option("--out", type=FILE, metavar="DIR", help="Default: runs/MODEL-DATA-seedSEED.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@click.option("--force", is_flag=True, help="Replace the run in --out.")
@mnist_option
@version_option
def train(model: str, data: str, preset: str, steps: int | None, seed: int, device: str,
          settings: tuple[str, ...], out: Path | None, resume: bool, force: bool,
          mnist: Path | None) -> None:
    """Train a model and measure it on held-out scenes.

    The run's folder gets checkpoint.pt, config.json, history.json and inference.png.
    """
    if resume and force:
        raise click.UsageError("--resume keeps the run and --force replaces it: give one of them")
    from pyro_scenes import report, training
    from pyro_scenes.config import make_config

    config = make_config(model, data, preset, settings, steps, seed)
    out = out or Path("runs") / f"{model}-{Path(data).stem}-seed{seed}"
    try:
        training.train(config, out, resume=resume, force=force, device=device, mnist=mnist)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Interrupted. The same command with --resume goes on with the run in {out}.")
    click.echo(report.finish(config, out, device, mnist))


@click.command("svi-eval", cls=Command)
@click.argument("checkpoint", required=False)
@click.option("--data", metavar="NAME|FILE", help="A data set by name, or an npz file.")
@click.option("--images", metavar="N", type=click.IntRange(min=1), help="Only the first so many.")
@click.option("--particles", metavar="N", type=click.IntRange(min=1), default=100,
              show_default=True, help="Importance samples an image.")
@objects_option
@limit_option
@seed_option
@click.option("--json", "out", type=FILE, metavar="FILE", help="Write the figures of merit.")
@click.option("--figures", type=FILE, metavar="DIR",
              help="Draw inference.png, samples.png, traversal.png and swap.png.")
@device_option
@mnist_option
@force_option
@click.option("--list", "list_them", is_flag=True, help="Show the shipped checkpoints.")
@version_option
def evaluate(checkpoint: str | None, data: str | None, images: int | None, particles: int,
             objects: tuple[int, int] | None, max_objects: int | None, seed: int,
             out: Path | None, figures: Path | None, device: str, mnist: Path | None, force: bool,
             list_them: bool) -> None:
    """Measure CHECKPOINT on held-out scenes.

    CHECKPOINT is a run's folder, a file, or the name of a shipped checkpoint.
    """
    if not list_them and (checkpoint is None or data is None):
        raise click.UsageError("give a CHECKPOINT and --data, or --list")
    from pyro_scenes import checkpoint as checkpoints
    from pyro_scenes import pictures, plots, report
    from pyro_scenes.data import load
    from pyro_scenes.data.files import write_json
    from pyro_scenes.evaluate import evaluate as measure

    if list_them:
        click.echo("\n".join(checkpoints.shipped()) or "No checkpoint is shipped.")
        return
    assert checkpoint is not None and data is not None
    drawings = {name: figures / f"{name}.png" for name in pictures.PICTURES} if figures else {}
    report.claim([out], drawings.values(), force)
    model = checkpoints.load(checkpoint, device).model
    scenes = load(data, images=images, objects=objects, mnist=mnist)
    # Drawn before the long part and written after it: what fails does so early, and leaves nothing.
    drawn = {path: pictures.PICTURES[name](model, scenes.batch(slice(0, PICTURED)), max_objects)
             for name, path in drawings.items()}
    result = measure(model, scenes, particles=particles, seed=seed, limit=max_objects)
    click.echo(report.table({scenes.name: result}))
    if out:
        write_json(out, result)
    for path, figure in drawn.items():
        plots.save(figure, path)


@click.command("svi-infer", cls=Command)
@click.argument("checkpoint")
@click.argument("images", type=FILE, nargs=-1)
@click.option("--out", type=FILE, metavar="FILE",
              help="Write the objects as JSON; with --sample, the images as npz.")
@click.option("--figure", type=FILE, metavar="FILE",
              help="Draw inputs, reconstructions, places and sprites; with --sample, the images.")
@click.option("--traverse", type=FILE, metavar="FILE",
              help="Draw one object as it is moved and as its appearance is changed.")
@click.option("--swap", type=FILE, metavar="FILE", help="Draw scenes with their objects swapped.")
@click.option("--graph", type=click.Choice(["json", "graphml"]),
              help="Write scene graphs in place of objects: a list of node-link objects, or a "
              "folder with a GraphML file an image.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N",
              help="Draw N images from the model in place of IMAGES.")
@click.option("--prior", metavar="count=uniform:A-B", type=CountRange("count=uniform:"),
              help="Sample with this prior in place of the model's, such as count=uniform:5-6.")
@limit_option
@seed_option
@device_option
@force_option
@version_option
def infer(checkpoint: str, images: tuple[Path, ...], out: Path | None, figure: Path | None,
          traverse: Path | None, swap: Path | None, graph: str | None, sample: int | None,
          prior: tuple[int, int] | None, max_objects: int | None, seed: int, device: str,
          force: bool) -> None:
    """Find the objects in IMAGES (an npz file, or PNG files and folders of them).

    CHECKPOINT is a run's folder, a file, or the name of a shipped checkpoint (svi-eval --list).
    Pictures show the first images that suit.
    """
    if bool(images) == bool(sample):
        raise click.UsageError("give either IMAGES or --sample N")
    if not any((out, figure, traverse, swap)):
        raise click.UsageError("nothing to write: give --out, --figure or another picture")
    if sample and (traverse or swap):
        raise click.UsageError("--traverse and --swap need IMAGES")
    if graph and (sample or not out):
        raise click.UsageError("--graph needs IMAGES and --out")
    if prior and not sample:
        raise click.UsageError("--prior goes with --sample")
    from pyro_scenes import checkpoint as checkpoints
    from pyro_scenes import pictures, plots, report
    from pyro_scenes.data import SceneData, save_npz
    from pyro_scenes.evaluate import infer as find

    wanted = {"inference": figure, "traversal": traverse, "swap": swap}
    report.claim([out], wanted.values(), force)
    model = checkpoints.load(checkpoint, device).model
    if sample:
        made = pictures.sample(model, sample, seed, prior)
        drawn = {figure: plots.samples_figure(made[:PICTURED])} if figure else {}
        if out:
            pixels = (made * 255).round().byte().permute(0, 2, 3, 1).numpy()
            save_npz(out, SceneData.from_images("samples", pixels))
    else:
        scenes = report.read_images(model, images)
        drawn = {path: pictures.PICTURES[name](model, scenes.batch(slice(0, PICTURED)), max_objects)
                 for name, path in wanted.items() if path}
        if out:
            found, _ = find(pictures.with_objects(model), scenes, max_objects)
            report.write_objects(out, found, graph)
    for path, picture in drawn.items():
        plots.save(picture, path)


@click.command("svi-bench", cls=Command)
@click.option("--quick", is_flag=True, help="Fewer and smaller measurements.")
@click.option("--json", "out", type=FILE, metavar="FILE", help="Write the measurements.")
@click.option("--readme", type=FILE, metavar="FILE", help="Put the table into a page.")
@device_option
@force_option
@version_option
def bench(quick: bool, out: Path | None, readme: Path | None, device: str, force: bool) -> None:
    """Time training and evaluation on this machine."""
    from pyro_scenes import bench as benchmarks
    from pyro_scenes import report
    from pyro_scenes.data.files import write_json

    report.claim([out], [], force)
    result = benchmarks.run(device, quick)
    click.echo(benchmarks.table(result))
    if out:
        write_json(out, result)
    if readme:
        report.insert(readme, "svi-bench", f"```\n{benchmarks.table(result)}\n```")


@click.command("svi-ship", cls=Command)
@click.argument("name", required=False)
@click.argument("runs", nargs=-1, type=FILE)
@click.option("--images", metavar="N", type=click.IntRange(min=1), default=10_000,
              show_default=True, help="Test images of each kind.")
@click.option("--particles", metavar="K", type=click.IntRange(min=1), default=100,
              show_default=True)
@click.option("--out", type=FILE, metavar="DIR", help="Default: inside the package.")
@click.option("--readme", type=FILE, metavar="FILE",
              help="Put a table of all that has shipped into a page.")
@mnist_option
@device_option
@version_option
def ship(name: str | None, runs: tuple[Path, ...], images: int, particles: int, out: Path | None,
         readme: Path | None, mnist: Path | None, device: str) -> None:
    """Measure RUNS, one command's seeds, and ship the first one's weights as NAME with a card."""
    from pyro_scenes import cards, report

    if not readme and not (name and runs):
        raise click.UsageError("give a NAME and RUNS, or --readme")
    if name and runs:
        folder = {"folder": out} if out else {}
        click.echo(cards.ship(name, list(runs), images=images, particles=particles, mnist=mnist,
                              device=device, **folder))
    if readme:
        report.insert(readme, "svi-ship", cards.table())


@click.command("make-scenes", cls=Command)
@click.argument("name", required=False)
@click.option("--images", metavar="N", type=click.IntRange(min=1), default=10_000,
              show_default=True)
@objects_option
@seed_option
@click.option("--from-pyro", "source", type=FILE, metavar="FILE",
              help="Convert a file of pyro.contrib.examples.multi_mnist in place of making NAME.")
@click.option("--trust-pickled-labels", "trust", is_flag=True,
              help="Read that file's labels. Lists of digits are all that is read; a pickle that "
              "asks for anything else is refused.")
@click.option("--out", type=FILE, metavar="FILE", help="Default: NAME.npz.")
@mnist_option
@force_option
@version_option
def make_scenes(name: str | None, images: int, objects: tuple[int, int] | None, seed: int,
                source: Path | None, trust: bool, out: Path | None, mnist: Path | None,
                force: bool) -> None:
    """Make an npz file of scenes with their truth.

    NAME is multi-dsprites, multi-mnist-1k, multi-mnist-10k, multi-sprites, multi-mnist or
    multi-mnist-new-digits.
    """
    if bool(name) == bool(source):
        raise click.UsageError("give either a NAME or --from-pyro FILE")
    if source and not out:
        raise click.UsageError("--from-pyro needs --out")
    if trust and not source:
        raise click.UsageError("--trust-pickled-labels goes with --from-pyro")
    given = click.get_current_context().get_parameter_source
    for option in ("images", "objects", "seed", "mnist"):
        if source and given(option) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{option} goes with a NAME")
    from pyro_scenes import report
    from pyro_scenes.data import DATASETS, load_pyro_mnist, make, save_npz

    out = out or Path(f"{name}.npz")
    report.claim([out], [], force)
    if source:
        scenes = load_pyro_mnist(source, trust)
        assert scenes.counts is not None
        low, high = scenes.counts.min(), scenes.counts.max()
    else:
        assert name is not None
        scenes = make(name, images, objects=objects, seed=seed, mnist=mnist)
        low, high = objects or DATASETS[name].objects
    save_npz(out, scenes)
    click.echo(f"{out}: {len(scenes):,} images of {' x '.join(map(str, scenes.shape))}, "
               f"{low} to {high} objects each")
