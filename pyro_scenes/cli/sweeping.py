"""svi-sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_scenes.cli.options import FILE, Command, device_option, mnist_option, version_option

if TYPE_CHECKING:
    from pyro_scenes.sweep import Cell


@click.command("svi-sweep", cls=Command)
@click.option("--model", metavar="NAME", required=True, help="A model by name, such as lavae.")
@click.option("--data", metavar="NAME|FILE", required=True,
              help="A data set by name, such as multi-dsprites, an npz file or a folder of PNG "
              "files.")
@click.option("--preset", metavar="NAME", default="fast", show_default=True)
@click.option("--steps", metavar="N", type=click.IntRange(min=1),
              help="Training steps; default: the preset's.")
@click.option("--seeds", metavar="A-B", default="0-4", show_default=True,
              help="Seeds such as 0-4 or 1,3,7-9.")
@click.option("--grid", multiple=True, metavar="NAME=V,V",
              help="Values of a setting; may be repeated, for all combinations. Values with commas "
              "are parted by semicolons.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="A setting of all runs. May be repeated.")
@click.option("--jobs", metavar="N", type=click.IntRange(min=1), default=1, show_default=True,
              help="Runs at a time; on Linux, if more than one, each on one core with one thread.")
@click.option("--images", metavar="N", type=click.IntRange(min=1), default=1000,
              show_default=True, help="Held-out images that each run is measured on.")
@click.option("--particles", metavar="K", type=click.IntRange(min=1), default=10,
              show_default=True, help="Importance samples an image.")
@click.option("--out", type=FILE, metavar="DIR", required=True,
              help="A folder of runs; those that it holds go on, or are done.")
@click.option("--launcher", type=click.Choice(["local", "submitit"]), default="local",
              show_default=True,
              help="submitit hands the runs to SLURM where that is: needs pyro_scenes[cluster].")
@click.option("--launcher-set", "parameters", multiple=True, metavar="NAME=VALUE",
              help="A parameter of submitit's executor, such as slurm_partition=gpu, "
              "gpus_per_node=1 or timeout_min=600; a VALUE that is JSON is read as that. May be "
              "repeated.")
@device_option
@mnist_option
@version_option
def sweep(model: str, data: str, preset: str, steps: int | None, seeds: str,
          grid: tuple[str, ...], settings: tuple[str, ...], jobs: int, images: int,
          particles: int, out: Path, launcher: str, parameters: tuple[str, ...], device: str,
          mnist: Path | None) -> None:
    """Train every setting of a grid with every seed, and compare them in one table.

    The same command again goes on with what is not done, and tries again what failed. The folder
    gets a run's folder for each, and sweep.json and sweep.md.
    """
    given = {}
    for parameter in parameters:
        name, equals, value = parameter.partition("=")
        if not equals:
            raise click.UsageError(f"a parameter is name=value, not {parameter!r}")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value
    if given and launcher == "local":
        raise click.UsageError("--launcher-set goes with --launcher submitit")
    from pyro_scenes import sweep as sweeps
    from pyro_scenes.files import atomic_write, write_json

    found = sweeps.cells(
        grid, sweeps.seeds(seeds), out, model=model, data=data, preset=preset, steps=steps,
        settings=settings, images=images, particles=particles, device=device,
        mnist=str(mnist) if mnist else None,
    )
    todo = [cell for cell in found if cell.figures() is None]
    for cell in todo:  # before the table of another sweep is written over
        cell.check()
    click.echo(f"{len(found)} runs, {len(found) - len(todo)} done already")
    errors: dict[str, str] = {}

    def tell(cell: Cell, error: str | None) -> None:
        if error is None and cell.figures() is None:
            error = "it has no figures"
        if error is not None:
            errors[cell.out] = error
        click.echo(f"{cell.label}, seed {cell.seed}: {error or 'done'}")

    def finish() -> str:
        result: dict[str, Any] = {"model": model, "data": data, "preset": preset}
        result |= sweeps.summary(found, errors)
        write_json(out / "sweep.json", result)
        with atomic_write(out / "sweep.md") as file:
            file.write((sweeps.table(result) + "\n").encode())
        return sweeps.table(result)

    try:
        if todo and launcher == "submitit":
            sweeps.by_submitit(todo, jobs, tell, out, given)
        elif todo:
            sweeps.locally(todo, jobs, tell)
    except KeyboardInterrupt as interrupt:
        finish()
        raise type(interrupt)("Interrupted. The same command goes on with the sweep.") from None
    click.echo("\n" + finish())
    if errors:
        raise click.exceptions.Exit(1)
