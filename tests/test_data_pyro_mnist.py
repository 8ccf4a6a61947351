"""The file of Pyro's multi_mnist: read without its labels, or with them, and nothing of it run."""

import importlib.util
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from pyro_scenes.data import load, load_npz, load_pyro_mnist, save_npz
from pyro_scenes.errors import UserError

X = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = [[3], [], [1, 2]]


def objects(values):
    """An array of objects, one a value."""
    made = np.empty(len(values), object)
    made[:] = values
    return made


def write(path, y, x=X, **more):
    np.savez(path, x=x, y=y, **more)
    return path


def with_pickle(path, pickled, shape=(3,)):
    """Such a file whose y is any pickle."""
    write(path, np.zeros(0))
    with zipfile.ZipFile(path) as archive:
        x = archive.read("x.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", x)
        with archive.open("y.npy", "w") as entry:
            np.lib.format.write_array_header_1_0(
                entry, {"shape": shape, "fortran_order": False, "descr": "|O"})
            entry.write(pickled)
    return path


@pytest.fixture
def multi_mnist(monkeypatch):
    """Pyro's own module, on digits that need no torchvision, making 40 images."""
    digits = SimpleNamespace(
        data=torch.arange(1, 11).mul(10).byte()[:, None, None].expand(10, 28, 28),
        targets=torch.arange(10))
    util = ModuleType("pyro.contrib.examples.util")
    setattr(util, "get_data_loader", lambda name, root: SimpleNamespace(dataset=digits))
    monkeypatch.setitem(sys.modules, util.__name__, util)
    spec = importlib.util.find_spec("pyro.contrib.examples.multi_mnist")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = module.mk_dataset
    monkeypatch.setattr(module, "mk_dataset", lambda n, *others: make(40, *others))
    return module


def test_what_pyro_writes_is_read(tmp_path, multi_mnist):
    x, y = multi_mnist.load(tmp_path)
    path = tmp_path / "multi_mnist_uint8.npz"
    alone = load(str(path))
    assert alone.shape == (50, 50, 1) and np.array_equal(alone.images()[..., 0], x)
    assert alone.counts is alone.categories is alone.boxes is alone.segmentation is None

    with pytest.raises(UserError, match="--trust-pickled-labels") as error:
        load_pyro_mnist(path)
    assert "runs code" in str(error.value)

    save_npz(tmp_path / "new.npz", load_pyro_mnist(path, trust=True))
    new = load_npz(tmp_path / "new.npz")
    assert np.array_equal(new.images(), alone.images())
    assert set(new.counts) == {0, 1, 2} and new.categories.shape == (40, 2)
    for count, slots, labels in zip(new.counts, new.categories, y):
        assert slots.tolist() == labels + [-1] * (2 - count) and count == len(labels)


@pytest.mark.parametrize("labels", [LABELS, [[7]] * 3, [[4, 5]] * 3, [[]] * 3])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_labels_of_every_numpy_and_shape(tmp_path, labels, protocol):
    y = np.array(labels, object)
    # Protocols 2 and 3 are numpy 1's, which called the module otherwise.
    pickled = pickle.dumps(y, protocol)
    if protocol < 4:
        pickled = pickled.replace(b"numpy._core", b"numpy.core")
    data = load_pyro_mnist(with_pickle(tmp_path / "old.npz", pickled, y.shape), trust=True)
    assert data.counts.tolist() == [len(row) for row in labels]
    assert [row[:n].tolist() for n, row in zip(data.counts, data.categories)] == labels
    assert data.categories.shape == (3, max(map(len, labels)))


def test_many_lists_in_the_pickle_of_numpy_1(tmp_path):
    labels = [[i % 10] * (i % 3) for i in range(1000)]
    path = with_pickle(tmp_path / "old.npz", pickle.dumps(objects(labels), 3), (1000,))
    with zipfile.ZipFile(path) as archive:
        y = archive.read("y.npy")
    np.savez(path, x=np.zeros((1000, 2, 2), np.uint8))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y.npy", y)
    assert load_pyro_mnist(path, trust=True).counts.tolist() == [i % 3 for i in range(1000)]


class Hostile:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


