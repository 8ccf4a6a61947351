"""MNIST: the IDX format, where it is looked for, downloads, and the resize of digits."""

import gzip
import hashlib
import io
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_scenes.data import make, mnist
from pyro_scenes.data.multi_mnist import resize_sums
from pyro_scenes.errors import UserError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array):
    return (bytes([0, 0, 8, array.ndim])
            + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes())


DIGITS = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
ANSWERS = np.array([5, 0, 9], np.uint8)
CONTENT = {IMAGES: idx(DIGITS), LABELS: idx(ANSWERS)}


@pytest.fixture(autouse=True)
def away_from_home(monkeypatch, tmp_path):
    """No variable, an empty cache, and a network that fails the test when it is used."""
    monkeypatch.delenv(mnist.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("downloads"))


@pytest.fixture
def tiny(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / IMAGES).write_bytes(CONTENT[IMAGES])
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress(CONTENT[LABELS]))
    return folder


def is_tiny(images, labels):
    return np.array_equal(images, DIGITS) and np.array_equal(labels, ANSWERS)


def test_parse_by_hand():
    content = b"\0\0\x08\x02" + b"\0\0\0\x02" + b"\0\0\0\x03" + bytes([1, 2, 3, 4, 5, 250])
    parsed = mnist.parse_idx(content, "x")
    assert parsed.dtype == np.uint8 and parsed.tolist() == [[1, 2, 3], [4, 5, 250]]


@pytest.mark.parametrize("content,message", [
    (b"", "no IDX file"),
    (b"PK\3\4 something", "no IDX file"),
    (b"\0\0\x0d\x01\0\0\0\1" + bytes(4), "type 0x0d"),
    (b"\0\0\x08\x00", "incomplete IDX header"),
    (b"\0\0\x08\x03\0\0\0\1\0\0", "incomplete IDX header"),
    (CONTENT[IMAGES][:-1], "2351 bytes of data where its header says 2352"),
    (CONTENT[IMAGES] + b"\0", "2353 bytes"),
    (b"\0\0\x08\x03" + b"\xff" * 12, "header says 79228162458924105385300197375"),
])
def test_parse_refuses(content, message):
    with pytest.raises(UserError, match=message):
        mnist.parse_idx(content, "file x")


def test_folder_plain_and_gzipped(tiny):
    assert is_tiny(*mnist.read_mnist("train", tiny))
    images, labels = mnist.read_mnist("train", tiny, first=2)
    assert len(images) == len(labels) == 2


def test_variable_names_a_folder_and_the_argument_comes_first(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv(mnist.VARIABLE, str(tiny))
    assert is_tiny(*mnist.read_mnist("train"))
    with pytest.raises(UserError, match="elsewhere has no train-images"):
        mnist.read_mnist("train", tmp_path / "elsewhere")


@pytest.mark.parametrize("name,content,message", [
    (IMAGES, idx(DIGITS[:, :27]), "28 x 28"),
    (LABELS, idx(ANSWERS[:2]), "does not label"),
    (LABELS, idx(ANSWERS + 1), "does not label"),
    (LABELS, gzip.compress(CONTENT[LABELS])[:-9], "damaged"),
    (LABELS, b"\x1f\x8bnot gzip at all", "damaged"),
])
def test_folder_with_a_bad_file(tiny, name, content, message):
    (tiny / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        mnist.read_mnist("train", tiny)
    assert "\n" not in str(error.value)


def test_too_few_digits_for_the_pool(tiny):
    with pytest.raises(UserError, match="3 images; 1000 are needed"):
        make("multi-mnist-1k", 5, mnist=tiny)


def test_a_digit_without_ink_is_refused(tmp_path):
    images = np.full((1000, 28, 28), 255, np.uint8)
    images[417] = 100
    (tmp_path / IMAGES).write_bytes(idx(images))
    (tmp_path / LABELS).write_bytes(idx(np.zeros(1000, np.uint8)))
    with pytest.raises(UserError, match="sprite 417 .* no ink"):
        make("multi-mnist-1k", 5, mnist=tmp_path)


def test_expanding_files_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(mnist, "LIMIT", 2000)
    (tiny / LABELS).write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(UserError, match="more than 2000 bytes"):
        mnist.read_mnist("train", tiny)


class Network:
    """Stands in for urlopen: bytes or an exception for each mirror, and a record of the calls."""

    def __init__(self, *mirrors):
        self.mirrors, self.calls = dict(zip(mnist.MIRRORS, mirrors)), []

    def __call__(self, url, timeout):
        self.calls.append(url)
        mirror, _, name = url.rpartition("/")
        answer = self.mirrors[mirror + "/"]
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer(CONTENT[name.removesuffix(".gz")]))


@pytest.fixture
def originals(monkeypatch):
    """The tiny files pass for the originals."""
    monkeypatch.setattr(
        mnist, "SHA256", {name: hashlib.sha256(c).hexdigest() for name, c in CONTENT.items()})


def test_offline_names_both_ways(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", Network(
        urllib.error.URLError("no\nroute"), TimeoutError()))
    with pytest.raises(UserError, match="--mnist DIR or PYRO_SCENES_MNIST.*network") as error:
        make("multi-mnist-1k", 5)
    assert "\n" not in str(error.value) and "no route" in str(error.value)


