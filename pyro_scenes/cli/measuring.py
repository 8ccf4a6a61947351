"""What measures: svi-eval, svi-bench for speed, and svi-ship for the runs of a command."""

from __future__ import annotations

import os
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
    prior_option,
    seed_option,
    version_option,
)


@click.command("svi-eval", cls=Command)
@click.argument("checkpoint", required=False)
@click.option("--data", metavar="NAME|FILE",
              help="A data set by name, an npz file or a folder of PNG files.")
@click.option("--images", metavar="N", type=click.IntRange(min=1), help="Only the first so many.")
@click.option("--particles", metavar="N", type=click.IntRange(min=1), default=100,
              show_default=True, help="Importance samples an image.")
@click.option("--chunk", metavar="N", type=click.IntRange(min=1),
              help="Particles times images at a time, to which memory is in proportion; default: "
              "what suits the device.")
@click.option("--chunk-seeds", is_flag=True,
              help="Seed the samples of each chunk anew, as several processes always do: one "
              "process then has their figures to the bit.")
@nll_option
@objects_option
@limit_option
@prior_option
@seed_option
@click.option("--json", "out", type=FILE, metavar="FILE", help="Write the figures of merit.")
@click.option("--curve", type=FILE, metavar="FILE",
              help="Draw the bound on the likelihood at 1, 10, 100 ... particles.")
@click.option("--figures", type=FILE, metavar="DIR",
              help="Draw every picture that suits the model and the images, inference.png and "
              "others.")
@device_option
@mnist_option
@force_option
@click.option("--list", "list_them", is_flag=True, help="Show the shipped checkpoints.")
@click.option("--suite", "whole_suite", is_flag=True,
              help="Measure all shipped checkpoints, or CHECKPOINT, on all data that they read: "
              "fills results/, where it goes on, and writes RESULTS.md. On 1,000 images of each, "
              "the likelihood of 100, unless --images and --nll-images say otherwise.")
@click.option("--readme", type=FILE, metavar="FILE", help="Put the suite's head into a page.")
@version_option
def evaluate(checkpoint: str | None, data: str | None, images: int | None, particles: int,
             chunk: int | None, chunk_seeds: bool, nll_images: int | None,
             objects: tuple[int, int] | None, max_objects: int | None, priors: tuple[str, ...],
             seed: int, out: Path | None, curve: Path | None, figures: Path | None, device: str,
             mnist: Path | None, force: bool, list_them: bool, whole_suite: bool,
             readme: Path | None) -> None:
    """Measure CHECKPOINT on held-out scenes.

    CHECKPOINT is a run's folder, a file, or the name of a shipped checkpoint. Several processes
    share the images: torchrun --nproc-per-node N bin/svi-eval CHECKPOINT --data ...
    """
    if (whole_suite or list_them) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise click.UsageError("--suite and --list are for one process")
    if whole_suite:
        if data or objects or max_objects is not None or priors or seed or out or curve or figures \
                or chunk_seeds or force or list_them:
            raise click.UsageError("--suite chooses the data, the seed and the files itself")
        images = images or 1000
        _suite(checkpoint, images, min(images, nll_images or 100), particles, chunk, device, mnist,
               readme)
        return
    if readme:
        raise click.UsageError("--readme goes with --suite")
    if list_them and (checkpoint or data or out or curve or figures or priors or objects):
        raise click.UsageError("--list shows the shipped checkpoints: it takes none, no data and no"
                               " files")
    if not list_them and (checkpoint is None or data is None):
        raise click.UsageError("give a CHECKPOINT and --data, or --list, or --suite")
    if list_them:
        from pyro_scenes.checkpoint import shipped

        click.echo("\n".join(shipped()) or "No checkpoint is shipped.")
        return
    assert checkpoint is not None and data is not None
    from pyro_scenes import distributed

    with distributed.session(device):
        _evaluate(checkpoint, data, images, particles, chunk, chunk_seeds, nll_images, objects,
                  max_objects, priors, seed, out, curve, figures, device, mnist, force)


def _evaluate(checkpoint: str, data: str, images: int | None, particles: int, chunk: int | None,
              chunk_seeds: bool, nll_images: int | None, objects: tuple[int, int] | None,
              max_objects: int | None, priors: tuple[str, ...], seed: int, out: Path | None,
              curve: Path | None, figures: Path | None, device: str, mnist: Path | None,
              force: bool) -> None:
    from pyro_scenes import bounds
    from pyro_scenes import checkpoint as checkpoints
    from pyro_scenes import distributed, pictures, plots, report, swaps
    from pyro_scenes.errors import UserError
    from pyro_scenes.evaluate import evaluate as measure
    from pyro_scenes.files import write_json

    trained = checkpoints.load(checkpoint, device)
    model = trained.model
    suited = pictures.applying(model) if figures else []
    drawings = {name: figures / f"{name}.png" for name in suited if figures}
    report.claim([out], [*drawings.values(), curve], force)
    scenes = report.unseen(trained, data, images, objects, mnist)
    if curve and not bounds.applies(model, scenes):
        raise UserError(f"no --curve: {report.grey(model.likelihood.name)}")
    swapped = swaps.parse(
        priors, model, lambda: report.source(trained, data), mnist=mnist, seed=seed
    )
    # Drawn before the long part and written after it: what fails does so early, and leaves nothing.
    with model.priors(**swapped):
        drawn = {}
        if distributed.rank() == 0:
            drawn = pictures.draw(model, scenes.batch(slice(0, PICTURED)), drawings, max_objects,
                                  all_of_them=False)
        result = measure(model, scenes, particles=particles, nll_images=nll_images, seed=seed,
                         chunk=chunk, chunk_seeds=chunk_seeds, limit=max_objects, priors=priors)
    if distributed.rank() > 0:
        return
    click.echo(report.table({scenes.name: result}))
    if result["curve"]:
        click.echo("\n" + report.likelihood(result))
    if out:
        write_json(out, result)
    finite = [point for point in result["curve"] or () if point["nll"] is not None]
    if curve and finite:
        entropy = (result.get("entropy") or {}).get("total")
        drawn[curve] = plots.bound_figure(finite, entropy)
    for path, figure in drawn.items():
        plots.save(figure, path)
    if curve and not finite:  # all else is written
        raise UserError("no --curve: the prior gives the counts of some images no mass")


