"""What several test files use."""

import os
from pathlib import Path

import pytest
import torch

# The models here are tiny: more threads would spend their time waiting for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """The folder with the real MNIST; tests that need it are skipped where there is none."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "mnist"
    folder = Path(os.environ.get("PYRO_SCENES_MNIST") or beside)
    if not folder.is_dir():
        pytest.skip("needs MNIST: set PYRO_SCENES_MNIST to the folder with its IDX files")
    return folder
