"""The page that says what holds the figures names tests that there are, and every model."""

import ast
import re
from pathlib import Path

from pyro_scenes import checkpoint
from pyro_scenes.models import MODELS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "trust.md").read_text()
NAMED = re.compile(r"`(\w+)::(\w+)`")


def test_every_test_that_is_named_exists() -> None:
    named = set(NAMED.findall(PAGE))
    assert len(named) > 20
    for file, name in sorted(named):
        tree = ast.parse((ROOT / "tests" / f"test_{file}.py").read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"


def test_every_claim_has_a_cell_for_every_model_that_has_shipped() -> None:
    rows = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|")]
    first, *models = (cell.strip() for cell in rows[0])
    assert first == "claim" and models == [name for name in MODELS if name in models]
    kinds = {type(checkpoint.load(name).model) for name in checkpoint.shipped()}
    assert {name for name, (kind, *_) in MODELS.items() if kind in kinds} <= set(models)
    for claim, *cells in rows[2:]:
        assert len(cells) == len(models) and all(cell.strip() for cell in cells), claim
        for cell in cells:
            if cell.strip() == "the same":
                assert NAMED.search(cells[0]), claim
