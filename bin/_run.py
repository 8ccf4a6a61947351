"""Starts a command of pyro_scenes.cli from a checkout, with its .venv where that is needed."""
import importlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(command):
    """Runs one command of pyro_scenes.cli on the arguments of this process."""
    needed = "click", "torch", "pyro", "tqdm", "networkx", "scipy", "matplotlib", "PIL"
    missing = [name for name in needed if find_spec(name) is None]
    if missing or sys.version_info < (3, 11):
        venv = ROOT / ".venv"
        if (venv / ".ready").exists() and Path(sys.prefix).resolve() != venv:
            python = str(venv / "bin" / "python")
            os.execv(python, [python] + sys.argv)
        lack = missing[0] if missing else "Python 3.11 or newer"
        sys.stderr.write(
            "Error: %s is missing; run `make setup` in %s, or in an environment of your own "
            "`pip install -e . -c constraints.txt`\n" % (lack, ROOT)
        )
        sys.exit(2)
    sys.path.insert(0, str(ROOT))
    getattr(importlib.import_module("pyro_scenes.cli"), command)()
