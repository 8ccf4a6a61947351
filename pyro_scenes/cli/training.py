"""svi-train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyro_scenes.cli.options import (
    FILE,
    Command,
    device_option,
    mnist_option,
    seed_option,
    version_option,
)
from pyro_scenes.errors import Terminated, UserError

if TYPE_CHECKING:
    from pyro_scenes.config import RunConfig
    from pyro_scenes.training import Run


@click.command("svi-train", cls=Command)
@click.option("--model", metavar="NAME", required=True,
              help="lavae, discrete-air, air or conv-vae.")
@click.option("--data", metavar="NAME|FILE", required=True,
              help="A data set by name, such as multi-dsprites, or an npz file or a folder of PNG "
              "files, of which the last 5% is held out.")
@click.option("--preset", metavar="NAME", default="fast", show_default=True,
              help="fast, or paper for the paper's networks and schedule, as far as it says them.")
@click.option("--from", "start", metavar="CHECKPOINT", default="",
              help="Begin with the weights of a run, a file or a shipped checkpoint, and its "
              "networks' settings, not with random weights.")
@click.option("--steps", metavar="N", type=click.IntRange(min=1),
              help="Training steps; default: the preset's.")
@seed_option
@device_option
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="Change a setting. May be repeated.")
@click.option("--settings", "list_them", is_flag=True,
              help="Show all settings, as this command would have them, and train nothing.")
@click.option("--out", type=FILE, metavar="DIR", help="Default: runs/MODEL-DATA-seedSEED.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, if there is one.")
@click.option("--force", is_flag=True, help="Replace the run in --out.")
@click.option("--tensorboard", is_flag=True,
              help="Log the history, and a picture at each look, for TensorBoard too: in the "
              "run's folder. Needs pyro_scenes[tensorboard].")
@mnist_option
@version_option
def train(model: str, data: str, preset: str, start: str, steps: int | None, seed: int,
          device: str, settings: tuple[str, ...], list_them: bool, out: Path | None, resume: bool,
          force: bool, tensorboard: bool, mnist: Path | None) -> None:
    """Train a model and measure it on held-out scenes.

    The run's folder gets checkpoint.pt, config.json, history.json and inference.png. For several
    processes: torchrun --nproc-per-node N bin/svi-train ...; each takes its part of the batches.
    """
    if resume and force:
        raise click.UsageError("--resume keeps the run and --force replaces it: give one of them")
    out = out or Path("runs") / f"{model}-{Path(data).stem}-seed{seed}"

    def configured() -> RunConfig:
        from pyro_scenes import checkpoint
        from pyro_scenes.config import make_config

        net = None
        try:
            net = checkpoint.networks(start, model) if start else None
        except UserError:  # a run that goes on needs no longer what it began with
            if not (resume and (out / checkpoint.FILE).exists()):
                raise
            net = checkpoint.networks(out, model)
        return make_config(model, data, preset, settings, steps, seed, start=start, net=net)

    if list_them:
        click.echo(_listed(configured()))
        return
    from pyro_scenes import distributed, report, training

    with distributed.session(device):
        config = configured()
        log = TensorBoard(out / "tensorboard") if tensorboard else None
        try:
            training.train(config, out, resume=resume, force=force, device=device, mnist=mnist,
                           on_record=log)
        except KeyboardInterrupt as interrupt:
            said = "Terminated" if isinstance(interrupt, Terminated) else "Interrupted"
            raise type(interrupt)(
                f"{said}. The same command with --resume goes on with the run in {out}.")
        finally:
            if log:
                log.close()
        first = distributed.rank() == 0
    if first:
        click.echo(report.finish(config, out, device, mnist))


def _listed(config: RunConfig) -> str:
    """A line for each setting: its name and value, and what it is."""
    from pyro_scenes.config import settings, written

    lines: list[str] = []
    for part, found in settings(config).items():
        lines += ["", f"{part}:"] if lines else [f"{part}:"]
        for name, (value, comment) in found.items():
            lines.append(f"  {f'{name}={written(value)}':36}  {comment}".rstrip())
    return "\n".join(lines)


class TensorBoard:
    """Logs a run for TensorBoard: what goes into its history, and a picture at each look."""

    def __init__(self, folder: Path) -> None:
        """:raises UserError: if the package is missing, before anything is trained."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs a package that is not here:"
                            " install pyro_scenes[tensorboard]") from None
        self.folder, self.make = folder, SummaryWriter
        self.writer: Any = None

    def __call__(self, run: Run, figures: dict[str, float]) -> None:
        if self.writer is None:
            self.writer = self._open(run)
        for name, value in figures.items():
            self.writer.add_scalar(name, value, run.step)
        if not run.model.training:
            from pyro_scenes import pictures, plots

            images = run.held_out.batch(slice(0, pictures.IMAGES))
            drawn = plots.pixels(pictures.inference(run.model, images, math.inf))
            self.writer.add_image("inference", drawn, run.step, dataformats="HWC")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _open(self, run: Run) -> Any:
        """A writer that goes on where the run does: what was logged of later steps is dropped."""
        begun = min(step for steps, _ in run.history.values() for step in steps)
        return self.make(self.folder, purge_step=run.step if begun < run.step else 0)
