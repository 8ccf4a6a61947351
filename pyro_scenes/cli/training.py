"""svi-train."""

from __future__ import annotations

from pathlib import Path

import click

from pyro_scenes.cli.options import (
    FILE,
    Command,
    device_option,
    mnist_option,
    seed_option,
    version_option,
)


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
