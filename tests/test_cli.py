"""Every command, through click's runner: what it writes, and one clear line for each bad input."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pyro_scenes import __version__, bench, cli, report, training
from pyro_scenes.bench import floors, growth
from pyro_scenes.checkpoint import load
from pyro_scenes.data import DATASETS, load_npz
from pyro_scenes.errors import UserError
from pyro_scenes.models import SceneModel
from pyro_scenes.models.conv_vae import ConvVAE, ConvVAEConfig
from pyro_scenes.pictures import with_objects

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "svi-train": cli.train, "svi-eval": cli.evaluate, "svi-infer": cli.infer,
    "svi-bench": cli.bench, "make-scenes": cli.make_scenes, "svi-ship": cli.ship,
    "svi-calibrate": cli.calibrate,
}
# A LAVAE that trains in no time, and learns nothing.
TINY = {
    "batch_size": "4", "eval_images": "2", "log_every": "1", "checkpoint_every": "1",
    "latent": "3", "sprite": "5", "crop": "7", "location_width": "8", "location_blocks": "1",
    "appearance_width": "8", "appearance_hidden": "8", "sprite_hidden": "8"
}
# On the CPU, where a training ends with the same bits each time.
TRAIN = "svi-train --device cpu --model lavae --data data.npz --steps 3 " + " ".join(
    f"--set {name}={value}" for name, value in TINY.items())
# The same of a model with categories.
TRAIN_KINDS = "svi-train --model discrete-air --data data.npz --steps 2 " + " ".join(
    f"--set {setting}" for setting in (
        "batch_size=4", "eval_images=2", "attributes=1", "window=8", "code=4", "hidden=4",
        "decoder_hidden=4", "glimpse=8", "glimpse_width=2"))

CONVERT = "make-scenes --trust-pickled-labels --from-pyro"


def run(line: str) -> Result:
    """Run a command line, words separated by spaces."""
    name, *words = line.split()
    return CliRunner().invoke(COMMANDS[name], words, prog_name=name)


def succeeded(line: str) -> Result:
    result = run(line)
    assert result.exit_code == 0, result.output
    return result


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(folder: Path) -> tuple[dict[Path, bytes], set[Path]]:
    """The files, and the folders too."""
    return files(folder), {path for path in folder.rglob("*") if path.is_dir()}


def scenes(images: int, size: int = 32, channels: int = 3) -> dict[str, Any]:
    """White squares of 5 x 5 pixels on black, one or two an image, side by side."""
    counts = 1 + np.arange(images) % 2
    pixels = np.zeros((images, size, size, channels), np.uint8)
    for image, count in zip(pixels, counts):
        for left in (4, 16)[:count]:
            image[10:15, left:left + 5] = 255
    return {"images": pixels, "counts": counts}


class Payload:
    """Unpickling this makes a file called "ran"."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a trained run, and bad files of every kind."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.savez("data.npz", **scenes(24))
        upside_down = scenes(24) | {"images": scenes(24)["images"][:, ::-1]}
        np.savez("test.npz", **upside_down)  # others than those of the training
        np.savez("bare.npz", images=scenes(24)["images"])
        succeeded(f"{TRAIN} --out run")
        # Every local maximum counts as an object: there is always one.
        succeeded(f"{TRAIN} --out crowded --set count_threshold=0")
        succeeded(f"{TRAIN_KINDS} --out kinds")

        np.savez("grey.npz", **scenes(4, channels=1))
        np.savez("two-channels.npz", **scenes(4, channels=2))
        np.savez("odd.npz", **scenes(4, size=31))
        np.savez("no-images.npz", counts=np.ones(4, np.int64))
        np.savez("floats.npz", images=scenes(4)["images"] / np.float32(255))
        np.savez("pickled.npz", images=np.array([Payload()], object))
        x = scenes(3, channels=1)["images"][..., 0]
        np.savez("pyro.npz", x=x, y=np.array([[3], [], [1, 2]], object))
        np.savez("hostile.npz", x=x, y=np.array([[3], [], Payload()], object))
        Path("text.npz").write_text("not a zip archive")
        whole = Path("data.npz").read_bytes()
        Path("cut.npz").write_bytes(whole[:len(whole) // 2])

        whole = Path("run/checkpoint.pt").read_bytes()
        Path("cut").mkdir()
        Path("cut/checkpoint.pt").write_bytes(whole[:len(whole) // 2])
        torch.save({"weights": torch.zeros(3)}, "foreign.pt")
        Path("pickled.pt").write_bytes(pickle.dumps(Payload()))
        Path("text.pt").write_text("not a checkpoint")

        Image.new("RGB", (32, 32)).save("fits.png")
        Image.new("RGB", (40, 32)).save("wide.png")
        Image.new("RGB", (33, 32)).save("odd.png")
        Path("broken.png").write_bytes(Path("fits.png").read_bytes()[:40])
        Path("empty").mkdir()
        for kept in ("kept.json", "kept.png", "kept.npz", "inference.png"):
            Path(kept).write_text("precious")
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `prepared`, as the working directory."""
    copy = tmp_path / "work"
    shutil.copytree(prepared, copy)
    monkeypatch.chdir(copy)
    return copy


BAD = [
    # command line, and what the message has to name
    ("svi-train --model nope --data data.npz", "nope"),
    ("svi-train --model lavae --data nope", "nope"),
    ("svi-train --model lavae --data nope.npz", "nope.npz"),
    ("svi-train --model lavae --data data.npz --preset nope", "nope"),
    ("svi-train --model lavae --data data.npz --set nope=1", "nope"),
    ("svi-train --model lavae --data data.npz --set batch_size", "batch_size"),
    ("svi-train --model lavae --data data.npz --set batch_size=many", "batch_size"),
    ("svi-train --model lavae --data data.npz --set batch_size=0", "batch_size"),
    ("svi-train --model lavae --data data.npz --set batch_size=1000", "batch_size"),
    ("svi-train --model lavae --data data.npz --set learning_rate=nan", "learning_rate"),
    (f"{TRAIN} --set sprite=20", "sprite"),
    ("svi-train --model lavae --data no-images.npz", "images"),
    ("svi-train --model lavae --data floats.npz", "float32"),
    ("svi-train --model lavae --data two-channels.npz", "2 channels"),
    (f"{TRAIN} --data odd.npz --set batch_size=2", "multiples"),
    ("svi-train --model lavae --data pickled.npz", "pickled"),
    ("svi-train --model lavae --data cut.npz", "cut.npz"),
    ("svi-train --model lavae --data text.npz", "text.npz"),
    ("svi-train --model lavae --data multi-mnist-1k --mnist empty", "empty"),
    (f"{TRAIN} --out new --set beta2=1", "beta2 must be at most 0.999999"),
    (f"{TRAIN} --out new --seed {2**64}", "--seed"),
    (f"{TRAIN} --out run", "--resume"),
    (f"{TRAIN} --out run --resume --seed 5", "seed"),
    (f"{TRAIN} --out run --resume --set learning_rate=0.5", "learning_rate"),
    (f"{TRAIN} --out run --resume --steps 9", "steps"),
    (f"{TRAIN} --out cut --resume", "cut"),
    (f"{TRAIN} --out new --from nope", "nope"),
    (f"{TRAIN} --out new --from cut", "cut"),
    (f"{TRAIN} --out new --from pickled.pt", "pickled.pt"),
    (f"{TRAIN} --out new --from air-multi-dsprites", "air-multi-dsprites is of air"),
    (f"{TRAIN} --out new --from lavae-multi-mnist-1k", "lavae-multi-mnist-1k do not fit"),
    (f"{TRAIN} --out run --resume --from run", "start"),
    (f"{TRAIN} --out kept.json", "kept.json"),
    (f"{TRAIN} --out .", "inference.png is there, and of no run"),
    (f"{TRAIN} --out run --resume --force", "--force"),
    ("svi-eval", "CHECKPOINT"),
    ("svi-eval run", "--data"),
    ("svi-eval nope --data data.npz", "nope"),
    ("svi-eval empty --data data.npz", "empty"),
    ("svi-eval cut --data data.npz", "cut"),
    ("svi-eval foreign.pt --data data.npz", "foreign.pt"),
    ("svi-eval pickled.pt --data data.npz", "pickled.pt"),
    ("svi-eval text.pt --data data.npz", "text.pt"),
    ("svi-eval run --data nope", "nope"),
    ("svi-eval run --data grey.npz", "3 channels"),
    ("svi-eval run --data odd.npz", "multiples"),
    ("svi-eval run --data no-images.npz", "images"),
    ("svi-eval run --data floats.npz", "float32"),
    ("svi-eval run --data pickled.npz", "pickled"),
    ("svi-eval run --data data.npz --objects 7", "data.npz"),
    ("svi-eval run --data data.npz --objects 3-0", "3-0"),
    ("svi-eval run --data data.npz --objects few", "few"),
    ("svi-eval run --data multi-dsprites --objects 5-", "5-"),
    ("svi-eval run --data data.npz --particles 0", "--particles"),
    ("svi-eval run --data data.npz --nll-images 0", "--nll-images"),
    ("svi-eval run --data data.npz --json kept.json", "kept.json"),
    ("svi-eval run --data data.npz --figures .", "inference.png"),
    ("svi-eval run --data data.npz --json kept.json/x.json", "kept.json"),
    ("svi-eval crowded --data data.npz --max-objects 0 --json new.json", "--max-objects"),
    ("svi-infer nope data.npz --out new.json", "nope"),
    ("svi-infer pickled.pt data.npz --out new.json", "pickled.pt"),
    ("svi-infer run nope.npz --out new.json", "nope.npz"),
    ("svi-infer run nope.png --out new.json", "nope.png"),
    ("svi-infer run empty --out new.json", "empty"),
    ("svi-infer run grey.npz --out new.json", "3 channels"),
    ("svi-infer run odd.npz --out new.json", "multiples"),
    ("svi-infer run fits.png wide.png --out new.json", "wide.png"),
    ("svi-infer run odd.png --out new.json", "multiples of 4"),
    ("svi-infer run fits.png broken.png --out new.json", "broken.png"),
    ("svi-infer run data.npz --out kept.json", "kept.json"),
    ("svi-infer run data.npz --figure kept.png", "kept.png"),
    ("svi-infer run data.npz --traverse kept.png", "kept.png"),
    ("svi-infer run data.npz --swap kept.png", "kept.png"),
    ("svi-infer run data.npz --steps kept.png", "kept.png"),
    ("svi-infer run data.npz --tables new.txt", "new.txt"),
    ("svi-infer run data.npz --tables new.png --steps new.png", "new.png"),
    ("svi-infer run data.npz --tables new.png --steps empty/../new.png", "new.png"),
    ("svi-infer run data.npz --out kept.json/new.json", "no folder that takes files"),
    ("svi-infer run data.npz --graph graphml --out kept.json --force", "kept.json exists"),
    ("svi-infer run data.npz --graph graphml --out empty --force", "empty exists"),
    ("svi-infer run --sample 2 --max-objects 3 --out new.npz", "--max-objects"),
    ("svi-infer run --sample 1 --out new.npz --prior count=uniform:300", "300 objects"),
    ("svi-infer run data.npz --templates new.png", "categories"),
    ("svi-infer run data.npz --out new.json --figure new.json", "new.json"),
    ("svi-infer run data.npz --out new.json --figure new.txt", "new.txt"),
    ("svi-infer run data.npz", "--out"),
    ("svi-infer run data.npz --seed 0 --out new.json", "--seed"),
    ("svi-infer run data.npz --data data.npz --out new.json", "--data"),
    ("svi-infer run --sample 2 --data data.npz --out new.npz", "--data"),
    ("svi-infer run data.npz --mnist empty --out new.json", "--mnist"),
    ("svi-infer run --out new.json", "IMAGES"),
    ("svi-infer run data.npz --sample 3 --out new.npz", "--sample"),
    ("svi-infer run --sample 3 --swap new.png", "--swap"),
    ("svi-infer run --render nope.json --figure new.png", "nope.json does not exist"),
    ("svi-infer run --render kept.json --figure new.png", "kept.json is not what it should be"),
    ("svi-infer run data.npz --render kept.json --out new.npz", "--render"),
    ("svi-infer run --render kept.json --swap new.png", "--swap"),
    ("svi-infer run --render kept.json --out kept.json --force", "--out would take the place"),
    ("svi-infer run --render kept.json --seed 1 --out new.npz", "--seed"),
    ("svi-infer run --render kept.json --graph json --out new.json", "--graph"),
    ("svi-infer run --sample 3 --templates new.png", "--templates"),
    ("svi-infer run --sample 3 --out kept.npz", "kept.npz"),
    ("svi-infer run --sample 3 --out new.npz --prior size=uniform:5-6", "size"),
    ("svi-infer run data.npz --out new.json --prior count=uniform:5-6", "--prior"),
    ("svi-infer crowded data.npz --max-objects 0 --out new.json", "--max-objects"),
    ("svi-bench --quick --json kept.json", "kept.json"),
    ("svi-bench --readme kept.png", "kept.png has no lines"),
    ("svi-bench --scaling --readme nope", "nope has no lines"),
    ("svi-eval --suite --readme kept.png", "kept.png has no lines"),
    ("svi-eval --list --json new.json", "--list"),
    ("svi-ship", "NAME"),
    ("svi-ship new --readme kept.png", "RUNS"),
    ("svi-ship new run --readme kept.png", "kept.png has no lines"),
    ("svi-ship new run --readme kept.png --out new", "--out"),
    ("svi-ship new run --out kept.png", "no folder that takes files"),
    ("svi-calibrate run --readme kept.png", "kept.png has no lines"),
    ("make-scenes nope", "nope"),
    ("make-scenes multi-dsprites --out kept.npz", "kept.npz"),
    ("make-scenes multi-dsprites --images 0", "--images"),
    (f"make-scenes multi-dsprites --images {10**17} --out new/new.npz", "ask for 100,000,000"),
    ("make-scenes multi-mnist-1k --mnist empty", "empty"),
    ("make-scenes", "NAME"),
    ("make-scenes multi-dsprites --from-pyro pyro.npz --out new.npz", "NAME"),
    ("make-scenes multi-dsprites --trust-pickled-labels --out new.npz", "--from-pyro"),
    ("make-scenes --from-pyro pyro.npz --out new.npz", "--trust-pickled-labels"),
    (f"{CONVERT} nope.npz --out new.npz", "nope.npz"),
    (f"{CONVERT} text.npz --out new.npz", "text.npz"),
    (f"{CONVERT} data.npz --out new.npz", "data.npz"),
    (f"{CONVERT} hostile.npz --out new.npz", "asks for"),
    (f"{CONVERT} hostile.npz --out kept.npz --force", "asks for"),
    (f"{CONVERT} pyro.npz --out kept.npz", "kept.npz"),
    (f"{CONVERT} pyro.npz", "--out"),
    (f"{CONVERT} pyro.npz --out new.npz --images 2", "--images"),
    (f"{CONVERT} pyro.npz --out new.npz --seed 0", "--seed"),
    ("svi-train --model lavae --data hostile.npz --steps 1 --set batch_size=999", "batch_size"),
]


@pytest.mark.parametrize("line, named", BAD, ids=[line.replace(TRAIN, "TRAIN") for line, _ in BAD])
def test_bad_input_gives_one_line_and_leaves_everything(
    line: str, named: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prepared)
    before = everything(prepared)
    result = run(line)
    assert result.exit_code == 2, result.output
    # click puts its usage above what it says of options and arguments.
    error = result.stderr.splitlines()[3 if result.stderr.startswith("Usage") else 0:]
    assert len(error) == 1 and error[0].startswith("Error: ") and named in error[0], error
    assert not result.stdout
    assert everything(prepared) == before


def test_training_writes_a_run_and_shows_held_out_figures(folder: Path) -> None:
    result = succeeded(TRAIN)
    out = folder / "runs" / "lavae-data-seed0"
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.pt", "config.json", "history.json", "inference.png"}
    assert json.loads((out / "config.json").read_text())["net"]["latent"] == 3
    row = next(line for line in result.stdout.splitlines() if line.startswith("held out"))
    # One image of 24 is held out; its count is known, categories and segmentation are not.
    assert row.split()[2] == "1" and "%" in row and row.endswith("(bernoulli)")
    assert "images  count right  -log p(x) <= (nats)\n" in result.stdout
    with Image.open(out / "inference.png") as picture:
        assert picture.width > 300


def test_training_on_data_by_name_also_shows_crowded_scenes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(DATASETS["multi-dsprites"], sizes={"train": 8, "test": 4})
    monkeypatch.setitem(DATASETS, "multi-dsprites", small)
    monkeypatch.setattr(report, "IMAGES", 2)
    result = succeeded(TRAIN.replace("data.npz", "multi-dsprites") + " --seed 2")
    assert (folder / "runs" / "lavae-multi-dsprites-seed2" / "inference.png").exists()
    rows = [line.split()[:3] for line in result.stdout.splitlines()]
    assert ["0-3", "objects", "2"] in rows and ["7", "objects", "2"] in rows


def test_objects_are_found_in_png_files_of_another_size(folder: Path) -> None:
    succeeded("svi-infer run wide.png wide.png --max-objects 99 --out new.json --figure new.png")
    found = json.loads((folder / "new.json").read_text())
    assert len(found) == 2 and found[0] == found[1]


def test_graphs_come_out_as_json_and_graphml(folder: Path) -> None:
    line = "svi-infer run data.npz --max-objects 99 --out"
    succeeded(f"{line} new.json")
    succeeded(f"{line} graphs.json --graph json")
    succeeded(f"{line} graphs --graph graphml")
    counts = [entry["count"] for entry in json.loads((folder / "new.json").read_text())]
    read = [nx.node_link_graph(g) for g in json.loads((folder / "graphs.json").read_text())]
    files = sorted((folder / "graphs").iterdir())
    assert [file.name for file in files[:2]] == ["00.graphml", "01.graphml"]
    assert [len(g) for g in read] == [len(nx.read_graphml(file)) for file in files] == counts
    assert "exists" in run(f"{line} graphs --graph graphml").stderr
    for options in ("--graph json --figure f.png", "--sample 2 --graph json --out a.json"):
        images = "" if "--sample" in options else "data.npz"
        assert run(f"svi-infer run {images} {options}").exit_code == 2


def test_graphs_of_a_folder_are_all_there_or_none(folder: Path, monkeypatch) -> None:
    made: list[str] = []

    def fail_at_the_third(self: Path, content: bytes) -> int:
        if len(made) == 2:
            raise OSError(28, "No space left on device")
        made.append(self.name)
        return len(content)

    monkeypatch.setattr(Path, "write_bytes", fail_at_the_third)
    result = run("svi-infer crowded data.npz --max-objects 99 --graph graphml --out graphs")
    assert result.exit_code == 2 and "No space left" in result.stderr, result.output
    assert len(made) == 2 and not list(folder.glob("*graphs*"))


def test_images_that_a_run_was_trained_on_are_not_measured(folder: Path) -> None:
    line = "--particles 2 --max-objects 99 --json new.json"
    Path("elsewhere").mkdir()
    shutil.copy("data.npz", "elsewhere/copied.npz")
    copied = "elsewhere/copied.npz"
    for data in ("data.npz", "elsewhere/../data.npz", copied):  # its last 5% is held out: 1 of 24
        succeeded(f"svi-eval run --data {data} {line} --force")
        figures = json.loads(Path("new.json").read_text())
        assert (figures["data"], figures["images"]) == (f"{Path(data).name}, held out", 1)
    shutil.copy("test.npz", "data.npz")  # other images of the name that the run's had
    succeeded(f"svi-eval run --data data.npz {line} --force")
    figures = json.loads(Path("new.json").read_text())
    assert (figures["data"], figures["images"]) == ("data.npz", 24)
    succeeded(f"svi-eval run --data test.npz {line} --force")
    figures = json.loads(Path("new.json").read_text())
    assert (figures["data"], figures["images"]) == ("test.npz", 24)


def test_priors_are_fitted_to_the_trainings_images_wherever_they_lie(folder: Path) -> None:
    sampled = "svi-infer crowded --sample 2 --prior count=fit --force --out drawn.npz"
    evaluated = "svi-eval crowded --prior count=fit --particles 2 --max-objects 99 --nll-images 1"
    Path("data.npz").rename("moved.npz")
    succeeded(f"{evaluated} --data moved.npz")
    for line in (sampled, f"{sampled} --data test.npz", f"{evaluated} --data test.npz"):
        result = run(line)
        assert result.exit_code == 2 and "'data.npz'" in result.stderr, result.output
        named = "test.npz has other images" if "test.npz" in line else "where it is now by --data"
        assert named in result.stderr
    assert not Path("drawn.npz").exists()
    succeeded(f"{sampled} --data moved.npz")
    Path("drawn.npz").unlink()
    shutil.copy("test.npz", "data.npz")  # other images of that name
    result = run(sampled)
    assert result.exit_code == 2 and "data.npz has other images" in result.stderr, result.output
    assert not Path("drawn.npz").exists()
    succeeded(f"{evaluated} --data moved.npz")
    Path("moved.npz").replace("data.npz")
    succeeded(sampled)


def test_a_run_goes_on_without_the_one_that_it_began_with(folder: Path) -> None:
    line = f"{TRAIN} --out parts --from begun"
    succeeded(f"{TRAIN} --out begun")
    succeeded(line)
    shutil.rmtree("begun")
    succeeded(f"{line} --resume")
    assert json.loads(Path("parts/config.json").read_text())["start"] == "begun"
    result = run(f"{line} --force")
    assert result.exit_code == 2 and "'begun'" in result.stderr, result.output


def test_a_run_goes_on_with_its_images_wherever_they_lie(folder: Path) -> None:
    succeeded(f"{TRAIN} --out parts")
    one = Path("parts/checkpoint.pt").read_bytes()
    Path("data.npz").rename("moved.npz")
    result = run(f"{TRAIN} --out parts --resume".replace("data.npz", "test.npz"))
    assert result.exit_code == 2 and "test.npz has other images" in result.stderr, result.output
    assert Path("parts/checkpoint.pt").read_bytes() == one
    succeeded(f"{TRAIN} --out parts --resume".replace("data.npz", "moved.npz"))
    assert json.loads(Path("parts/config.json").read_text())["data"] == "moved.npz"


def test_a_folder_of_pngs_is_trained_on_and_known_again(folder: Path) -> None:
    Path("pngs").mkdir()
    for i, image in enumerate(scenes(24)["images"]):
        Image.fromarray(image).save(f"pngs/{i:02}.png")
    succeeded(TRAIN.replace("data.npz", "pngs"))
    assert load("runs/lavae-pngs-seed0").model.image_shape == (1, 32, 32)  # no pixel has a colour
    Path("pngs").rename("moved")
    line = "--particles 2 --max-objects 99 --json new.json"
    succeeded(f"svi-eval runs/lavae-pngs-seed0 --data moved {line}")
    figures = json.loads(Path("new.json").read_text())
    assert (figures["data"], figures["images"]) == ("moved, held out", 1)


def test_grey_pngs_are_measured_on_a_model_of_colours(folder: Path) -> None:
    """As svi-infer takes them."""
    Path("grey").mkdir()
    for i in range(3):
        Image.new("L", (32, 32), 255 * (i % 2)).save(f"grey/{i}.png")
    assert load("run").model.image_shape == (3, 32, 32)
    succeeded("svi-eval run --data grey --particles 2 --max-objects 99 --json new.json")
    assert json.loads(Path("new.json").read_text())["images"] == 3


def test_a_run_that_saved_nothing_yet_is_begun_again(folder: Path) -> None:
    Path("run/checkpoint.pt").unlink()
    succeeded(f"{TRAIN} --out run")
    assert load(Path("run")).step == 3


def test_force_replaces_a_run(folder: Path) -> None:
    succeeded(f"{TRAIN} --out run --seed 4 --force")
    assert load("run").config.seed == 4


def test_ctrl_c_keeps_the_run_and_resume_ends_as_if_never_interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = training.Run.advance

    def interrupted(self: training.Run) -> dict[str, float]:
        figures = advance(self)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return figures

    line = f"{TRAIN} --out other --set checkpoint_every=100"
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", interrupted)
        result = run(line)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        "Interrupted. The same command with --resume goes on with the run in other.")
    assert load("other").step == 2
    succeeded(f"{line} --resume")
    whole, resumed = load("run").model.state_dict(), load("other").model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = training.Run.advance

    def diverging(self: training.Run) -> dict[str, float]:
        if self.step == 2:
            next(self.model.parameters()).data.fill_(float("nan"))
        return advance(self)

    monkeypatch.setattr(training.Run, "advance", diverging)
    result = run(f"{TRAIN} --out other")
    assert result.exit_code == 2
    # The progress bar comes first.
    assert [line.startswith("Error: ") for line in result.stderr.splitlines()][-1]
    assert "not finite at step 3" in result.stderr and "Traceback" not in result.output
    kept = load("other")
    assert kept.step == 2
    assert all(value.isfinite().all() for value in kept.model.state_dict().values())


def test_evaluation_writes_figures_and_pictures(folder: Path) -> None:
    line = "svi-eval run --data test.npz --images 6 --particles 3 --seed 5 --max-objects 99"
    result = succeeded(f"{line} --json out/figures.json")
    figures = json.loads((folder / "out" / "figures.json").read_text())
    assert figures["data"] == "test.npz" and figures["images"] == 6
    assert figures["particles"] == 3 and figures["seed"] == 5
    assert {"model", "nll", "nll_stderr", "count_accuracy", "count_confusion",
            "category_correspondence", "ari", "seconds"} <= figures.keys()
    assert f"{figures['nll']:.2f} +- {figures['nll_stderr']:.2f}" in result.stdout
    assert figures["ari"] is None and figures["category_correspondence"] is None

    assert figures["nll_images"] == 6
    result = succeeded(f"{line} --nll-images 2 --json new.json")
    figures = json.loads(Path("new.json").read_text())
    assert (figures["images"], figures["nll_images"]) == (6, 2)
    assert "(bernoulli; 2 images)" in result.stdout

    names = {"inference", "samples", "traversal", "swap", "steps", "tables"}
    for run_, suited in (("crowded", names), ("kinds", names | {"templates"})):
        succeeded(f"{line.replace('run', run_)} --figures {run_}-pictures")
        drawn = list((folder / f"{run_}-pictures").iterdir())
        assert {path.name for path in drawn} == {f"{name}.png" for name in suited}
        for path in drawn:
            with Image.open(path) as picture:
                assert min(picture.size) > 100


def test_an_evaluation_leaves_out_the_pictures_that_its_images_cannot_show(folder: Path) -> None:
    np.savez("black.npz", images=np.zeros((3, 32, 32, 3), np.uint8))
    line = "svi-eval none --data black.npz --particles 2 --figures pictures"
    succeeded(f"{TRAIN} --out none --set count_threshold=5")
    succeeded(line)
    drawn = {path.stem for path in Path("pictures").iterdir()}
    assert drawn == {"inference", "samples", "steps", "tables"}


def test_without_a_curve_the_rest_is_written(folder: Path) -> None:
    line = "svi-eval crowded --data test.npz --images 4 --particles 2 --max-objects 99"
    line += " --prior count=uniform:0 --json new.json --curve new.png --figures pictures"
    result = run(line)
    assert result.exit_code == 2 and "no --curve" in result.stderr, result.output
    assert json.loads(Path("new.json").read_text())["impossible"] == 4
    assert not Path("new.png").exists()
    assert Path("pictures/inference.png").exists()


def test_pictures_are_drawn_by_their_options(folder: Path) -> None:
    options = ("figure", "traverse", "swap", "steps", "tables", "templates")
    line = " ".join(f"--{name} {name}.png" for name in options)
    succeeded(f"svi-infer kinds data.npz {line}")
    assert all(Path(f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in options)


def test_evaluation_of_images_alone_leaves_the_rest_null(folder: Path) -> None:
    succeeded("svi-eval run --data bare.npz --particles 2 --max-objects 99 --json new.json")
    figures = json.loads(Path("new.json").read_text())
    assert figures["nll"] > 0
    assert figures["count_accuracy"] is None and figures["count_confusion"] is None


def test_the_shipped_checkpoints_are_listed() -> None:
    listed = succeeded("svi-eval --list").stdout.split()
    shipped = {path.stem for path in (ROOT / "pyro_scenes" / "checkpoints").glob("*.pt")}
    assert shipped <= set(listed)


def test_force_replaces_files_alone(folder: Path) -> None:
    os.mkfifo("pipe")  # as /dev/null
    with pytest.raises(UserError, match="pipe exists"):
        report.claim([Path("pipe")], [], force=True)


def test_force_overwrites_an_output(folder: Path) -> None:
    line = "svi-eval run --data test.npz --particles 2 --max-objects 99 --json kept.json"
    succeeded(f"{line} --force")
    assert json.loads(Path("kept.json").read_text())["images"] == 24


def test_objects_come_out_of_npz_and_png_alike(folder: Path) -> None:
    Path("pngs").mkdir()
    for i, image in enumerate(scenes(3)["images"]):
        Image.fromarray(image).save(f"pngs/{i}.png")
    np.savez("three.npz", **scenes(3))
    succeeded("svi-infer crowded three.npz --max-objects 99 --out npz.json --figure new.png")
    succeeded("svi-infer crowded pngs --max-objects 99 --out folder.json")
    Path("three.npz").rename("three")  # what it is, not what it is called
    succeeded("svi-infer crowded three --max-objects 99 --out plain.json")
    succeeded("svi-infer crowded pngs/0.png pngs/1.png pngs/2.png --max-objects 99 --out png.json")
    found = json.loads(Path("npz.json").read_text())
    assert found == json.loads(Path("png.json").read_text())
    assert found == json.loads(Path("folder.json").read_text())
    assert found == json.loads(Path("plain.json").read_text())
    assert len(found) == 3
    for one in found:
        assert one["count"] == len(one["objects"]) > 0
        for thing in one["objects"]:
            assert 0 <= thing["x"] <= 32 and 0 <= thing["y"] <= 32 and len(thing["box"]) == 4
            assert len(thing["what"]) == 3
    with Image.open("new.png") as picture:
        assert picture.format == "PNG"


def test_samples_follow_the_seed_and_the_prior(folder: Path) -> None:
    for name, options in {
        "a": "--seed 1", "b": "--seed 1", "c": "--seed 2",
        "none": "--prior count=uniform:0", "many": "--prior count=uniform:5-6",
    }.items():
        succeeded(f"svi-infer run --sample 5 --out {name}.npz --figure {name}.png {options}")
    made = {name: load_npz(f"{name}.npz").images() for name in ("a", "b", "c", "none", "many")}
    assert made["a"].shape == (5, 32, 32, 3)
    assert np.array_equal(made["a"], made["b"]) and not np.array_equal(made["a"], made["c"])
    assert not made["none"].any()
    assert made["many"].any(axis=(1, 2, 3)).all()


def test_scenes_of_a_file_are_drawn(folder: Path) -> None:
    """What was found is drawn as it is in Python; an object that is moved is drawn elsewhere."""
    succeeded("svi-infer crowded data.npz --max-objects 20 --out found.json")
    succeeded("svi-infer crowded --render found.json --out drawn.npz --figure drawn.png")
    drawn, model = load_npz("drawn.npz"), load("crowded").model
    assert isinstance(model, SceneModel) and Path("drawn.png").exists()
    scenes = model.infer(load_npz("data.npz").batch(), 20)
    assert drawn.counts is not None and drawn.counts.tolist() == scenes.counts.tolist()
    assert drawn.counts.any()
    again = model.render(scenes).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(drawn.images().astype(int) - again).max() <= 1
    content = json.loads(Path("found.json").read_text())
    moved = next(scene for scene in content if scene["count"])["objects"][0]
    for name, x in (("left", 14.5), ("right", 18.5)):
        Path("moved.json").write_text(json.dumps([{"objects": [moved | {"x": x}]}]))
        succeeded(f"svi-infer crowded --render moved.json --out {name}.npz")
    left, right = (load_npz(f"{name}.npz").images()[0] for name in ("left", "right"))
    assert not np.array_equal(left, right)
    assert np.array_equal(left[:, :-4], right[:, 4:])
    result = run("svi-infer crowded --render found.json --out drawn.npz")
    assert result.exit_code == 2 and "drawn.npz exists" in result.output


def test_pictures_of_one_model_without_objects_are_refused() -> None:
    with pytest.raises(UserError, match="ConvVAE"):
        with_objects(ConvVAE(ConvVAEConfig(grid_width=8), (1, 32, 32)))


def test_the_benchmark_prints_and_writes_its_ratios(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = bench.Size(1, 1, batch=2, paper_batch=1, generated=8, particles=2, evaluated=1)
    monkeypatch.setattr(bench, "QUICK", tiny)
    axes = growth.Axes(sides=(28,), objects=(2,), batches=(1,), particles=(2,), batch=1, images=1)
    monkeypatch.setattr(growth, "QUICK", axes)
    monkeypatch.setattr(floors, "TRAININGS", ("air-multi-sprites",))
    result = succeeded("svi-bench --quick --device cpu --json new.json --figure new.png")
    assert Path("new.png").read_bytes().startswith(b"\x89PNG")
    measured = json.loads(Path("new.json").read_text())
    assert 0 < measured["arithmetic"]["steps"]["air-multi-sprites"]["floor"]["median"] < 1
    measured = measured["ratios"]
    assert measured and all(name in result.stdout for name in measured)
    assert all(row["median"] > 0 for row in measured.values())


def test_made_scenes_follow_the_seed_and_the_number_of_objects(folder: Path) -> None:
    line = "make-scenes multi-dsprites --images 12"
    result = succeeded(f"{line} --objects 2-4 --seed 7 --out a.npz")
    assert "a.npz" in result.stdout and "12 images" in result.stdout
    succeeded(f"{line} --objects 2-4 --seed 7 --out b.npz")
    succeeded(f"{line} --objects 2-4 --seed 8 --out c.npz")
    succeeded(f"{line} --objects 7")
    a, b, c = (load_npz(f"{name}.npz") for name in "abc")
    assert np.array_equal(a.images(), b.images()) and not np.array_equal(a.images(), c.images())
    assert a.counts is not None and set(a.counts) <= {2, 3, 4} and len(a) == 12
    crowded = load_npz("multi-dsprites.npz")
    assert crowded.counts is not None and set(crowded.counts) == {7}


def test_labels_of_pyros_file_are_ignored_or_converted(folder: Path) -> None:
    assert load_npz("pyro.npz").counts is None
    result = succeeded(f"{CONVERT} pyro.npz --out new.npz")
    assert result.stdout == "new.npz: 3 images of 32 x 32 x 1, 0 to 2 objects each\n"
    new = load_npz("new.npz")
    assert new.counts is not None and new.counts.tolist() == [1, 0, 2]
    succeeded(f"{CONVERT} pyro.npz --out kept.npz --force")
    assert np.array_equal(load_npz("kept.npz").images(), load_npz("pyro.npz").images())


def test_an_interruption_elsewhere_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_scenes.data.make", interrupted)
    result = run("make-scenes multi-dsprites --out new.npz")
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def test_a_command_runs_beside_the_main_thread_too(folder: Path) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(run("make-scenes multi-dsprites "
                                                                "--images 2 --out two.npz")))
    thread.start()
    thread.join()
    assert results[0].exit_code == 0 and len(load_npz(Path("two.npz"))) == 2


def test_an_error_of_the_system_that_names_no_file_is_not_hidden(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise OSError("the system says no more")

    monkeypatch.setattr("pyro_scenes.data.make", broken)
    result = run("make-scenes multi-dsprites --images 2 --out two.npz")
    assert isinstance(result.exception, OSError)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_script_that_explains_itself(name: str) -> None:
    script = [sys.executable, "-B", str(ROOT / "bin" / name)]
    for option, said in (("--help", f"Usage: {name}"), ("--version", __version__)):
        done = subprocess.run([*script, option], capture_output=True, text=True, check=True)
        assert said in done.stdout and not done.stderr


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, pyro_scenes.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-B", "-c", code], cwd=ROOT, check=True)


def test_a_script_finds_the_environment_beside_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "bin", tmp_path / "bin")
    # -S: a Python without the packages that are needed.
    script = [sys.executable, "-S", str(tmp_path / "bin" / "svi-train"), "--help"]
    without = subprocess.run(script, capture_output=True, text=True)
    assert (without.returncode, without.stdout, without.stderr.count("\n")) == (2, "", 1)
    assert without.stderr.startswith("Error: ") and "make setup" in without.stderr

    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "run by .venv: $@"\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / ".ready").touch()
    within = subprocess.run(script, capture_output=True, text=True, check=True)
    assert within.stdout == f"run by .venv: {tmp_path / 'bin' / 'svi-train'} --help\n"
