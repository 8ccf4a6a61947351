"""The page of svi-report, in a browser too, and the log of svi-train --tensorboard."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from pyro_scenes import __version__, checkpoint, cli, page, plots, training
from pyro_scenes.checkpoint import Checkpoint
from pyro_scenes.config import make_config
from pyro_scenes.data import SceneData
from pyro_scenes.evaluate import evaluate, infer
from pyro_scenes.models import MODELS, SceneModel
from pyro_scenes.pictures import changed
from pyro_scenes.scene import Scene

ROOT = Path(__file__).parent.parent
# Networks that are built in no time. A model that is not listed has its fast preset's.
LAVAE = ("latent=3", "sprite=5", "crop=7", "location_width=8", "location_blocks=1",
         "appearance_width=8", "appearance_hidden=8", "sprite_hidden=8")
ATTEND = ("window=8", "decoder_hidden=4", "hidden=4", "glimpse=8", "glimpse_width=2")
TINY = {
    # Every local maximum counts as an object: there is always one.
    "lavae": (*LAVAE, "count_threshold=0"),
    "discrete-air": (*ATTEND, "attributes=1", "code=4"),
    "air": ATTEND,
}
HISTORY = {"loss": ([1, 2], [3.5, 2.5]), "held-out -ELBO": ([2], [2.75])}
VOID = {"meta", "link", "img"}
HEADINGS = ("h1", "h2", "h3")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Reports what has happened in the page when all of it is loaded. It stands before the page's own
# policy, which would not let it run.
PROBE = """<script>
const found = {errors: [], blocked: [], fetched: [], pictures: []};
addEventListener(
  "error", event => found.errors.push(event.message || event.target.outerHTML), true);
addEventListener("securitypolicyviolation", event => found.blocked.push(event.blockedURI));
addEventListener("load", () => {
  found.fetched = performance.getEntriesByType("resource").map(entry => entry.name)
    .filter(name => !name.startsWith("data:"));
  found.pictures = [...document.images].map(
    image => ({complete: image.complete, size: [image.naturalWidth, image.naturalHeight],
               said: [image.width, image.height], alt: image.alt}));
  found.title = document.title;
  found.width = [document.documentElement.scrollWidth, innerWidth];
  const written = document.createElement("script");
  written.type = "application/json";
  written.id = "found";
  written.textContent = JSON.stringify(found);
  document.body.append(written);
});
</script>"""


class Parsed(HTMLParser):
    """A page's headings, texts and pictures. Tags that are not closed in their order are errors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.headings: list[str] = []
        self.cells: list[list[str]] = []  # of tables, row by row
        self.texts: list[str] = []
        # The last heading and whether anything has come after it.
        self.empty: list[str] = []
        self.pending: str | None = None
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in HEADINGS:
            self.headings.append("")
        elif tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
        elif tag == "img":
            self.pending = None
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in HEADINGS:
            # A part may begin with the heading of its first part.
            if self.pending and tag != "h3":
                self.empty.append(self.pending)
            self.pending = self.headings[-1]
        elif tag in ("section", "main") and self.pending:
            self.empty.append(self.pending)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] == "style" or not data.strip():
            return
        self.texts.append(data)
        if self.open[-1] in HEADINGS:
            self.headings[-1] += data
        else:
            self.pending = None
            if self.open[-1] in ("td", "th"):
                self.cells[-1][-1] += data

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def run(command: str, *words: str) -> Result:
    commands = {"svi-report": cli.report, "svi-train": cli.train}
    return CliRunner().invoke(commands[command], words, prog_name=command)


def scenes(images: int, size: int = 32) -> dict[str, Any]:
    """White squares of 5 x 5 pixels on black, one or two an image, side by side."""
    counts = 1 + np.arange(images) % 2
    pixels = np.zeros((images, size, size, 1), np.uint8)
    for image, count in zip(pixels, counts):
        for left in (4, 16)[:count]:
            image[10:15, left:left + 5] = 255
    return {"images": pixels, "counts": counts}


