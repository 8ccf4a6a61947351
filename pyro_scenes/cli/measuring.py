"""What measures: svi-eval, svi-bench for speed, and svi-ship for the runs of a command."""

from __future__ import annotations

from pathlib import Path

import click

from pyro_scenes.cli.options import (
    FILE,
    PICTURED,
    Command,
    device_option,
    force_option,
    limit_option,
    mnist_option,
    nll_option,
    objects_option,
    seed_option,
    version_option,
)


@click.command("svi-eval", cls=Command)
@click.argument("checkpoint", required=False)
@click.option("--data", metavar="NAME|FILE", help="A data set by name, or an npz file.")
@click.option("--images", metavar="N", type=click.IntRange(min=1), help="Only the first so many.")
@click.option("--particles", metavar="N", type=click.IntRange(min=1), default=100,
              show_default=True, help="Importance samples an image.")
@nll_option
@objects_option
@limit_option
@seed_option
@click.option("--json", "out", type=FILE, metavar="FILE", help="Write the figures of merit.")
@click.option("--figures", type=FILE, metavar="DIR",
              help="Draw every picture that suits the model, inference.png and others.")
@device_option
@mnist_option
@force_option
@click.option("--list", "list_them", is_flag=True, help="Show the shipped checkpoints.")
@version_option
def evaluate(checkpoint: str | None, data: str | None, images: int | None, particles: int,
             nll_images: int | None, objects: tuple[int, int] | None, max_objects: int | None,
             seed: int, out: Path | None, figures: Path | None, device: str, mnist: Path | None,
             force: bool, list_them: bool) -> None:
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
    model = checkpoints.load(checkpoint, device).model
    suited = pictures.applying(model) if figures else []
    drawings = {name: figures / f"{name}.png" for name in suited if figures}
    report.claim([out], drawings.values(), force)
    scenes = load(data, images=images, objects=objects, mnist=mnist)
    # Drawn before the long part and written after it: what fails does so early, and leaves nothing.
    drawn = pictures.draw(model, scenes.batch(slice(0, PICTURED)), drawings, max_objects)
    result = measure(model, scenes, particles=particles, nll_images=nll_images, seed=seed,
                     limit=max_objects)
    click.echo(report.table({scenes.name: result}))
    if out:
        write_json(out, result)
    for path, figure in drawn.items():
        plots.save(figure, path)


@click.command("svi-bench", cls=Command)
@click.option("--quick", is_flag=True, help="Fewer and smaller measurements.")
@click.option("--json", "out", type=FILE, metavar="FILE", help="Write the measurements.")
@click.option("--readme", type=FILE, metavar="FILE", help="Put the table into a page.")
@click.option("--pyro-air", type=FILE, metavar="DIR",
              help="Compare our AIR with Pyro's own too: examples/air of a checkout of Pyro.")
@device_option
@force_option
@version_option
def bench(quick: bool, out: Path | None, readme: Path | None, pyro_air: Path | None, device: str,
          force: bool) -> None:
    """Time training and evaluation on this machine."""
    from pyro_scenes import bench as benchmarks
    from pyro_scenes import report
    from pyro_scenes.data.files import write_json

    report.claim([out], [], force)
    result = benchmarks.run(device, quick, pyro_air)
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
@nll_option
@click.option("--out", type=FILE, metavar="DIR", help="Default: inside the package.")
@click.option("--readme", type=FILE, metavar="FILE",
              help="Put a table of all that has shipped into a page.")
@mnist_option
@device_option
@version_option
def ship(name: str | None, runs: tuple[Path, ...], images: int, particles: int,
         nll_images: int | None, out: Path | None, readme: Path | None, mnist: Path | None,
         device: str) -> None:
    """Measure RUNS, one command's seeds, and ship the first one's weights as NAME with a card."""
    from pyro_scenes import cards, report

    if not readme and not (name and runs):
        raise click.UsageError("give a NAME and RUNS, or --readme")
    if name and runs:
        folder = {"folder": out} if out else {}
        click.echo(cards.ship(name, list(runs), images=images, particles=particles,
                              nll_images=nll_images, mnist=mnist, device=device, **folder))
    if readme:
        report.insert(readme, "svi-ship", cards.table())