def test_download_from_the_second_mirror_then_from_the_cache(monkeypatch, originals, tmp_path):
    network = Network(urllib.error.HTTPError("u", 403, "Forbidden", None, None), gzip.compress)
    monkeypatch.setattr(urllib.request, "urlopen", network)
    assert is_tiny(*mnist.read_mnist("train"))
    assert len(network.calls) == 4
    cache = tmp_path / "cache" / "pyro_scenes" / "mnist"
    assert sorted(p.name for p in cache.iterdir()) == [f"{IMAGES}.gz", f"{LABELS}.gz"]
    assert is_tiny(*mnist.read_mnist("train"))
    assert len(network.calls) == 4
    (cache / f"{LABELS}.gz").write_bytes(b"spoilt")
    assert is_tiny(*mnist.read_mnist("train"))
    assert len(network.calls) == 6


def test_a_wrong_download_is_neither_used_nor_kept(monkeypatch, originals, tmp_path):
    other = [lambda c: gzip.compress(c + b"\0"), lambda c: gzip.compress(c)[:-20]]
    monkeypatch.setattr(urllib.request, "urlopen", Network(*other))
    with pytest.raises(UserError, match="checksum.*damaged"):
        mnist.read_mnist("train")
    assert not list(tmp_path.rglob("*.gz"))


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, originals, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(urllib.request, "urlopen", Network(gzip.compress))
    assert is_tiny(*mnist.read_mnist("train"))


def test_resize_is_bilinear_with_half_pixel_centres():
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (20, 28, 28), np.uint8)
    ours = resize_sums(digits)
    reference = torch.nn.functional.interpolate(
        torch.from_numpy(digits)[:, None].double(), size=(15, 15), mode="bilinear",
        align_corners=False)[:, 0].numpy()
    assert ours.dtype == np.int32
    assert np.abs(ours / 900 - reference).max() < 1e-9


@pytest.mark.parametrize("split,size,first", [("train", 60_000, [5, 0, 4, 1, 9]),
                                              ("test", 10_000, [7, 2, 1, 0, 4])])
def test_real_files(split, size, first, mnist_folder):
    images, labels = mnist.read_mnist(split, mnist_folder)
    assert images.shape == (size, 28, 28) and labels[:5].tolist() == first
    prefix = {"train": "train", "test": "t10k"}[split]
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        if (mnist_folder / f"{name}.gz").is_file():
            content = gzip.decompress((mnist_folder / f"{name}.gz").read_bytes())
            assert hashlib.sha256(content).hexdigest() == mnist.SHA256[name]


@pytest.mark.parametrize("name,digest", [
    ("multi-mnist-1k", "3d6ae10cd8094b64b9e1cc1c14f5c494f1d7f9ca43f96bdfb2999f41bee568b0"),
    ("multi-mnist-10k", "0332200d1561f15c084a8a3f5cd34a929c4e3593fafa29f72fcbbcc12b3a9b0a"),
])
def test_bytes_of_real_digits_never_change(name, digest, mnist_folder):
    data = make(name, 200, objects=(0, 7), seed=7, mnist=mnist_folder)
    assert hashlib.sha256(data.images().tobytes()).hexdigest() == digest
    _, labels = mnist.read_mnist("train", mnist_folder)
    present = data.categories >= 0
    assert np.array_equal(labels[data.attributes["digit"][present]], data.categories[present])


def test_a_user_without_a_home_is_asked_for_a_folder(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("XDG_CACHE_HOME", "PYRO_SCENES_MNIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="--mnist"):
        make("multi-mnist-1k", 1)