def made(model: str = "lavae", data: str = "data.npz", path: Path = Path("run/checkpoint.pt"),
         history: dict | None = None, shape: tuple[int, int, int] = (1, 32, 32)) -> Checkpoint:
    """An untrained model as a run of two steps has it."""
    config = make_config(model, data, settings=TINY.get(model, ()), steps=2, known=False)
    torch.manual_seed(0)
    made = checkpoint.build(config, shape).eval()
    state = {"seconds": 90.0, "machine": "a machine", "history": history or {}, "optimizer": {},
             "modules": {}, "random": torch.get_rng_state(), "random_cuda": []}
    return Checkpoint(made, config, 2, path, state)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images in a picture: each takes its time to draw."""
    monkeypatch.setattr(page, "SHOWN", 3)
    monkeypatch.setattr(page, "SAMPLES", 2)
    monkeypatch.setattr(changed, "STEPS", 3)
    monkeypatch.setattr(changed, "DIMENSIONS", 2)


@pytest.fixture(scope="module")
def data() -> SceneData:
    truth = scenes(5)
    return SceneData.from_images("squares", truth.pop("images"), **truth)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a data set, a checkpoint and bad files."""
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", **scenes(60))
    np.savez("bare.npz", images=scenes(4)["images"])
    np.savez("odd.npz", **scenes(4, size=31))
    trained = made(history=HISTORY)
    Path("run").mkdir()
    checkpoint.save(trained.path, trained.config, trained.model, 2, trained.training)
    Path("text.pt").write_text("not a checkpoint")
    Path("kept.html").write_text("precious")
    Path("empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_page_of_what_applies_to_it(name: str, data: SceneData) -> None:
    trained = made(name)
    read = Parsed(page.build(trained, {"squares": data}, particles=2))
    assert not read.empty and read.headings[0] == "run"
    expected = ["run", "Held-out figures", "Scenes: squares"]
    if isinstance(trained.model, SceneModel):
        expected += ["Inferred scenes", "Counts", "Miscounted", "Worst reconstructions", "Samples"]
        expected += ["Templates"] * (name == "discrete-air") + ["Traversal", "Swap"]
    else:
        expected += ["Reconstructions", "Worst reconstructions", "Samples"]
    assert read.headings == expected
    assert all(picture["alt"] and picture["src"].startswith("data:image/png;base64,")
               for picture in read.of("img"))
    for link in read.of("a"):
        assert any(attributes.get("id") == link["href"][1:] for _, attributes in read.tags)
    assert not read.of("script")
    assert {"lavae", "discrete-air", "air", "conv-vae"} & {name} <= set(read.texts)


def test_a_page_says_what_was_measured(data: SceneData) -> None:
    trained = made(history=HISTORY)
    read = Parsed(page.build(trained, {"squares": data, "few": data[:1]}, particles=3, seed=5))
    figures = evaluate(
        trained.model, data, particles=3, seed=5, limit=math.inf, progress=False)
    row = next(row for row in read.cells if row[:2] == ["squares", "5"])
    assert row[2] == f"{figures['count_accuracy']:.2%}"
    assert row[3] == f"{figures['nll']:.2f} +- {figures['nll_stderr']:.2f} (bernoulli)"
    assert any("importance samples: 3." in text for text in read.texts)
    facts = {"Preset", "fast", "Seed", "0", "Steps", "2", "2 minutes", "a machine"}
    assert facts <= set(read.texts)
    command = next(text for text in read.texts if text.startswith("bin/svi-train"))
    assert command.startswith("bin/svi-train --model lavae --data data.npz --preset fast --set ")
    assert command.endswith(" --seed 0") and " --set latent=3 " in command

    counts = infer(trained.model, data, math.inf)[0].counts
    confusion = figures["count_confusion"]
    start = read.cells.index(["true \\ found", *map(str, confusion["inferred"])])
    table = [[str(true), *map(str, images)]
             for true, images in zip(confusion["true"], confusion["table"])]
    assert read.cells[start + 1:start + 3] == table
    alts = [picture["alt"] for picture in read.of("img")]
    assert data.counts is not None
    wrong = [f"true {true}, found {found}"
             for true, found in zip(data.counts.tolist(), counts.tolist()) if true != found]
    assert len(wrong) == 5 and any(alt.endswith("; ".join(wrong[:page.SHOWN])) for alt in alts)
    assert any("The first 3 of 5 images" in text for text in read.texts)

    x = data.batch()
    drawn = trained.model.render(trained.model.infer(x, math.inf))
    errors = sorted((drawn - x).square().sum((1, 2, 3)).tolist(), reverse=True)[:page.SHOWN]
    assert any(alt.endswith("; ".join(f"error {error:,.2f}" for error in errors)) for alt in alts)
    assert any("squared difference" in text for text in read.texts)


def test_a_page_without_likelihoods_does_not_explain_them() -> None:
    grey = SceneData.from_images("grey", np.full((2, 32, 32, 1), 100, np.uint8))
    read = Parsed(page.build(made(), {"grey": grey}, particles=2))
    assert ["grey", "2"] in [row[:2] for row in read.cells]
    assert not any("importance samples" in text for text in read.texts)


def test_curves_are_those_of_the_history(data: SceneData) -> None:
    with_history = Parsed(page.build(made(history=HISTORY), {"x": data[:2]}, particles=1))
    assert with_history.headings[1] == "Training"
    assert with_history.of("img")[0]["alt"].startswith("Curves of loss, held-out -ELBO")
    shipped = replace(made(), training=None)
    read = Parsed(page.build(shipped, {"x": data[:2]}, particles=1))
    assert "Training" not in read.headings and "Trained on" not in read.texts


def test_what_nothing_is_found_in_or_known_of_is_left_out(data: SceneData) -> None:
    trained = made("air")
    with torch.no_grad():
        trained.model.presence_head.bias.fill_(-20.0)
    read = Parsed(page.build(trained, {"x": replace(data[:4], counts=None)}, particles=1))
    assert not {"Counts", "Miscounted", "Traversal", "Swap"} & set(read.headings)
    none = replace(data[:4], counts=np.zeros(4, np.int64))
    read = Parsed(page.build(trained, {"x": none}, particles=1))
    assert "Counts" in read.headings and "Miscounted" not in read.headings
    assert "4 of 4 are right." in read.texts


def test_names_are_written_as_they_are(data: SceneData) -> None:
    hostile = "<script>alert('&amp;\"$\\frac')</script>"
    trained = made("lavae", f"{hostile}.npz", Path(f"<img src=x onerror=alert(1)>{'&'}.pt"),
                   {hostile: ([1, 2], [1.0, 2.0])})
    trained.training["machine"] = hostile
    text = page.build(trained, {hostile: replace(data[:3], name=hostile)}, particles=1)
    read = Parsed(text)
    assert not read.of("script") and not any("onerror" in tag for _, tag in read.tags)
    assert read.headings[0] == "<img src=x onerror=alert(1)>&"
    assert f"Scenes: {hostile}" in read.headings and f"{hostile}.npz" in read.texts
    assert all(picture["src"].startswith("data:") for picture in read.of("img"))
    assert [hostile] == [row[0] for row in read.cells if row[0] == hostile]


def test_the_command_writes_a_page(folder: Path) -> None:
    result = run("svi-report", "run", "--out", "new/page.html", "--particles", "2")
    assert (result.exit_code, result.stdout) == (0, "Page: new/page.html\n"), result.output
    read = Parsed(Path("new/page.html").read_text())
    assert read.headings[:2] == ["run", "Training"] and "Scenes: held out" in read.headings
    # Of a data set's 60 images the last 3 are held out.
    assert any(row[:2] == ["held out", "3"] for row in read.cells)

    options = ["--data", "bare.npz", "--images", "2", "--particles", "1"]
    result = run("svi-report", "run/checkpoint.pt", "--out", "kept.html", "--force", *options)
    assert result.exit_code == 0, result.output
    read = Parsed(Path("kept.html").read_text())
    assert "Scenes: bare.npz" in read.headings and "Counts" not in read.headings
    assert any(row[:2] == ["bare.npz", "2"] for row in read.cells)


def test_data_by_name_has_crowded_scenes_too_and_as_many_objects_as_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, SceneData]] = []
    monkeypatch.setattr(page, "build", lambda trained, sets, *rest: shown.append(sets) or "page")
    trained = made(data="multi-dsprites", shape=(3, 64, 64))
    checkpoint.save(Path("named.pt"), trained.config, trained.model, 2)
    for words in ("", "--objects 5", "--objects 2-4 --data multi-dsprites"):
        words = f"named.pt --out a.html --force --images 9 {words}"
        assert run("svi-report", *words.split()).exit_code == 0
    assert Path("a.html").read_text() == "page"
    assert [list(sets) for sets in shown] == [
        ["0-3 objects", "7 objects"], ["5 objects"], ["2-4 objects"]]
    counts = [data.counts.tolist() for sets in shown for data in sets.values()]
    assert [set(row) for row in counts[1:3]] == [{7}, {5}]
    assert set(counts[3]) <= {2, 3, 4} and [len(row) for row in counts] == [9] * 4


