"""Where a model is on another device than the CPU, all is, and figures are the same.

That device is the one of `elsewhere`, in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils import backend_registration

from pyro_scenes.models import MODELS

SCRIPT = Path(__file__).parent / "elsewhere.py"
pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices that are written in Python",
)


@pytest.fixture(scope="module", params=list(MODELS))
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp(request.param)
    done = subprocess.run(
        [sys.executable, SCRIPT, request.param, folder], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def flat(values: Any) -> list:
    """All that nested lists and dictionaries have, in order."""
    if isinstance(values, dict):
        return [word for key in sorted(values) for word in (key, *flat(values[key]))]
    if isinstance(values, list):
        return [word for value in values for word in flat(value)]
    return [values]


def test_the_device_is_no_other_name_for_the_cpu(found: dict) -> None:
    """It refuses what a GPU refuses: else no test here could fail."""
    assert found["refused"] == {name: not name.startswith("not") for name in found["refused"]}
    assert len(found["refused"]) == 11
    assert found["devices"] == {"here": ["cpu", "cpu"], "there": ["elsewhere:0", "elsewhere:0"]}


def test_figures_are_those_of_the_cpu(found: dict) -> None:
    """Of a training through all its phases, resumed, of what is measured, drawn and inferred."""
    here, there = (found[place] for place in ("here", "there"))
    assert len(here["loss"]) + len(here.get("surprise", [])) == 8
    assert {"nll", "svi", "draw"} <= here.keys() == there.keys()
    for name in here:
        pairs = list(zip(flat(here[name]), flat(there[name]), strict=True))
        numbers = [pair for pair in pairs if isinstance(pair[0], float)]
        assert all(a == b for a, b in pairs if not isinstance(a, float)), name
        wanted, got = np.array(numbers).reshape(-1, 2).T
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=name)


def test_commands_do_their_work(found: dict) -> None:
    assert len(found["commands"]) >= 3 and set(found["commands"].values()) == {""}
