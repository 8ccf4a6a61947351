"""Run notebooks top to bottom and keep their outputs: python notebooks/execute.py NOTEBOOK...

What they keep is the same on every machine: no names, versions or times.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SMOKE = "PYRO_SCENES_SMOKE"  # where set, notebooks take few images, particles and steps
# Of a progress bar that would rather be a widget.
QUIET = "ignore:IProgress not found"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: Path, timeout: float = 600.0) -> nbformat.NotebookNode:
    """The notebook with the outputs of all its cells.

    :param timeout: of a cell, seconds.
    :raises nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=timeout,
            kernel_name=METADATA["kernelspec"]["name"],
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        # What notebooks write goes with the folder.
        client.execute(env=os.environ | {"PYTHONWARNINGS": QUIET, "TMPDIR": folder})
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
    return notebook


if __name__ == "__main__":
    os.environ.pop(SMOKE, None)
    for name in sys.argv[1:]:
        print(name, flush=True)
        nbformat.write(execute(Path(name)), name)
