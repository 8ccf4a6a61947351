"""What the commands share: options, and how errors are told."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from pyro_scenes import __version__, extensions
from pyro_scenes.errors import Terminated, UserError
from pyro_scenes.limits import LAST_SEED


class Command(click.Command):
    """Bad input becomes one line on stderr and exit status 2, Ctrl-C status 130, SIGTERM 143."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _sigterm_raises():
                extensions.run()
                return super().invoke(ctx)
        except UserError as error:
            message = str(error)
        except (MemoryError, RuntimeError) as error:
            if not _lacks_memory(error):
                raise
            message = "there is not enough memory"
        except OSError as error:
            if error.filename is None:
                raise
            message = f"{error.filename}: {error.strerror}"
        except KeyboardInterrupt as interrupt:
            said, status = "Interrupted.", 130
            if isinstance(interrupt, Terminated):
                said, status = "Terminated.", 143
            # torchrun's processes all get the signal.
            if os.environ.get("RANK", "0") == "0":
                click.echo(str(interrupt) or said, err=True)
            ctx.exit(status)
        click.echo("Error: " + " ".join(message.split()), err=True)
        ctx.exit(2)


def _lacks_memory(error: Exception) -> bool:
    """Also by torch's own errors, told by their names: --help does not wait for its import."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises Terminated, so that files are closed and removed as on Ctrl-C."""
    def handle(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class CountRange(click.ParamType):
    """Numbers of objects: 7, or 0-3 with both ends included."""

    name = "A-B"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        low, dash, high = value.partition("-")
        high = high if dash else low
        if not (low.isdecimal() and high.isdecimal()):
            self.fail(f"{value!r} is not like 7 or 0-3", param, ctx)
        if int(low) > int(high):
            self.fail(f"{value!r} ends before it begins", param, ctx)
        return int(low), int(high)


def given(option: str) -> bool:
    """Whether an option stands on the command line, with its default or another value."""
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE


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
nll_option = click.option(
    "--nll-images", metavar="N", type=click.IntRange(min=1),
    help="Take the likelihood on the first so many images only; default: on all.")
objects_option = click.option(
    "--objects", type=CountRange(),
    help="Objects a scene, such as 7 or 0-3, for data by name; default: the data set's own.")
prior_option = click.option(
    "--prior", "priors", multiple=True, metavar="NAME=KIND",
    help="Put this prior in the place of the model's: count=uniform:4-5, count=geometric:0.5 or "
    "count=fit; appearance=normal, appearance=mixture:10 or appearance=flow:4. The last two and "
    "count=fit are fitted to the model on scenes of its training. May be repeated.")
seed_option = click.option(
    "--seed", metavar="N", type=click.IntRange(min=0, max=LAST_SEED), default=0,
    show_default=True)
version_option = click.version_option(__version__, prog_name="pyro_scenes")
