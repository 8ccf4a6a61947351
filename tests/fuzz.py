"""Feeds damaged files to the readers: each has to end in what it read, or in one clear line.

    python tests/fuzz.py --inputs 1000000             # all readers, the fast ones most
    python tests/fuzz.py png npz --inputs 5000        # some of them
    python tests/fuzz.py png --atheris -runs=100000   # by coverage; needs pyro_scenes[fuzz]

Any other exception, a warning, an input that takes long, and memory beyond the bound of limits.py
end it, with the input in a file. An input follows from the seed and its number, so a failure
repeats.
"""

from __future__ import annotations

import argparse
import gzip
import inspect
import io
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pyro_scenes import checkpoint, limits
from pyro_scenes.config import RunConfig, make_config
from pyro_scenes.data import load_npz, load_pngs, load_pyro_mnist, mnist
from pyro_scenes.errors import UserError
from pyro_scenes.files import parse_json, read_json
from pyro_scenes.models import MODELS
from pyro_scenes.scene import Scene
from pyro_scenes.training import train

BOUND = 2**26  # bytes that a file may take here
SLACK = 2**27  # of what is no file: modules that are loaded late, caches
SECONDS = 30  # that an input may take
Mutate = Callable[[bytes, random.Random], bytes]


class Hang(BaseException):
    """An input takes too long; not an Exception, which a reader could take for damage."""


@dataclass(frozen=True)
class Target:
    """A reader: what files of it look like, how they are damaged, and what part of inputs it gets.
    """

    seeds: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], None]
    mutate: Mutate
    part: float


# --- damage --------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**40,
           2**63 - 1, 2**63, 2**64 - 1, 10**30)
VALUES: tuple = (
    *NUMBERS, -1, -2**63, 0.0, -0.5, 1e-30, 1e30, 1e308, float("nan"), float("inf"), None, True,
    False, "", "x", "flow:1000", "mixture:1000", "flow:-1", "paper", "fast", [], {}, [1] * 200,
    [10**9], [[]], ["x"], {"x": 1}, "\n", "x" * 5000, [0], [65536, 65536],
)


def bytewise(data: bytes, chance: random.Random) -> bytes:
    """A few bytes of any file changed, put in, left out or repeated."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(7)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(content):
            content[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind == 2:
            content[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8)))
        elif kind == 3:
            del content[at:at + chance.choice((1, 2, 4, 16, len(content)))]
        elif kind == 4:
            width = chance.choice((1, 2, 4, 8))
            value = chance.choice(NUMBERS) % 256**width
            content[at:at + width] = value.to_bytes(width, chance.choice(("little", "big")))
        elif kind == 5:
            other = chance.randrange(len(content) + 1)
            content[at:at] = content[other:other + chance.choice((1, 4, 16, 64))]
        else:
            digits = [i for i, byte in enumerate(content) if 48 <= byte < 58]
            if digits:
                at = chance.choice(digits)
                content[at:at + 1] = str(chance.choice(NUMBERS)).encode()
    return bytes(content)


def in_json(data: bytes, chance: random.Random) -> bytes:
    """One value of the JSON put in another's place, most of the time."""
    if chance.random() < 0.2:
        return bytewise(data, chance)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return bytewise(data, chance)
    holder: dict | list = {"": content}
    key: str | int = ""
    while True:
        inner = holder[key]
        if not (isinstance(inner, dict | list) and inner) or chance.random() < 0.05:
            break
        holder = inner
        key = chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    if isinstance(holder, dict) and chance.random() < 0.1:
        del holder[key]
    else:
        holder[key] = chance.choice(VALUES)
    return json.dumps(content).encode()


