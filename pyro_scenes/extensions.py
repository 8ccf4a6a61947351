"""Files of a user's own, which register models, priors, data sets or objectives."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import util
from importlib.machinery import PathFinder
from pathlib import Path

from pyro_scenes.errors import UserError

# Names them. In the environment, not by an option: torchrun's processes and a sweep's have it too.
VARIABLE = "PYRO_SCENES_IMPORT"


def run() -> None:
    """Run the files that the variable names, each once in a process.

    :raises UserError: if one is missing, has the name of another module, or fails.
    """
    for path in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        _run(Path(path).resolve())


def _run(path: Path) -> None:
    """As the module that `import` would make of it."""
    name = path.stem
    spec = util.spec_from_file_location(name, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"{VARIABLE} names {path}, which is no file of Python")
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return
    # One that nothing has imported yet would be taken for a library when something does.
    other = PathFinder.find_spec(name)
    origin = other.origin if other else None  # a mere folder has none
    if name in sys.modules or origin and Path(origin).resolve() != path:
        raise UserError(f"{path}: another module is called {name}; give the file a new name")
    module = sys.modules[name] = util.module_from_spec(spec)  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        at = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{at}: {type(error).__name__}: {error}") from error