def _suite(checkpoint: str | None, images: int, nll_images: int, particles: int,
           chunk: int | None, device: str, mnist: Path | None, readme: Path | None) -> None:
    from pyro_scenes import checkpoint as checkpoints
    from pyro_scenes import report, suite
    from pyro_scenes.errors import UserError
    from pyro_scenes.files import atomic_write

    names = (checkpoint,) if checkpoint else tuple(checkpoints.shipped())
    if not set(names) <= checkpoints.shipped().keys():
        raise UserError(f"{checkpoint} is no shipped checkpoint; svi-eval --list shows those")
    if readme:
        report.marked(readme, "svi-eval --suite")
    folder, page = Path("results"), Path("RESULTS.md")
    suite.check_page(page)
    for line in suite.run(folder, names, images=images, nll_images=nll_images,
                          particles=particles, chunk=chunk, mnist=mnist, device=device):
        click.echo(line)
    with atomic_write(page) as file:
        file.write(suite.page(folder).encode())
    if readme:
        report.insert(readme, "svi-eval --suite", suite.head(folder))
    click.echo("RESULTS.md is written.")


@click.command("svi-bench", cls=Command)
@click.option("--quick", is_flag=True, help="Fewer and smaller measurements.")
@click.option("--json", "out", type=FILE, metavar="FILE", help="Write the measurements.")
@click.option("--readme", type=FILE, metavar="FILE", help="Put the table into a page.")
@click.option("--figure", type=FILE, metavar="FILE",
              help="Draw LAVAE's cost against objects and canvas.")
@click.option("--pyro-air", type=FILE, metavar="DIR",
              help="Compare our AIR with Pyro's own too: examples/air of a checkout of Pyro.")
@click.option("--scaling", is_flag=True,
              help="Measure 1, 2, 4 ... processes at one training instead; --readme is then for "
              "docs/scaling.md.")
@device_option
@force_option
@version_option
def bench(quick: bool, out: Path | None, readme: Path | None, figure: Path | None,
          pyro_air: Path | None, scaling: bool, device: str, force: bool) -> None:
    """Time training and evaluation on this machine."""
    if scaling and (figure or pyro_air):
        raise click.UsageError("--figure and --pyro-air do not go with --scaling")
    from pyro_scenes import bench as benchmarks
    from pyro_scenes import plots, report
    from pyro_scenes.files import write_json

    report.claim([out], [figure], force)
    if readme:
        report.marked(readme, "svi-bench --scaling" if scaling else "svi-bench")
    if scaling:
        from pyro_scenes.bench import scaling as several

        result = several.run(device, 5 if quick else 40)
        click.echo(several.table(result))
        if out:
            write_json(out, result)
        if readme:
            report.insert(readme, "svi-bench --scaling", several.table(result))
        return
    result = benchmarks.run(device, quick, pyro_air)
    click.echo(benchmarks.table(result))
    if out:
        write_json(out, result)
    if figure:
        canvases = [row for row in result["growth"] if row["of"] == "canvas"]
        plots.save(plots.growth_figure(canvases), figure)
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
@click.option("--add", is_flag=True,
              help="Add RUNS to the seeds of NAME, whose weights and figures stay.")
@click.option("--out", type=FILE, metavar="DIR", help="Default: inside the package.")
@click.option("--readme", type=FILE, metavar="FILE",
              help="Put a table of all that has shipped into a page, and write the cards anew.")
@mnist_option
@device_option
@version_option
def ship(name: str | None, runs: tuple[Path, ...], images: int, particles: int,
         nll_images: int | None, add: bool, out: Path | None, readme: Path | None,
         mnist: Path | None, device: str) -> None:
    """Measure RUNS, one command's seeds, and ship the first one's weights as NAME with a card."""
    from pyro_scenes import cards, report

    if bool(name) != bool(runs) or not (name or readme):
        raise click.UsageError("give a NAME and RUNS, or --readme, or both")
    if add and not name:
        raise click.UsageError("--add is of a NAME and RUNS")
    if readme and out:
        raise click.UsageError("--readme is of what the package ships: leave --out out")
    if readme:
        report.marked(readme, "svi-ship")
    if name:
        report.claim([out / name] if out else [], [], force=True)
        folder = {"folder": out} if out else {}
        click.echo(cards.ship(name, list(runs), images=images, particles=particles,
                              nll_images=nll_images, add=add, mnist=mnist, device=device,
                              **folder))
    if readme:
        cards.rewrite()
        report.insert(readme, "svi-ship", cards.table())
