"""make-scenes."""

from __future__ import annotations

from pathlib import Path

import click

from pyro_scenes.cli.options import (
    FILE,
    Command,
    force_option,
    given,
    mnist_option,
    objects_option,
    seed_option,
    version_option,
)


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
@click.option("--entropy", is_flag=True,
              help="Print the entropy of NAME's scenes in place of making any; --images are then "
              "those of the Monte Carlo.")
@click.option("--json", "figures", type=FILE, metavar="FILE", help="Write the entropy.")
@click.option("--out", type=FILE, metavar="FILE", help="Default: NAME.npz.")
@mnist_option
@force_option
@version_option
def make_scenes(name: str | None, images: int, objects: tuple[int, int] | None, seed: int,
                source: Path | None, trust: bool, entropy: bool, figures: Path | None,
                out: Path | None, mnist: Path | None, force: bool) -> None:
    """Make an npz file of scenes with their truth.

    NAME is multi-dsprites, multi-mnist-1k, multi-mnist-10k, multi-sprites, multi-sprites-small,
    multi-mnist or multi-mnist-new-digits.
    """
    if bool(name) == bool(source):
        raise click.UsageError("give either a NAME or --from-pyro FILE")
    if source and not out:
        raise click.UsageError("--from-pyro needs --out")
    if trust and not source:
        raise click.UsageError("--trust-pickled-labels goes with --from-pyro")
    for option in ("images", "objects", "seed", "mnist", "entropy"):
        if source and given(option):
            raise click.UsageError(f"--{option} goes with a NAME")
    if entropy and out:
        raise click.UsageError("--entropy makes no scenes: --json takes what it finds, not --out")
    if figures and not entropy:
        raise click.UsageError("--json goes with --entropy")
    from pyro_scenes import report
    from pyro_scenes.data import DATASETS, dataset, load_pyro_mnist, make, save_npz, scene_entropy
    from pyro_scenes.files import write_json

    if entropy:
        assert name is not None
        report.claim([figures], [], force)
        spec = dataset(name)
        found = scene_entropy(
            spec, objects, images=images, seed=seed, mnist=mnist, progress=True
        )
        low, high = objects or spec.objects
        click.echo(report.entropy(f"{name}, {low} to {high} objects", found))
        if figures:
            asked = {"data": name, "objects": [low, high], "images": images, "seed": seed}
            write_json(figures, asked | found)
        return
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
