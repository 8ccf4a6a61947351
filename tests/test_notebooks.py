"""The notebooks run top to bottom, and are committed as they ran, with their pictures."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("lavae", "discrete_air", "priors_and_likelihoods", "your_own_scenes", "a_fifth_model")
NEED_MNIST = ("lavae", "discrete_air")
WITH_A_MODEL = "a_fifth_model"
LARGEST = 1_500_000  # bytes of a committed notebook
# The papers' figures that a notebook draws, by their numbers.
FIGURES = {"lavae": range(1, 12), "discrete_air": range(3, 10)}


def path(name: str) -> Path:
    return FOLDER / f"{name}.ipynb"


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(path(name), as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def texts(notebook: nbformat.NotebookNode) -> str:
    """All that cells wrote but for their pictures."""
    return "\n".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "")
        for output in outputs(notebook)
    )


def classes(cell: nbformat.NotebookNode) -> list[ast.ClassDef]:
    source = re.sub(r"^%.*$", "", cell.source, flags=re.MULTILINE)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


@pytest.fixture(scope="module")
def module() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "execute.py"))


def test_every_notebook_is_in_the_table() -> None:
    assert sorted(NAMES) == sorted(file.stem for file in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(
    name: str, module: dict[str, Any], request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name in NEED_MNIST:
        monkeypatch.setenv("PYRO_SCENES_MNIST", str(request.getfixturevalue("mnist_folder")))
    monkeypatch.setenv(module["SMOKE"], "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = module["execute"](path(name))  # raises where a cell fails
    assert all(cell.execution_count for cell in code_cells(notebook))
    assert pictures(notebook) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_as_it_ran(name: str, module: dict[str, Any]) -> None:
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(notebook) >= 3
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert path(name).stat().st_size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_tells_nothing_of_the_machine_it_ran_on(
    name: str, module: dict[str, Any]
) -> None:
    notebook = read(name)
    assert notebook.metadata == module["METADATA"]
    assert not any(cell.metadata for cell in notebook.cells)
    # Warnings have paths, and progress bars times.
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not re.search(r"(?<!\w)/\w+/|[A-Z]:\\|seconds|it/s", texts(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_last_notebook_defines_a_model(name: str) -> None:
    defining = [cell for cell in code_cells(read(name)) if classes(cell)]
    if name != WITH_A_MODEL:
        assert not defining
        return
    bases = [
        [base.id for kind in classes(cell) for base in kind.bases if isinstance(base, ast.Name)]
        for cell in defining
    ]
    models = [found for found in bases if {"GenerativeModel", "SceneModel"} & set(found)]
    assert len(models) == 1  # in one cell


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_named_by_its_number(name: str) -> None:
    headings = re.findall(
        r"^## Figures? (\d+)(?: and (\d+))?",
        "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown"),
        flags=re.MULTILINE,
    )
    assert [int(number) for pair in headings for number in pair if number] == list(FIGURES[name])
