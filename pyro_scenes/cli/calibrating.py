"""svi-calibrate."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from pyro_scenes.cli.options import (
    FILE,
    Command,
    device_option,
    force_option,
    seed_option,
    version_option,
)


@click.command("svi-calibrate", cls=Command)
@click.argument("checkpoint")
@click.option("--scenes", metavar="N", type=click.IntRange(min=2), default=500, show_default=True,
              help="Scenes drawn from the model.")
@click.option("--draws", metavar="K", type=click.IntRange(min=1), default=99, show_default=True,
              help="Draws of the guide for each.")
@click.option("--train", "steps", metavar="STEPS", type=click.IntRange(min=0), default=0,
              show_default=True, help="Then train the guide so many steps on the model's own "
              "scenes, which its calibration is about, and measure it again. The checkpoint stays "
              "as it is.")
@click.option("--figure", type=FILE, metavar="FILE", help="Draw the ranks and the coverage.")
@click.option("--json", "out", type=FILE, metavar="FILE", help="Write the figures.")
@click.option("--readme", type=FILE, metavar="FILE", help="Put the figures into a page.")
@seed_option
@device_option
@force_option
@version_option
def calibrate(checkpoint: str, scenes: int, draws: int, steps: int, figure: Path | None,
              out: Path | None, readme: Path | None, seed: int, device: str, force: bool) -> None:
    """Measure whether the guide of CHECKPOINT is as sure as it may be.

    CHECKPOINT is a run's folder, a file, or the name of a shipped checkpoint. Scenes are drawn
    from its model, and the truth is ranked among the guide's draws (simulation-based calibration).
    """
    from pyro_scenes import calibration
    from pyro_scenes import checkpoint as checkpoints
    from pyro_scenes import plots, report
    from pyro_scenes.files import write_json
    from pyro_scenes.objectives import objective

    report.claim([out], [figure], force)
    marks = f"svi-calibrate {checkpoint}"
    if readme:
        report.marked(readme, marks)
    trained = checkpoints.load(checkpoint, device)
    model, config = trained.model, trained.config
    found = {"as trained": calibration.measure(model, scenes, draws, seed, progress=True)}
    if steps:
        own = objective(config.model)(config.schedule, model, config.train.steps)
        calibration.train(model, own, steps, seed, progress=True)
        label = f"{steps:,} steps on its own scenes"
        found[label] = calibration.measure(model, scenes, draws, seed, progress=True)
    result = {label: calibration.summary(ranks) for label, ranks in found.items()}
    text = report.calibration(result)
    click.echo(text)
    if out:
        write_json(out, {"checkpoint": trained.name, "draws": draws, "seed": seed,
                         "guides": result})
    if figure:
        plots.save(plots.calibration_figure({k: v.values for k, v in found.items()}), figure)
    if readme:
        command = f"bin/svi-calibrate {shlex.quote(checkpoint)} --scenes {scenes} --draws {draws}"
        command += f" --train {steps}" * bool(steps) + f" --seed {seed}" * bool(seed)
        picture = ""
        if figure:
            picture = f"\n![Ranks]({os.path.relpath(figure, readme.parent)})\n"
        report.insert(readme, marks,
                      f"`{command}`\n\n```\n{text}\n```\n{picture}")
