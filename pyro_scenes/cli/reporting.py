"""svi-report."""

from __future__ import annotations

from pathlib import Path

import click

from pyro_scenes.cli.options import (
    FILE,
    Command,
    device_option,
    force_option,
    mnist_option,
    objects_option,
    seed_option,
    version_option,
)


@click.command("svi-report", cls=Command)
@click.argument("checkpoint")
@click.option("--out", type=FILE, metavar="FILE", required=True, help="The page, such as "
              "report.html.")
@click.option("--data", metavar="NAME|FILE",
              help="A data set by name, an npz file or a folder of PNG files; default: held-out "
              "scenes like those of the training, and of more, smaller or new objects where "
              "there are such.")
@click.option("--images", metavar="N", type=click.IntRange(min=1), default=1000,
              show_default=True, help="Only the first so many of each data set.")
@click.option("--particles", metavar="K", type=click.IntRange(min=1), default=10,
              show_default=True, help="Importance samples an image.")
@objects_option
@seed_option
@device_option
@mnist_option
@force_option
@version_option
def report(checkpoint: str, out: Path, data: str | None, images: int, particles: int,
           objects: tuple[int, int] | None, seed: int, device: str, mnist: Path | None,
           force: bool) -> None:
    """Write a page about CHECKPOINT: figures, scenes, samples and what it gets wrong.

    CHECKPOINT is a run's folder, a file, or the name of a shipped checkpoint (svi-eval --list).
    The page is one HTML file with all pictures inside.
    """
    from pyro_scenes import checkpoint as checkpoints
    from pyro_scenes import page
    from pyro_scenes import report as reports
    from pyro_scenes.files import atomic_write

    reports.claim([out], [], force)
    trained = checkpoints.load(checkpoint, device)
    if data or objects:
        scenes = reports.unseen(trained, data or trained.config.data, images, objects, mnist)
        numbers = "-".join(map(str, sorted(set(objects or ()))))
        sets = {f"{numbers} objects" if objects else scenes.name: scenes}
    else:
        sets = reports.held_out(trained, images, mnist)
    content = page.build(trained, sets, particles, seed)
    with atomic_write(out) as file:
        file.write(content.encode())
    click.echo(f"Page: {out}")
