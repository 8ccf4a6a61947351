"""Layers import downward only: a module may import what lies below it, and its own package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "pyro_scenes"
# What a file or a folder of the package is called, and how high it lies.
LAYERS = {
    "errors": -2, "limits": -1,
    "machine": 0, "scene": 0, "spatial": 0, "affine": 0, "distributions": 0, "files": 0,
    "pickles": 0, "distributed": 0, "tables": 0, "extensions": 0,
    "nets": 1, "priors": 1, "likelihoods": 1, "metrics": 1, "plots": 1, "graph": 1,
    "attention": 1,
    "data": 1,
    "models": 2,
    "bounds": 3, "markup": 3, "pictures": 3, "swaps": 3,
    "objectives": 4,
    "evaluate": 5, "config": 5, "calibration": 5, "tensors": 5,
    "checkpoint": 6,
    "training": 7, "report": 7,
    "cards": 8, "page": 8,
    "bench": 9, "suite": 9, "sweep": 9,
    "cli": 10,
}
MODULES = sorted(path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py"))


def part(module: str) -> str | None:
    """What comes after the package in a dotted name; None elsewhere and for the package itself."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE.name and len(names) > 1 else None


def imports(source: str, module: str) -> set[str]:
    """The parts of the package that a module's source imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[:-node.level] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            # `from pyro_scenes import plots` names a module, or an attribute of the package.
            names = [f"{base}.{alias.name}" if base == PACKAGE.name else base
                     for alias in node.names]
        else:
            continue
        found |= {part(name) for name in names}
    return {name for name in found if name in LAYERS}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_imports_what_lies_below_it(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts)
    here = part(module)
    if here == "__init__":
        assert not imports((PACKAGE.parent / path).read_text(), module)
        return
    assert here in LAYERS, f"{path} has no layer: give it one in this file"
    used = imports((PACKAGE.parent / path).read_text(), module) - {here}
    assert {name: LAYERS[name] for name in used if LAYERS[name] >= LAYERS[here]} == {}


def test_every_layer_is_there() -> None:
    assert set(LAYERS) == {part(".".join(p.with_suffix("").parts)) for p in MODULES} - {"__init__"}


@pytest.mark.parametrize("source", [
    "import pyro_scenes.cli",
    "from pyro_scenes import cli",
    "from pyro_scenes.cli import train",
    "from ..cli import train",
    "from .. import cli as commands",
    "def late():\n    import pyro_scenes.cli as commands",
])
def test_every_way_to_import_is_seen(source: str) -> None:
    assert imports(source, "pyro_scenes.models.lavae") == {"cli"}
