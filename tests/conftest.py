"""What several test files use."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

# Who imports it has another device to the end of the process: its doctests would be pytest's.
collect_ignore = ["elsewhere.py"]

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


@pytest.fixture(scope="session")
def made_up_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 10,000 made-up training digits: digit i is a bar and i's lowest bits.

    Its test digits are the first 50 of them, with the labels 9, 8, ... in place of 0, 1, ...
    """
    folder = tmp_path_factory.mktemp("mnist")
    i = np.arange(10_000)
    images = np.zeros((len(i), 28, 28), np.uint8)
    images[:, 6:22, 12:15] = 200
    for bit in range(14):
        row, column = 4 + 5 * (bit // 4), 2 + 6 * (bit % 4)
        images[(i >> bit) % 2 == 1, row:row + 4, column:column + 5] = 255
    labels = (i % 10).astype(np.uint8)
    for name, pixels, kinds in (("train", images, labels), ("t10k", images[:50], 9 - labels[:50])):
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in pixels.shape)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = b"\0\0\x08\x01" + len(kinds).to_bytes(4, "big")
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + kinds.tobytes())
    return folder
