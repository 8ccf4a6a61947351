"""Files from strangers: whatever they are, one line refuses them, and memory stays in its bound."""

import gzip
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from pyro_scenes import cards, checkpoint, cli, limits, tensors
from pyro_scenes.config import RunConfig, make_config
from pyro_scenes.data import load_npz, load_pngs, load_pyro_mnist, mnist
from pyro_scenes.errors import UserError, reason
from pyro_scenes.files import parse_json, read_json, write_json
from pyro_scenes.training import Run

ROOT = Path(__file__).parent.parent
BOUND = 2**26  # bytes, in place of GiB
# A model that is made in no time.
SMALL = ("networks=auxiliary", "grid_width=8", "grid_latent=2", "grid_stages=1")


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limits.VARIABLE, str(BOUND / 2**30))


def refused(act: Callable[[], object], *said: str) -> None:
    with pytest.raises(UserError) as error:
        act()
    line = str(error.value)
    assert "\n" not in line and len(line) < 1000
    assert all(words in line for words in said), line


# --- the bound -----------------------------------------------------------------------------------


def test_the_bound_is_told_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(limits.VARIABLE)
    assert limits.most() == 4 * 2**30
    monkeypatch.setenv(limits.VARIABLE, "0.5")
    assert limits.most() == 2**29
    limits.check("it", 2**29)
    refused(lambda: limits.check("it", 2**29 + 1), "it claims 0.5 GiB, more than 0.5",
            "PYRO_SCENES_MEMORY")
    for text in ("many", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(limits.VARIABLE, text)
        refused(limits.most, "PYRO_SCENES_MEMORY", text)


def test_reasons_are_short_lines_of_what_can_be_printed() -> None:
    assert reason(ValueError("a\n b\x1b[31m" + "x" * 999)) == "a b?[31m" + "x" * 192
    assert reason(EOFError()) == "EOFError"


def npy(shape: tuple[int, ...], descr: str = "|u1", version: int = 1) -> bytes:
    """The header of an array."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text


def zipped(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def claimed(path: Path, name: str, size: int) -> Path:
    """The archive, in which an entry claims to be of another size when it is unpacked."""
    content = path.read_bytes()
    at = content.rindex(name.encode())
    assert content[at - 46:at - 42] == b"PK\x01\x02"
    path.write_bytes(content[:at - 22] + struct.pack("<I", size) + content[at - 18:])
    return path


def terabytes(path: Path) -> Path:
    return zipped(path, {"images.npy": npy((2**20, 1024, 1024, 3))})


def zip_bomb(path: Path) -> Path:
    """All that it claims is there, in a thousandth of the space."""
    return zipped(path, {"images.npy": npy((2**11, 256, 256, 1)) + bytes(2**27)})


def zip_bomb_in_disguise(path: Path) -> Path:
    """More is there than is claimed."""
    return claimed(zipped(path, {"images.npy": npy((1, 64, 64, 1)) + bytes(2**28)}),
                   "images.npy", len(npy((1, 64, 64, 1))) + 64 * 64)


def many_arrays(path: Path) -> Path:
    """None is too large, and all are."""
    return zipped(path, {
        "images.npy": npy((2**10, 256, 160, 1)) + bytes(2**10 * 256 * 160),
        "segmentation.npy": npy((2**10, 256, 160)) + bytes(2**10 * 256 * 160)})


def small_numbers(path: Path) -> Path:
    """A byte each in the file, and eight in memory."""
    return zipped(path, {"images.npy": npy((1, 1, 1, 1)) + b"\0",
                         "categories.npy": npy((1, 2**24), "|i1") + b"\xff" * 2**24})


def long_header(path: Path) -> Path:
    """numpy looks at a header's length after it has read it."""
    header = b"\x93NUMPY\x02\0" + struct.pack("<I", 2**27) + b" " * 2**27
    return zipped(path, {"images.npy": header})


def decoy(path: Path) -> Path:
    """numpy's own reader would take the entry without an ending."""
    zipped(path, {"images": npy((2**10, 1024, 1024, 1)),
                  "images.npy": npy((1, 4, 4, 1)) + bytes(16)})
    assert load_npz(path).shape == (4, 4, 1)
    return path


def other_method(path: Path) -> Path:
    """Pieces of these have no largest size when they are unpacked."""
    return zipped(path, {"images.npy": npy((1, 4, 4, 1)) + bytes(16)}, zipfile.ZIP_LZMA)


def long_directory(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(20_000):
            archive.writestr(f"{i:0200}", b"")
    return path


def png(path: Path, side: int, longer: int = 0) -> Path:
    """A grey picture whose data are those of 4 x 4 pixels, and claim to be so many bytes longer."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(20))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4 + longer * (chunk is data)) + chunk
        + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data, b"IEND")))
    return path


def lying_png(path: Path) -> Path:
    """20,000 x 20,000 pixels in some bytes."""
    return png(path, 20_000)


def long_chunk(path: Path) -> Path:
    """A chunk of 1 GiB in some bytes; what is there is enough for the picture, and is read."""
    png(path, 4, 2**30)
    assert not read_png(png(path.with_name("whole.png"), 4)).any()
    return path


def large_png(path: Path) -> Path:
    """5,000 x 5,000 pixels, of which all are there."""
    Image.new("L", (5000, 5000)).save(path, "PNG")
    return path


def folder_of_pngs(path: Path) -> Path:
    """None is too large, and all are."""
    path.mkdir()
    for i in range(20):
        Image.new("L", (1000, 1000)).save(path / f"{i:02}.png")
    return path


def gzip_bomb(path: Path) -> Path:
    path.mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (path / f"{name}.gz").write_bytes(gzip.compress(bytes(2**28), 1))
    return path


def saved(path: Path, **changes) -> Path:
    """A checkpoint, with parts of its content changed."""
    config = make_config("conv-vae", "multi-dsprites", settings=SMALL)
    model = checkpoint.build(config, (1, 8, 8))
    checkpoint.save(path, config, model, 3)
    if changes:
        content = torch.load(path, weights_only=True) | changes
        torch.save(content, path)
    return path


def asking(*given: tuple[str, str, object]) -> str:
    """The JSON of a configuration with (part, name, value) changed."""
    content = make_config("conv-vae", "multi-dsprites", settings=SMALL).to_dict()
    for part, name, value in given:
        content[part][name] = value
    return json.dumps(content)


def repacked(path: Path, change: Callable[[bytes], bytes] = bytes, **options) -> Path:
    """A checkpoint whose pickle was changed, or which was packed in another way."""
    with zipfile.ZipFile(saved(path)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    return zipped(path, {name: change(content) if name.endswith("data.pkl") else content
                         for name, content in entries.items()}, **options)


def compressed_checkpoint(path: Path) -> Path:
    with zipfile.ZipFile(saved(path)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    return zipped(path, entries | {"archive/data/0": bytes(2**28)})


def large_model(path: Path) -> Path:
    return saved(path, config=asking(("net", "grid_width", 60_000)))


def larger_model_than_can_be_counted(path: Path) -> Path:
    """2 ** 16 x 2 ** 16 x 4 x 4 numbers a layer, of which there are many."""
    return saved(path, config=asking(("net", "grid_width", 65_536), ("net", "grid_stages", 10)))


def large_image(path: Path) -> Path:
    config = make_config("air", "multi-dsprites", "paper")
    return saved(path, image_shape=[3, 65_536, 65_536], config=json.dumps(config.to_dict()))


def one_number_as_many(path: Path) -> Path:
    name = "encoder.0.0.weight"
    return saved(path, model={name: torch.zeros(1).expand(2**40)})


def bytes_by_a_call(path: Path) -> Path:
    """torch.load lets a pickle have any number of zeros."""
    call = b"X\1\0\0\0xcbuiltins\nbytearray\n(J" + struct.pack("<i", 2**30) + b"tR"
    return repacked(path, lambda pickled: pickled.replace(b"(", b"(" + call, 1),
                    method=zipfile.ZIP_STORED)


def lying_storage(path: Path) -> Path:
    """A storage, and the tensor in it, that have 2 ** 28 numbers by the pickle."""
    many = b"J" + struct.pack("<i", 2**28)
    size = b"K\x08" + b"t"  # eight biases

    def change(pickled: bytes) -> bytes:
        assert size in pickled
        return pickled.replace(size, many + b"t", 1)
    return repacked(path, change, method=zipfile.ZIP_STORED)


def many_objects(path: Path) -> Path:
    """A million empty lists, a byte each."""
    lists = b"(" + b"]" * 2**20 + b"t0"
    return repacked(path, lambda pickled: pickled[:2] + lists + pickled[2:],
                    method=zipfile.ZIP_STORED)


def long_json(path: Path) -> Path:
    path.write_text('{"x": [' + "[]," * 2**20 + "[]]}")
    return path


def deep_json(path: Path) -> Path:
    path.write_text('{"x": ' + "[" * 10**5)
    return path


def read_png(path: Path) -> np.ndarray:
    return load_pngs([path], 1)


def read_digits(path: Path) -> object:
    return mnist.read_mnist("train", path)


BOMBS = [
    (terabytes, load_npz, "claims 3.07e+03 GiB, more than 0.0625"),
    (zip_bomb, load_npz, "claims 0.125 GiB"),
    (zip_bomb_in_disguise, load_npz, "no readable npz file"),
    (many_arrays, load_npz, "segmentation claims 0.0781 GiB"),
    (small_numbers, load_npz, "categories claims 0.125 GiB"),
    (long_header, load_npz, "no readable npz file"),
    (decoy, load_npz, None),
    (other_method, load_npz, "compressed by a method"),
    (long_directory, load_npz, "directory is too long"),
    (lying_png, read_png, "exceeds limit"),
    (long_chunk, read_png, None),
    (large_png, read_png, "claims 0.0931 GiB"),
    (folder_of_pngs, read_png, "16.png claims 0.0633 GiB"),
    (gzip_bomb, read_digits, "more than 200000000 bytes"),
    (compressed_checkpoint, checkpoint.load, "not a checkpoint"),
    (large_model, checkpoint.load, "the model of these settings claims"),
    (larger_model_than_can_be_counted, checkpoint.load, "the model of these settings claims"),
    (large_image, checkpoint.load, "the model of these settings claims"),
    (one_number_as_many, checkpoint.load, "not a checkpoint"),
    (bytes_by_a_call, checkpoint.load, "not a checkpoint"),
    (lying_storage, checkpoint.load, "not a checkpoint"),
    (many_objects, checkpoint.load, "claims 0.099 GiB"),
    (long_json, read_json, "claims 0.293 GiB"),
    (deep_json, read_json, "nested too deeply"),
]


@pytest.mark.parametrize("make, read, said", BOMBS, ids=[make.__name__ for make, _, _ in BOMBS])
def test_memory_stays_in_its_bound(
    tmp_path: Path, make: Callable[[Path], Path], read: Callable[[Path], object], said: str | None
) -> None:
    """Address space is limited meanwhile, so that what takes more fails in another way."""
    path = make(tmp_path / "bomb")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # IDX has a bound of its own, for the file as it is packed and as it is unpacked.
    room = 2 * mnist.LIMIT if read is read_digits else limits.PEAK * BOUND
    resource.setrlimit(resource.RLIMIT_AS, (used + room, before[1]))
    try:
        if said is None:
            read(path)
        else:
            refused(lambda: read(path), said)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("make, said", [
    (compressed_checkpoint, "it is compressed"), (bytes_by_a_call, "asks for builtins.bytearray"),
    (lying_storage, "a storage is of another size"),
    (one_number_as_many, "a tensor is larger than what is stored"),
])
def test_nothing_of_what_lies_comes_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path], said: str
) -> None:
    path = make(tmp_path / "bomb")
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it is read"))
    with pytest.raises(ValueError, match=said):
        tensors.read(path)


@pytest.mark.parametrize("binary", [True, False])
def test_what_may_be_read_takes_no_more_than_its_bound(tmp_path: Path, binary: bool) -> None:
    """Images that take all of it, with copies and what numpy makes on the way."""
    side = 2**13 - 1
    image = np.full((1, side, side, 1), 255 if binary else 7, np.uint8)
    np.savez_compressed(tmp_path / "large.npz", images=image)
    del image
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limits.PEAK * BOUND, before[1]))
    try:
        data = load_npz(tmp_path / "large.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert data.shape == (side, side, 1) and data.binary == binary


@pytest.mark.parametrize("allocate", [
    lambda: [0] * 2**60, lambda: np.zeros(2**50), lambda: torch.zeros(2**50),
])
def test_too_little_memory_is_one_line(
    allocate: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*arguments: object, **options: object) -> None:
        allocate()

    monkeypatch.setattr("pyro_scenes.data.make", none_left)
    out = str(tmp_path / "new.npz")
    result = CliRunner().invoke(cli.make_scenes, ["multi-dsprites", "--out", out])
    assert (result.exit_code, result.stderr) == (2, "Error: there is not enough memory\n")


# --- what is wrong in other ways -----------------------------------------------------------------


@pytest.mark.parametrize("entries, said", [
    ({"images.npy": npy((-2, 4, 4, 1)) + bytes(32)}, "shape (-2, 4, 4, 1)"),
    ({"images.npy": npy((-2, -4, 4, 1)) + bytes(32)}, "shape (-2, -4, 4, 1)"),
    ({"images.npy": npy((1, 4, 4, 1), "<f4") + np.full(16, np.nan, "<f4").tobytes()},
     "images is float32; it must be uint8"),
    ({"images.npy": npy((1,), "|O") + b"cos\nsystem\n(S'true'\ntR."}, "pickled Python objects"),
    ({"images.npy": npy((1, 1, 1, 1)) + b"\0", "counts.npy": npy((1,), "<u8") + b"\xff" * 8},
     "counts has 18446744073709551615"),
    ({"images.npy": npy((1, 1, 1, 1)) + b"\0", "categories.npy": npy((1, 1), "<i8") + b"\x7f" * 8},
     "a category is 0 to 255"),
    ({"images.npy": npy((1, 1, 1, 1), "|V1") + b"\0"}, "it must be uint8"),
    ({"images.npy": npy((1, 1, 1, 1), ",1u1") + b"\0"}, "images has a header that cannot be read"),
])
def test_arrays_that_lie_are_refused(tmp_path: Path, entries: dict[str, bytes], said: str) -> None:
    refused(lambda: load_npz(zipped(tmp_path / "bad.npz", entries)), said)


@pytest.mark.parametrize("content", [
    b"\0\0\x08\x03" + struct.pack(">III", 0, 2**32 - 1, 2**32 - 1),
    b"\0\0\x08\xff" + struct.pack(">I", 1) * 255 + b"x",
])
def test_axes_that_numpy_cannot_have_are_refused(content: bytes) -> None:
    refused(lambda: mnist.parse_idx(content, "file"), "file has ")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.npz"
    os.mkfifo(pipe)
    refused(lambda: load_npz(pipe), "no regular file")
    refused(lambda: load_pngs([pipe], 1), "no regular file")
    refused(lambda: read_json(pipe), "no regular file")
    refused(lambda: checkpoint.load(pipe), "no run, file or shipped checkpoint")


@pytest.mark.parametrize("change", [
    {"format": 3}, {"config": 3}, {"config": "{"}, {"config": "[]"}, {"config": "[" * 10**5},
    {"image_shape": [3, 8]}, {"image_shape": [1, 8, 8.0]}, {"image_shape": [0, 8, 8]},
    {"image_shape": [1, -8, 8]}, {"image_shape": "abc"}, {"step": "three"}, {"step": -1},
    {"step": True}, {"step": 2**60}, {"model": [1]},
    {"model": {}}, {"model": {3: torch.zeros(1)}}, {"training": {}}, {"training": [1]},
    {"config": asking(("net", "grid_width", "wide"))},
    {"config": asking(("net", "grid_width", -8))},
    {"config": asking(("net", "grid_width", 8.5))},
    {"config": asking(("net", "grid_width", 2**40))},
    {"config": asking(("net", "grid_stages", 10**9))},
    {"config": asking(("net", "grid_stages", True))},
    {"config": asking(("net", "networks", "huge"))},
    {"config": asking(("net", "nothing", 1))},
    {"config": asking(("train", "clip", float("nan")))},
    {"config": asking(("train", "steps", None))},
])
def test_a_checkpoint_of_the_wrong_types_is_refused(tmp_path: Path, change: dict) -> None:
    saved(tmp_path / "own.pt")
    assert checkpoint.load(tmp_path / "own.pt").step == 3
    refused(lambda: checkpoint.load(saved(tmp_path / "bad.pt", **change)))


@pytest.mark.parametrize("model, name", [
    ("air", "likelihood"), ("air", "networks"), ("discrete-air", "combine"),
    ("lavae", "appearance_prior"), ("lavae", "networks"), ("conv-vae", "networks"),
])
def test_a_long_word_is_not_repeated_at_length(model: str, name: str) -> None:
    config = make_config(model, "multi-mnist-1k", settings=[f"{name}={'x' * 5000}"])
    refused(lambda: checkpoint.build(config, (1, 64, 64)))


@pytest.mark.parametrize("name, value, said", [
    ("grid_width", 1, "at least 2"), ("grid_stages", 11, "at most 10"),
    ("grid_width", 2**16 + 1, "at most 65536"),
])
def test_settings_of_a_checkpoint_are_within_what_may_be_set(
    tmp_path: Path, name: str, value: int, said: str
) -> None:
    path = saved(tmp_path / "bad.pt", config=asking(("net", name, value)))
    refused(lambda: checkpoint.load(path), f"{name} must be {said}, not {value}")
    refused(lambda: make_config("conv-vae", "multi-dsprites", settings=[f"{name}={value}"]),
            f"{name} must be {said}")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = checkpoint.load(saved(tmp_path / "own.pt")).model.state_dict()
    for value in (float("nan"), float("inf")):
        next(iter(weights.values())).view(-1)[-1] = value
        refused(lambda: checkpoint.load(saved(tmp_path / "bad.pt", model=dict(weights))),
                "bad.pt has weights that are not finite")


def test_a_run_of_a_stranger_is_not_gone_on_with(tmp_path: Path) -> None:
    """Its training's state fits no optimiser, or is nothing that a run has."""
    np.savez(tmp_path / "data.npz", images=np.zeros((8, 8, 8, 1), np.uint8))
    words = ["--model", "conv-vae", "--data", str(tmp_path / "data.npz"), "--steps", "2",
             "--device", "cpu", "--out", str(tmp_path / "out")]
    for setting in (*SMALL, "batch_size=2", "eval_images=1", "log_every=1"):
        words += ["--set", setting]
    done = CliRunner().invoke(cli.train, words)
    assert done.exit_code == 0, done.output
    path = tmp_path / "out" / checkpoint.FILE
    whole = torch.load(path, weights_only=True)
    moments = {i: {name: torch.zeros(3) for name in state}
               for i, state in whole["training"]["optimizer"]["state"].items()}
    change: dict
    for change in (
        {"optimizer": {}}, {"optimizer": whole["training"]["optimizer"] | {"state": moments}},
        {"optimizer": whole["training"]["optimizer"] | {"param_groups": []}},
        {"modules": {"x": torch.zeros(1)}}, {"random": torch.zeros(3)}, {"history": {"loss": 3}},
        {"history": {"loss": (["one"], [1.0])}}, {"history": {"loss": ([1], [torch.zeros(3)])}},
        {"seconds": "long"}, {"machine": None}, {"seconds": 2**1100}, {"seconds": -1.0},
        {"history": {"loss": ([2**1100], [1.0])}}, {"history": {"loss": ([-1], [1.0])}},
    ):
        torch.save(whole | {"training": whole["training"] | change}, path)
        result = CliRunner().invoke(cli.train, [*words, "--resume"])
        assert result.exit_code == 2, (change, result.output)
        assert result.stderr.startswith(f"Error: {path} ") and result.stderr.count("\n") == 1
    # How the optimiser works is the configuration's to say.
    torch.save(whole, path)
    content = torch.load(path, weights_only=True)
    for group in content["training"]["optimizer"]["param_groups"]:
        group |= {"betas": "x", "eps": -1.0, "maximize": True}
    torch.save(content, path)
    assert CliRunner().invoke(cli.train, [*words, "--resume"]).exit_code == 0
    run = Run(checkpoint.configuration(content), "cpu")
    run.restore(checkpoint.read(path), path)
    kept, = run.optimizer.param_groups
    assert (kept["betas"], kept["eps"], kept["maximize"]) == ((0.9, 0.999), 1e-8, False)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"runs": []}', "\xff", '{"name": 1'])
def test_results_that_are_damaged_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "air.json"
    path.write_bytes(text.encode("latin1"))
    refused(lambda: cards.table(tmp_path), "air.json is not what it should be")


def test_json_that_was_written_is_read(tmp_path: Path) -> None:
    content = {"a": [1, None, "x"], "b": {"c": 0.5}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", ["a", "b"]) == content
    refused(lambda: read_json(tmp_path / "a.json", ["z"]), "it has no z")
    refused(lambda: read_json(tmp_path / "b.json"), "does not exist")


def test_no_output_leaves_its_folder(tmp_path: Path) -> None:
    """Names that come from elsewhere: the images', which are numbered, and the checkpoint's."""
    for name in ("../out", "a/b", "/out", "..", ""):
        refused(lambda: cards.ship(name, [], folder=tmp_path), "is not a name")
    assert list(tmp_path.iterdir()) == []
    work = tmp_path / "work" / "pictures"
    work.mkdir(parents=True)
    shutil.copy(checkpoint.shipped()["air-multi-sprites"], work / "..weights.pt")
    for i in range(2):
        Image.new("L", (64, 64)).save(work / f"..%2F..%2F{i}.png")
    words = [str(work / "..weights.pt"), str(work), "--graph", "graphml", "--device", "cpu",
             "--out", str(tmp_path / "work" / "out")]
    result = CliRunner().invoke(cli.infer, words)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "work" / "out").iterdir()) == [
        "0.graphml", "1.graphml"]
    assert {p.name for p in tmp_path.iterdir()} == {"work"}
    assert {p.name for p in (tmp_path / "work").iterdir()} == {"pictures", "out"}


def test_a_download_is_verified_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong one never comes to the parser, whatever it holds."""
    content = b"\0\0\x08\x01" + struct.pack(">I", 2) + b"\1\2"
    asked = []

    def answer(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.delenv(mnist.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr(mnist, "parse_idx", lambda *arguments: pytest.fail("it is parsed"))
    refused(lambda: mnist.read_mnist("train"), "is not the original file (checksum)")
    assert len(asked) == len(mnist.MIRRORS)
    # Nor does a wrong one in the cache.
    cache = tmp_path / "pyro_scenes" / "mnist" / "train-images-idx3-ubyte.gz"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    refused(lambda: mnist.read_mnist("train"), "(checksum)")


# --- properties ----------------------------------------------------------------------------------

FEW = settings(max_examples=60, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture])
ANY_ARRAY = st.one_of(
    arrays.arrays(st.one_of(arrays.integer_dtypes(), arrays.floating_dtypes(),
                            arrays.boolean_dtypes()), arrays.array_shapes(max_dims=5, max_side=4)),
    arrays.arrays(np.uint8, arrays.array_shapes(min_dims=4, max_dims=4, min_side=0, max_side=4)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner,
                                                                max_size=4), max_leaves=9)


@FEW
@given(st.dictionaries(st.sampled_from(["images", "x", "counts", "categories", "boxes",
                                        "segmentation", "notes"]), ANY_ARRAY))
def test_any_arrays_are_read_as_they_are_or_refused(tmp_path: Path, given: dict) -> None:
    path = tmp_path / "any.npz"
    np.savez(path, **given)
    try:
        data = load_npz(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    images = given["images"] if "images" in given else given["x"][..., None]
    assert images.dtype == np.uint8 and np.array_equal(data.images(), images)
    for name in ("counts", "categories", "boxes", "segmentation"):
        kept = getattr(data, name)
        assert (kept is None) == (name not in given or "images" not in given)
        if kept is not None:
            equal_nan = kept.dtype == np.float32
            assert np.array_equal(kept, given[name].astype(kept.dtype), equal_nan=equal_nan)


@FEW
@given(arrays.arrays(np.uint8, arrays.array_shapes(max_dims=3, max_side=5)), st.binary(max_size=9))
def test_any_idx_is_read_as_it_is_and_no_more(array: np.ndarray, more: bytes) -> None:
    content = b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape)
    content += array.tobytes()
    assert np.array_equal(mnist.parse_idx(content, "file"), array)
    if more:
        refused(lambda: mnist.parse_idx(content + more, "file"), "file ")
    refused(lambda: mnist.parse_idx(content[:-1], "file"), "file ")


@FEW
@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=3, max_dims=3, max_side=6).map(
    lambda shape: (*shape[:2], 3))))
def test_any_picture_comes_back(tmp_path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(load_pngs([tmp_path / "a.png"], 3)[0], pixels)


@FEW
@given(st.binary(max_size=300),
       st.sampled_from([b"", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"\x80\2"]))
def test_any_bytes_are_refused(tmp_path: Path, content: bytes, beginning: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(beginning + content)
    refused(lambda: load_npz(path), str(path))
    refused(lambda: load_pyro_mnist(path, trust=True), str(path))
    refused(lambda: load_pngs([path], 3), str(path))
    refused(lambda: checkpoint.load(path), str(path))


@FEW
@given(JSON, st.sampled_from(["model", "data", "preset", "seed", "train", "schedule", "net",
                              "latent", "sprite_hidden", "steps", "temperature"]))
def test_any_settings_are_a_configuration_or_refused(value: object, name: str) -> None:
    content = make_config("lavae", "multi-dsprites").to_dict()
    holder = next((part for part in (content, *content.values())
                   if isinstance(part, dict) and name in part))
    holder[name] = value
    try:
        config = RunConfig.from_dict(parse_json(json.dumps(content)))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_short_fuzzing_finds_nothing(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--inputs", "2000", "--seed", "2"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "idx", "json", "scenes", "npz", "labels", "png", "checkpoint"]
    # What is damaged everywhere would be refused at the first byte.
    assert all(" of which 0 were read" not in line for line in lines[:-1])
    assert list(tmp_path.iterdir()) == []
