"""What several test files use."""

import os
from pathlib import Path

import numpy as np
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


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 24 images of 16 x 16 pixels, every other one with a white square."""
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    images = np.zeros((24, 16, 16, 1), np.uint8)
    images[::2, 4:9, 4:9] = 255
    np.savez(path, images=images, counts=np.arange(24) % 2)
    return path