def in_zip(data: bytes, chance: random.Random) -> bytes:
    """One entry's bytes changed, with a checksum that is right: else most would be seen by it."""
    kind = chance.random()
    if kind < 0.15:
        return bytewise(data, chance)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    at = chance.randrange(len(entries))
    name, content = entries[at]
    if kind < 0.2:
        name = chance.choice((name + "x", name[:-4], "../" + name, "/" + name, "x", name.upper()))
    elif kind < 0.25:
        entries.append(entries[chance.randrange(len(entries))])
    elif kind < 0.9 and chance.random() < 0.7:  # headers are where the claims are
        content = bytewise(content[:200], chance) + content[200:]
    else:
        content = bytewise(content, chance)
    entries[at] = name, content
    new = io.BytesIO()
    method = chance.choice((zipfile.ZIP_STORED,) * 4 + (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(new, "w", method) as archive, warnings.catch_warnings(action="ignore"):
        for name, content in entries:
            archive.writestr(name, content)
    return new.getvalue()


def in_png(data: bytes, chance: random.Random) -> bytes:
    """One chunk's type or content changed, left out or repeated, with a checksum that is right."""
    if chance.random() < 0.2:
        return bytewise(data, chance)
    chunks, at = [], 8
    while at + 12 <= len(data):
        length, = struct.unpack(">I", data[at:at + 4])
        chunks.append((data[at + 4:at + 8], data[at + 8:at + 8 + length]))
        at += 12 + length
    i, kind = chance.randrange(len(chunks)), chance.randrange(6)
    name, content = chunks[i]
    if kind == 0:
        name = chance.choice(b"PLTE tRNS IDAT IEND zTXt iTXt iCCP acTL fcTL fdAT eXIf pHYs gAMA"
                             b" tEXt sRGB cHRM".split())
    elif kind == 1:
        chunks.insert(chance.randrange(len(chunks)), chunks[i])
        i += 1
    elif kind == 2 and name == b"IDAT":
        content = zlib.compress(bytewise(zlib.decompress(content), chance)) if len(chunks) else b""
    elif content:
        content = bytewise(content, chance)
    chunks[i] = name, content
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content
        + struct.pack(">I", zlib.crc32(name + content)) for name, content in chunks)


def in_gzip(data: bytes, chance: random.Random) -> bytes:
    if data[:2] == b"\x1f\x8b" and chance.random() < 0.5:
        return gzip.compress(bytewise(gzip.decompress(data), chance), 1)
    return bytewise(data, chance)


def in_checkpoint(data: bytes, chance: random.Random) -> bytes:
    """A value of its content or of its settings changed, or bytes of its pickle."""
    if chance.random() < 0.5:
        return in_zip(data, chance)
    content = torch.load(io.BytesIO(data), weights_only=True)
    kind = chance.randrange(3)
    if kind == 0:
        content["config"] = in_json(content["config"].encode(), chance).decode(errors="replace")
    elif kind == 1:
        holder = content if chance.random() < 0.5 else content["training"]
        holder[chance.choice(list(holder))] = chance.choice((*VALUES, torch.zeros(3)))
    else:
        name = chance.choice(list(content["model"]))
        content["model"][name] = chance.choice((
            torch.zeros(3), torch.zeros(1).expand(2**40), content["model"][name].double(),
            content["model"][name] + float("nan"), torch.zeros(0), *VALUES))
    new = io.BytesIO()
    torch.save(content, new)
    return new.getvalue()


# --- readers and their files ---------------------------------------------------------------------


def idx_seeds(folder: Path) -> list[bytes]:
    arrays = np.arange(18, dtype=np.uint8).reshape(2, 3, 3), np.arange(2, dtype=np.uint8)
    files = [b"\0\0\x08" + struct.pack(f">B{a.ndim}I", a.ndim, *a.shape) + a.tobytes()
             for a in arrays]
    return files + [gzip.compress(file) for file in files]


def read_idx(path: Path, data: bytes) -> None:
    mnist.parse_idx(mnist._decompressed("file", data), "file")


def json_seeds(folder: Path) -> list[bytes]:
    return [json.dumps(make_config(model, "multi-dsprites", preset).to_dict()).encode()
            for model in MODELS for preset in ("fast", "paper")]


def read_settings(path: Path, data: bytes) -> None:
    try:
        values = parse_json(data)
    except ValueError:
        path.write_bytes(data)
        read_json(path)
        raise AssertionError("read_json reads what parse_json refuses") from None
    config = RunConfig.from_dict(values)
    json.dumps(config.to_dict())


def scenes_seeds(folder: Path) -> list[bytes]:
    one: dict = {"x": 1.5, "y": 20, "box": [1, 2, 3, 4], "kind": 2, "what": [0.5, -1]}
    two = {"x": 3, "y": 4, "kind": 0, "scale_x": 0.5, "angle": -1.0}
    scenes: list[dict] = [{"count": 2, "objects": [one, two]}, {"count": 0, "objects": []}]
    return [json.dumps(content).encode() for content in (scenes, scenes[::-1])]


def read_scenes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    content = read_json(path, kind=list)
    Scene.from_json(content, appearance=2, classes=3, pose=[1.0, 1.0, 0.0, 0.0, 0.0]).to_json()


def npz_seeds(folder: Path) -> list[bytes]:
    images = np.zeros((2, 4, 5, 1), np.uint8)
    images[0, 1, 1:3] = 255
    nan = [np.nan] * 4
    truth = {
        "counts": np.array([1, 0]), "categories": np.array([[2, -1], [-1, -1]]),
        "boxes": np.array([[[2, 1.5, 2, 1], nan], [nan, nan]]),
        "segmentation": images[..., 0] // 255,
    }
    files = []
    for arrays in ({"images": images} | truth, {"images": images}, {"x": images[..., 0]}):
        file = io.BytesIO()
        np.savez(file, **arrays)
        files.append(file.getvalue())
    return files


def read_npz(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    load_npz(path).batch(slice(0, 1))


def labels_seeds(folder: Path) -> list[bytes]:
    files = []
    for rows in ([[3], [], [1, 2]], [[7]] * 3, [[4, 5]] * 3):
        file = io.BytesIO()
        y = np.array(rows, object)
        np.savez(file, x=np.zeros((3, 4, 5), np.uint8), y=y)
        files.append(file.getvalue())
    return files


def read_labels(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    load_pyro_mnist(path, trust=True)


def png_seeds(folder: Path) -> list[bytes]:
    grey = Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5) * 12)
    files = []
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        file = io.BytesIO()
        grey.convert(mode).save(file, "PNG")
        files.append(file.getvalue())
    return files


def read_png(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    load_pngs([path], 3)


def checkpoint_seeds(folder: Path) -> list[bytes]:
    """Runs of two steps with the smallest networks."""
    data = folder / "data.npz"
    np.savez(data, images=np.random.default_rng(0).integers(0, 2, (8, 8, 8, 1), np.uint8) * 255)
    files = []
    for model, settings in (
        ("conv-vae", "grid_width=2 grid_latent=1 grid_stages=1 networks=auxiliary"),
        ("lavae", "latent=2 sprite=3 crop=5 location_width=2 location_blocks=1 appearance_width=1"
                  " appearance_hidden=2 sprite_hidden=2 max_objects=2 appearance_prior=flow:1"),
        ("air", "latent=2 window=8 decoder_hidden=2 encoder_hidden=2 hidden=2 glimpse=8"
                " glimpse_width=1"),
    ):
        config = make_config(model, str(data), settings=[*settings.split(), "batch_size=2",
                                                         "eval_images=1", "log_every=1"], steps=2)
        train(config, folder / model, device="cpu", progress=False)
        files.append((folder / model / checkpoint.FILE).read_bytes())
    return files


def read_checkpoint(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    checkpoint.load(path)


TARGETS = {
    "idx": Target(idx_seeds, read_idx, in_gzip, 0.5),
    "json": Target(json_seeds, read_settings, in_json, 0.2),
    "scenes": Target(scenes_seeds, read_scenes, in_json, 0.1),
    "npz": Target(npz_seeds, read_npz, in_zip, 0.08),
    "labels": Target(labels_seeds, read_labels, in_zip, 0.03),
    "png": Target(png_seeds, read_png, in_png, 0.08),
    "checkpoint": Target(checkpoint_seeds, read_checkpoint, in_checkpoint, 0.01),
}


# --- the loop ------------------------------------------------------------------------------------


def feed(target: Target, path: Path, data: bytes) -> bool:
    """Whether an input was read. :raises AssertionError: if it is refused in more than a line."""
    signal.alarm(SECONDS)
    try:
        target.read(path, data)
        return True
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        return False
    finally:
        signal.alarm(0)


def fuzz(name: str, inputs: int, seed: int, folder: Path) -> str:
    """Feed so many inputs to a reader; what came of it, in a line."""
    target, path = TARGETS[name], folder / f"input.{name}"
    seeds = target.seeds(folder)
    assert all(feed(target, path, data) for data in seeds), f"a whole {name} file is refused"
    started, before, read = time.perf_counter(), peak(), 0
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use() + limits.PEAK * BOUND + SLACK, memory[1]))
    for number in range(inputs):
        chance = random.Random(seed * 10**9 + number)
        data = target.mutate(chance.choice(seeds), chance)
        if chance.random() < 0.3:
            try:
                data = target.mutate(data, chance)  # damage upon damage
            except Exception:  # what was damaged may be nothing to go by
                pass
        try:
            read += feed(target, path, data)
        except BaseException:
            failed = Path(f"fuzz-{name}-{number}.bin")
            failed.write_bytes(data)
            print(f"{name}: input {number} of seed {seed} fails, see {failed}", file=sys.stderr)
            raise
    resource.setrlimit(resource.RLIMIT_AS, memory)
    taken = peak() - before
    assert taken <= limits.PEAK * BOUND + SLACK, f"{name} took {taken / 2**20:.0f} MiB"
    return (f"{name}: {inputs:,} inputs, of which {read:,} were read, in"
            f" {time.perf_counter() - started:.0f} s; {taken / 2**20:.0f} MiB more than before")


def peak() -> int:
    """Bytes that the process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_use() -> int:
    """Bytes of address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# Modules whose branches libFuzzer is told of: all would be torch's, for minutes.
WATCHED = (
    "pyro_scenes.config", "pyro_scenes.checkpoint", "pyro_scenes.pickles", "pyro_scenes.tensors",
    "pyro_scenes.files", "pyro_scenes.data.mnist", "pyro_scenes.data.npz",
    "pyro_scenes.data.png", "pyro_scenes.data.pyro_mnist", "pyro_scenes.scene",
    "zipfile", "json.decoder",
    "PIL.PngImagePlugin", "PIL.ImageFile", "numpy.lib._format_impl",
)


def by_coverage(name: str, folder: Path, options: list[str]) -> None:
    """The same inputs, chosen by the code that they reach, until libFuzzer ends the process."""
    import atheris

    target, path, corpus = TARGETS[name], folder / f"input.{name}", folder / "corpus"
    corpus.mkdir()
    for i, data in enumerate(target.seeds(folder)):
        (corpus / str(i)).write_bytes(data)
        feed(target, path, data)  # what is imported late is there, to be watched
    for module in (*filter(None, map(sys.modules.get, WATCHED)), sys.modules[__name__]):
        for holder in (module, *(v for v in vars(module).values() if inspect.isclass(v))):
            for function in vars(holder).values():
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)  # in place

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            try:
                return target.mutate(data, chance)[:most]
            except Exception:  # of a file too damaged to be damaged in a way of its own
                pass
        return atheris.Mutate(data, most)

    atheris.Setup([sys.argv[0], *options, str(corpus)],
                  lambda data: void(feed(target, path, data)), custom_mutator=mutate)
    atheris.Fuzz()


def void(value: object) -> None:
    """libFuzzer wants nothing back."""


def hang(number: int, frame: object) -> None:
    raise Hang(f"an input takes more than {SECONDS} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=10_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="further options are libFuzzer's")
    known, options = parser.parse_known_args()
    names = known.targets or list(TARGETS)
    if not set(names) <= TARGETS.keys() or (options and not known.atheris):
        parser.error(f"the targets are {', '.join(TARGETS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    signal.signal(signal.SIGALRM, hang)
    os.environ[limits.VARIABLE] = str(BOUND / 2**30)
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        if known.atheris:
            by_coverage(names[0], Path(folder), options)
        whole = sum(TARGETS[name].part for name in names)
        for name in names:
            inputs = max(1, round(known.inputs * TARGETS[name].part / whole))
            place = Path(folder) / name
            place.mkdir()
            print(fuzz(name, inputs, known.seed, place), flush=True)


if __name__ == "__main__":
    main()