def test_a_shipped_checkpoint_has_a_page(folder: Path) -> None:
    words = ["--out", "a.html", "--images", "6", "--particles", "1"]
    result = run("svi-report", "air-multi-sprites", *words)
    assert result.exit_code == 0, result.output
    read = Parsed(Path("a.html").read_text())
    assert read.headings[0] == "air-multi-sprites" and "Training" not in read.headings
    assert not read.empty


@pytest.mark.parametrize("line, named", [
    ("nope --out new.html", "nope"),
    ("empty --out new.html", "empty"),
    ("text.pt --out new.html", "text.pt"),
    ("run", "--out"),
    ("run --out kept.html", "kept.html"),
    ("run --out empty --force", "empty"),
    ("run --out kept.html/new.html", "kept.html"),
    ("run --out new.html --data nope", "nope"),
    ("run --out new.html --data odd.npz", "multiples"),
    ("run --out new.html --data data.npz --objects 7", "data.npz"),
    ("run --out new.html --objects 7", "data.npz"),
    ("run --out new.html --objects few", "few"),
    ("run --out new.html --images 0", "--images"),
    ("run --out new.html --particles 0", "--particles"),
])
def test_bad_input_gives_one_line_and_leaves_everything(
    line: str, named: str, folder: Path
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = run("svi-report", *line.split())
    assert result.exit_code == 2, result.output
    error = result.stderr.splitlines()[3 if result.stderr.startswith("Usage") else 0:]
    assert len(error) == 1 and error[0].startswith("Error: ") and named in error[0], error
    assert not result.stdout
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_script_explains_itself() -> None:
    script = [sys.executable, "-B", str(ROOT / "bin" / "svi-report")]
    for option, said in (("--help", "Usage: svi-report"), ("--version", __version__)):
        done = subprocess.run([*script, option], capture_output=True, text=True, check=True)
        assert said in done.stdout and not done.stderr


def test_every_picture_loads_in_a_browser_and_nothing_is_fetched(
    data: SceneData, tmp_path: Path
) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("needs chromium")
    hostile = "</style><script>alert(1)</script><img src=http://localhost/x.png>"
    trained = made("discrete-air", hostile, history=HISTORY)
    text = page.build(trained, {hostile: data}, particles=1)
    (tmp_path / "page.html").write_text(text.replace("<head>", f"<head>{PROBE}", 1))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,800",
         "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    _, mark, after = done.stdout.partition('<script type="application/json" id="found">')
    assert mark, done.stdout[-1000:]
    found = json.loads(after.partition("</script>")[0])
    assert found["errors"] == found["blocked"] == found["fetched"] == []
    assert found["title"] == "run"
    # The page itself never scrolls sideways: wide pictures and tables do.
    assert found["width"][0] <= found["width"][1]
    # Curves, inferred, miscounted, worst, samples, templates, traversal, swap.
    assert len(found["pictures"]) == len(Parsed(text).of("img")) == 8
    for picture in found["pictures"]:
        assert picture["complete"] and min(picture["size"]) > 50 and picture["alt"], picture
        ratio = picture["size"][0] / picture["size"][1]
        assert picture["said"][0] / picture["said"][1] == pytest.approx(ratio, rel=0.05)


def test_pairs_stand_side_by_side_under_their_captions() -> None:
    images = torch.rand(5, 1, 16, 16)
    boxes = torch.tensor([[8.0, 8, 4, 4], [math.nan] * 4]).repeat(5, 1, 1)
    present = torch.tensor([True, False]).repeat(5, 1)
    scene = Scene(present, boxes[..., :2], boxes)
    captions = [f"number {i}" for i in range(5)]
    figure = plots.pairs_figure(images, 1 - images, captions, scene)
    written = [text.get_text() for text in figure.texts]
    assert [text for text in written if text] == captions
    assert len(figure.axes) == 10
    for i, axes in enumerate(figure.axes):
        shown = np.asarray(axes.images[0].get_array())[..., 0]
        expected = images[i // 2, 0] if i % 2 == 0 else 1 - images[i // 2, 0]
        np.testing.assert_allclose(shown, expected.numpy())
        assert len(axes.patches) == i % 2  # a box, in reconstructions alone
    left, right = (axes.get_position() for axes in figure.axes[:2])
    assert left.y0 == right.y0 and left.x1 < right.x0
    rows, columns, channels = plots.pixels(figure).shape
    assert (columns, rows) == figure.canvas.get_width_height() and channels == 3

    assert not plots.pairs_figure(images, images, captions).axes[1].patches
    for wrong in ((images, images[:2], captions), (images, images, captions[:2]),
                  (images[:4], images[:4], captions[:4], scene)):
        with pytest.raises(ValueError, match="differ"):
            plots.pairs_figure(*wrong)


TRAIN = ["--model", "lavae", "--data", "data.npz", "--device", "cpu", "--steps", "4",
         "--tensorboard"]
for setting in (*LAVAE, "batch_size=4", "eval_images=2", "log_every=1", "eval_every=2",
                "checkpoint_every=2"):
    TRAIN += ["--set", setting]


def test_a_log_needs_tensorboard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = run("svi-train", *TRAIN, "--out", "new")
    assert result.exit_code == 2
    (error,) = result.stderr.splitlines()
    assert error.startswith("Error: ") and "install pyro_scenes[tensorboard]" in error
    assert not Path("new").exists()


def test_the_log_is_the_history_and_goes_on_with_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    advance = training.Run.advance

    def killed_at(step: int) -> Callable[[training.Run], dict[str, float]]:
        def wrapped(self: training.Run) -> dict[str, float]:
            if self.step == step:
                raise RuntimeError("killed")
            return advance(self)
        return wrapped

    # Killed after step 3 was logged: the run goes on from the checkpoint of step 2.
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "advance", killed_at(3))
        assert isinstance(run("svi-train", *TRAIN, "--out", "new").exception, RuntimeError)
    assert checkpoint.load("new").step == 2
    result = run("svi-train", *TRAIN, "--out", "new", "--resume")
    assert result.exit_code == 0, result.output
    check_log(Path("new"), looks=[2, 4])

    # Logging changes nothing.
    plain = [word for word in TRAIN if word != "--tensorboard"]
    assert run("svi-train", *plain, "--out", "plain").exit_code == 0
    first, second = (checkpoint.load(name).model.state_dict() for name in ("new", "plain"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    # A run that replaces another begins a new log.
    words = [*TRAIN, "--out", "new", "--force", "--set", "log_every=3", "--set", "eval_every=3"]
    assert run("svi-train", *words).exit_code == 0
    check_log(Path("new"), looks=[3, 4])


def check_log(out: Path, looks: list[int]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0})
    log.Reload()
    history = json.loads((out / "history.json").read_text())
    assert set(log.Tags()["scalars"]) == set(history)
    for name, (steps, values) in history.items():
        events = log.Scalars(name)
        assert [event.step for event in events] == steps
        assert [event.value for event in events] == pytest.approx(values)
    pictures = log.Images("inference")
    assert [event.step for event in pictures] == looks
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in pictures)