@pytest.mark.parametrize("whole", [True, False])
def test_no_code_of_a_file_is_run(tmp_path, whole):
    hostile = Hostile(tmp_path / "ran")
    pickled = pickle.dumps(hostile if whole else objects([[1], [], hostile]))
    path = with_pickle(tmp_path / "bad.npz", pickled)
    assert len(load_npz(path)) == 3
    with pytest.raises(UserError, match="bad.npz: y is no pickled array .*asks for"):
        load_pyro_mnist(path, trust=True)
    assert list(tmp_path.iterdir()) == [path]
    pickle.loads(pickled)  # would have
    assert (tmp_path / "ran").exists()


REDUCED = pickle.dumps(objects(LABELS))


@pytest.mark.parametrize("pickled,message", [
    (b"", "no pickled array"),
    (b"cos\nsystem\n(S'true'\ntR.", "no pickled array"),
    (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
    (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", "ndarray.__init__"),
    (b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93.", "no pickled array"),
    (b"\x80\x04\x8c\x02\n\x1b\x8c\x06system\x93.", r"\\n\\x1b.system"),
    # Room for 4 billion numbers, one way and another.
    (b"\x80\x04]r\xff\xff\xff\xff.", "LONG_BINPUT"),
    (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "no pickled array"),
    (b"\x80\x04" + b"]" * 1000 + b"a" * 999 + b".", "no pickled array"),
    (pickle.dumps(LABELS), "no pickled array"),
    (REDUCED[:-20], "no pickled array"),
    (REDUCED + bytes(10_000), "too long"),
    (pickle.dumps(objects(LABELS[:2])), "other labels"),
    (pickle.dumps(objects([[3], [], [10]])), r"y\[2\] is not a list"),
    (pickle.dumps(objects([[3], [-1], []])), r"y\[1\] is not a list"),
    (pickle.dumps(objects([[3], [True], []])), r"y\[1\] is not a list"),
    (pickle.dumps(objects([(3,), [], []])), r"y\[0\] is not a list"),
    (pickle.dumps(objects([3, 4, 5])), r"y\[0\] is not a list"),
    (pickle.dumps(objects([np.arange(3)] * 3)), r"y\[0\] is not a list"),
    (pickle.dumps(objects([[[3]], [], []])), r"y\[0\] is not a list"),
    (pickle.dumps(objects([[], [], [1] * 256])), "at most 255"),
])
def test_bad_pickles(tmp_path, pickled, message):
    path = with_pickle(tmp_path / "bad.npz", pickled)
    with pytest.raises(UserError, match=message) as error:
        load_pyro_mnist(path, trust=True)
    assert "\n" not in str(error.value) and "bad.npz" in str(error.value)


@pytest.mark.parametrize("arrays,message", [
    ({"x": X}, "not from Pyro"),
    ({"images": X[..., None], "x": X, "y": objects(LABELS)}, "not from Pyro"),
    ({"x": X, "y": np.array([1, 2, 3])}, r"y is int64 of shape \(3,\)"),
    ({"x": X, "y": objects(LABELS[:2])}, r"shape \(2,\)"),
    ({"x": X, "y": np.array(None)}, r"shape \(\)"),
    ({"x": X / 255, "y": objects(LABELS)}, r"x is float64; it must be uint8 \(N, H, W\)"),
    ({"x": X[..., None], "y": objects(LABELS)}, r"it must be uint8 \(N, H, W\)"),
    ({"x": X[:0], "y": objects([])}, "no pixels: x"),
    ({"x": objects(LABELS), "y": objects(LABELS)}, "x holds pickled"),
    ({"y": objects(LABELS)}, "no array called images"),
])
def test_bad_arrays(tmp_path, arrays, message):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        load_pyro_mnist(path, trust=True)


def test_a_cut_file_is_no_file(tmp_path):
    path = write(tmp_path / "bad.npz", objects(LABELS))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="no readable npz"):
        load_pyro_mnist(path, trust=True)


def test_damaged_labels_are_found_by_their_checksum(tmp_path):
    path = write(tmp_path / "bad.npz", objects(LABELS))
    content = path.read_bytes()
    assert content.count(b"ndarray") == 1
    path.write_bytes(content.replace(b"ndarray", b"nd\0rray"))
    with pytest.raises(UserError, match="no readable npz.*CRC"):
        load_pyro_mnist(path, trust=True)


def test_a_file_with_images_is_read_as_before(tmp_path):
    images = np.zeros((2, 4, 5, 3), np.uint8)
    path = write(tmp_path / "own.npz", objects(LABELS), images=images, counts=np.array([1, 0]))
    data = load_npz(path)
    assert data.shape == (4, 5, 3) and data.counts.tolist() == [1, 0]
