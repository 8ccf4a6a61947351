"""npz files: round trips, and one clear line for each kind of bad file."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from pyro_scenes.data import SceneData, load, load_npz, make, save_npz
from pyro_scenes.errors import UserError


def good():
    """Two 4 x 5 images: one object, none."""
    images = np.zeros((2, 4, 5, 1), np.uint8)
    images[0, 1, 1:3] = 255
    return {
        "images": images,
        "counts": np.array([1, 0]),
        "categories": np.array([[2, -1], [-1, -1]]),
        "boxes": np.array([[[2, 1.5, 2, 1], [np.nan] * 4], [[np.nan] * 4] * 2]),
        "segmentation": (images[..., 0] > 0).astype(np.uint8),
    }


def write(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("objects", [(0, 3), (0, 0)])
def test_generated_data_round_trip(tmp_path, objects):
    path = tmp_path / "scenes.npz"
    data = make("multi-dsprites", 50, objects=objects)
    save_npz(path, data)
    back = load_npz(path)
    assert back.name == "scenes.npz" and back.shape == (64, 64, 3) and back.binary
    assert back.attributes == {} and back.class_names == ()
    assert np.array_equal(back.images(), data.images())
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {"images", "counts", "categories", "boxes", "segmentation"}
        assert np.array_equal(file["images"], data.images())
        for name in ("counts", "categories", "boxes", "segmentation"):
            value = getattr(data, name)
            for other in (file[name], getattr(back, name)):
                assert other.dtype == value.dtype
                assert np.array_equal(other, value, equal_nan=value.dtype.kind == "f")
    assert list(tmp_path.iterdir()) == [path]


def test_grey_levels_and_images_alone_round_trip(tmp_path):
    images = np.arange(5000 * 2 * 3 * 3, dtype=np.uint32).astype(np.uint8).reshape(5000, 2, 3, 3)
    path = write(tmp_path / "own.npz", {"images": images})
    data = load_npz(path)
    assert not data.binary and np.array_equal(data.images(), images)
    assert data.counts is data.categories is data.boxes is data.segmentation is None
    assert np.allclose(data.batch(slice(3)).numpy(), images[:3].transpose(0, 3, 1, 2) / 255)
    save_npz(tmp_path / "again.npz", data)
    assert np.array_equal(load_npz(tmp_path / "again.npz").images(), images)


def test_other_integers_floats_arrays_and_orders_are_read(tmp_path):
    arrays = good()
    arrays["counts"] = arrays["counts"].astype(np.uint8)
    arrays["categories"] = arrays["categories"].astype(">i2")
    arrays["boxes"] = arrays["boxes"].astype(np.float16)
    arrays["images"] = np.asfortranarray(arrays["images"])
    arrays["notes"] = np.array(["not ours"])
    data = load_npz(write(tmp_path / "own.npz", arrays))
    assert data.counts.tolist() == [1, 0] and data.counts.dtype == np.int64
    assert data.categories.tolist() == [[2, -1], [-1, -1]]
    assert data.boxes[0, 0].tolist() == [2, 1.5, 2, 1] and data.boxes.dtype == np.float32
    assert np.array_equal(data.images(), good()["images"])


def test_a_file_serves_either_split_and_is_cut(tmp_path):
    path = write(tmp_path / "own.npz", good())
    for split in ("train", "test"):
        data = load(str(path), split=split, images=1)
        assert len(data) == 1 and data.counts.tolist() == [1]
        assert data.segmentation.shape == (1, 4, 5)
    assert len(load(path, images=100)) == 2
    with pytest.raises(UserError, match="is a file"):
        load(path, objects=(0, 3))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scenes.npz"
    path.write_bytes(b"old")

    def broken(self):
        yield self.images(slice(1))
        raise KeyboardInterrupt

    monkeypatch.setattr(SceneData, "blocks", broken)
    with pytest.raises(KeyboardInterrupt):
        save_npz(path, make("multi-dsprites", 3))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


NAN_IN_PART = good()["boxes"].copy()
NAN_IN_PART[0, 0, 2] = np.nan
INFINITE, FLAT, EXTRA = (good()["boxes"].copy() for _ in range(3))
INFINITE[0, 0, 0] = np.inf
FAR, THIN = (good()["boxes"].copy() for _ in range(2))
FAR[0, 0, 0], THIN[0, 0, 2] = 1e300, 1e-300  # of float64, and not of float32
FLAT[0, 0, 3] = 0
EXTRA[1, 0] = 1


@pytest.mark.parametrize("change,message", [
    ({"images": None}, "no array called images"),
    ({"images": np.zeros((2, 4, 5, 1))}, "float64; it must be uint8"),
    ({"images": np.zeros((2, 4, 5, 1), np.uint16)}, "uint16; it must be uint8"),
    ({"images": np.zeros((2, 4, 5), np.uint8)}, r"\(2, 4, 5\); it must be uint8 \(N, H, W, C\)"),
    ({"images": np.zeros((2, 1, 4, 5), np.uint8), "segmentation": None}, "5 channels"),
    ({"images": np.zeros((0, 4, 5, 1), np.uint8), "counts": None, "categories": None,
      "boxes": None, "segmentation": None}, "no pixels"),
    ({"images": np.zeros((2, 0, 5, 1), np.uint8), "segmentation": None}, "no pixels"),
    ({"images": np.array([None, 1])}, "pickled"),
    ({"counts": np.array([1, None])}, "pickled"),
    ({"counts": np.array([1.0, 0.0])}, "float64; it must be integers"),
    ({"counts": np.array([[1, 0]])}, r"it must be integers \(N,\)"),
    ({"counts": np.array([1, 0, 0])}, "N is 2"),
    ({"counts": np.array([-1, 0])}, "-1; a count"),
    ({"counts": np.array([3, 0])}, "image 0 has 3 objects by counts but 1 by categories"),
    ({"counts": np.array([1, 1]), "categories": None}, "image 1 has 1 objects .* 0 by boxes"),
    ({"categories": np.array([[2], [-1]])}, "boxes has shape .* M is 1"),
    ({"categories": np.array([[2, -2], [-1, -1]])}, "-2; a category"),
    ({"categories": np.array([[-1, -1], [-1, 0]])}, "disagree"),
    ({"boxes": np.zeros((2, 2, 4), int)}, "must be floats"),
    ({"boxes": np.zeros((2, 2, 5))}, "4 is 4"),
    ({"boxes": NAN_IN_PART}, "NaN in part"),
    ({"boxes": INFINITE}, "infinite"),
    ({"boxes": FAR}, "infinite"),
    ({"boxes": THIN}, "without width or height"),
    ({"boxes": FLAT}, "without width or height"),
    ({"boxes": EXTRA}, "disagree"),
    ({"segmentation": np.zeros((2, 4, 5), int)}, "segmentation is int64"),
    ({"segmentation": np.zeros((2, 5, 4), np.uint8)}, "H is 4"),
])
def test_bad_arrays(tmp_path, change, message):
    arrays = {k: v for k, v in {**good(), **change}.items() if v is not None}
    with pytest.raises(UserError, match=message) as error:
        load_npz(write(tmp_path / "bad.npz", arrays))
    assert "\n" not in str(error.value) and "bad.npz" in str(error.value)


def no_file(path):
    pass


def folder(path):
    path.mkdir()


def empty(path):
    path.write_bytes(b"")


def pickled(path):
    path.write_bytes(pickle.dumps({"images": 1}))


def plain_npy(path):
    with open(path, "wb") as file:
        np.save(file, good()["images"])


def truncated(path):
    save_npz(path, make("multi-dsprites", 5))
    path.write_bytes(path.read_bytes()[:-100])


def damaged(path):
    save_npz(path, make("multi-dsprites", 50, objects=(3, 3)))
    content = bytearray(path.read_bytes())
    content[400:420] = bytes(20)
    path.write_bytes(content)


def no_npy_inside(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"hello")


def half_a_header(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00\x0b\x00{'descr': (")


def claims(path, shape, payload=b""):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": shape, "fortran_order": False, "descr": "|u1"})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header.getvalue() + payload)


def claims_too_much(path):
    claims(path, (10**7, 64, 64, 3))


def cut_short(path):
    claims(path, (10, 4, 4, 1), bytes(159))


@pytest.mark.parametrize("make_file,message", [
    (no_file, "does not exist"),
    (folder, "no readable npz"),
    (empty, "no readable npz"),
    (pickled, "no readable npz"),
    (plain_npy, "no readable npz"),
    (truncated, "no readable npz"),
    (damaged, "no readable npz"),
    (no_npy_inside, "no readable npz"),
    (half_a_header, "no readable npz"),
    (claims_too_much, "claims 114 GiB"),
    (cut_short, "cut short"),
])
def test_bad_files(tmp_path, make_file, message):
    path = tmp_path / "bad.npz"
    make_file(path)
    with pytest.raises(UserError, match=message) as error:
        load_npz(path)
    assert "\n" not in str(error.value) and "bad.npz" in str(error.value)


def test_the_smallest_whole_claim_is_read(tmp_path):
    claims(tmp_path / "own.npz", (10, 4, 4, 1), bytes(160))
    assert len(load_npz(tmp_path / "own.npz")) == 10
