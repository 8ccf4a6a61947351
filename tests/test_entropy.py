"""The entropy of generated data, against sums over all that a generator can make on a few pixels.

There a picture's probability is a sum over everything that the generator's process can do, with
pixels marked in place of boxes compared, and the entropy of pictures a sum over pictures.
"""

import json
import math
from collections import Counter, defaultdict
from itertools import product
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import chisquare

from pyro_scenes import cli, report
from pyro_scenes.data import DATASETS, SceneData
from pyro_scenes.data import entropy as entropies
from pyro_scenes.data import entropy_of, load, multi_dsprites, placing, scene_entropy
from pyro_scenes.data.entropy import Appearances, log_probability
from pyro_scenes.data.generator import DatasetSpec, Sprites, SpriteScenes
from pyro_scenes.errors import UserError
from pyro_scenes.evaluate import evaluate
from pyro_scenes.likelihoods import NormalImage
from pyro_scenes.models.lavae import LAVAE, LAVAEConfig

DOT, RIGHT_DOT = "... .#. ...", "... ..# ..."
WIDE, TALL, CORNER = "... ##. ...", ".#. .#. ...", ".#. .## ..."
BINARY = ("multi-dsprites", "multi-mnist-1k", "multi-mnist-10k")
GREY = sorted(name for name, spec in DATASETS.items() if not isinstance(spec.scenes, SpriteScenes))


def data_set(shape: tuple[int, int, int], *drawings: str, keep_cell: bool = False) -> DatasetSpec:
    """Scenes of sprites drawn as rows of dots and hashes."""
    masks = np.array([[[pixel == "#" for pixel in row] for row in drawing.split()]
                      for drawing in drawings])
    sprites = Sprites(masks, np.zeros(len(masks), int), keep_cell, {})
    return DatasetSpec("tiny", shape, ("sprite",), SpriteScenes(lambda mnist: sprites, shape))


# Sprites, shape, objects and draws of a place. They have sprites twice, scenes that look alike with
# equal counts and with others, dead ends, and scenes that start again for want of luck.
TINY = {
    "two dots look like a wide sprite": (data_set((3, 4, 1), DOT, DOT, WIDE), (0, 2), 100),
    "a dot elsewhere in its cell": (
        data_set((4, 8, 1), DOT, RIGHT_DOT, RIGHT_DOT, CORNER, keep_cell=True), (0, 2), 100),
    "colours": (data_set((3, 3, 3), DOT, CORNER), (0, 2), 100),
    "three, with few draws": (data_set((3, 3, 1), DOT, TALL, WIDE), (2, 3), 2),
    "dead ends": (data_set((3, 7, 1), DOT, keep_cell=True), (2, 2), 3),
    "a range that leaves out what a picture may be": (
        data_set((2, 4, 1), DOT, WIDE), (2, 2), 100),
    "nothing": (data_set((3, 3, 1), DOT), (0, 0), 100),
}


@pytest.fixture(params=TINY)
def tiny(request, monkeypatch):
    spec, objects, tries = TINY[request.param]
    monkeypatch.setattr(placing, "TRIES", tries)
    return spec, objects


def scenes_of(spec: DatasetSpec, count: int) -> tuple[dict[bytes, float], float]:
    """What the process makes of `count` objects: probabilities of pictures, H x W of colours.

    And the probability that an attempt does not start again.
    """
    height, width, channels = spec.shape
    assert isinstance(spec.scenes, SpriteScenes)
    sprites = spec.scenes.pool(None)
    placed: list = []  # a sprite: for each of its places, the pixels of its ink and those it keeps
    for mask, (left, top, right, bottom) in zip(sprites.masks, sprites.room + 1):
        keeps = np.zeros((3, 3), bool)
        keeps[top:bottom + 1, left:right + 1] = True
        placed.append([])
        for row, column in product(range(-2, height), range(-2, width)):
            frames = np.zeros((2, height + 4, width + 4), bool)
            frames[:, row + 2:row + 5, column + 2:column + 5] = mask, keeps
            ink, room = frames[:, 2:-2, 2:-2]
            if room.sum() == keeps.sum():
                placed[-1].append((ink, room))
    pictures: dict[bytes, float] = defaultdict(float)
    colours = range(1, 2 ** channels)

    def add(canvas: np.ndarray, taken: np.ndarray, left: int, probability: float) -> None:
        if not left:
            pictures[canvas.tobytes()] += probability
            return
        for places in placed:
            clear = [(ink, room) for ink, room in places if not (room & taken).any()]
            share = len(clear) / len(places)
            # The chance to meet a clear place at the first draw, the second, and so on.
            found = sum(share * (1 - share) ** draw for draw in range(placing.TRIES))
            for (ink, room), colour in product(clear, colours):
                add(canvas + ink * np.uint8(colour), taken | room, left - 1,
                    probability * found / len(placed) / len(clear) / len(colours))

    empty = np.zeros((height, width), np.uint8)
    add(empty, empty > 0, count, 1.0)
    success = sum(pictures.values())
    return {picture: p / success for picture, p in pictures.items()}, success


def all_pictures(spec: DatasetSpec, objects: tuple[int, int]) -> dict[bytes, float]:
    counts = range(objects[0], objects[1] + 1)
    total: dict[bytes, float] = defaultdict(float)
    for count in counts:
        for picture, p in scenes_of(spec, count)[0].items():
            total[picture] += p / len(counts)
    assert sum(total.values()) == pytest.approx(1)
    return total


def as_data(spec: DatasetSpec, pictures: list[bytes]) -> SceneData:
    height, width, channels = spec.shape
    labels = np.frombuffer(b"".join(pictures), np.uint8).reshape(-1, height, width, 1)
    return SceneData.from_images("tiny", (labels >> np.arange(channels) & 1).astype(np.uint8) * 255)


def entropy(probabilities) -> float:
    return -sum(p * math.log(p) for p in probabilities)


def test_the_probability_of_every_picture(tiny):
    spec, objects = tiny
    truth = all_pictures(spec, objects)
    log_success = np.log([scenes_of(spec, count)[1] for count in range(objects[1] + 1)])
    known = Appearances(spec.scenes.pool(None), spec.shape[2])
    found = log_probability(as_data(spec, list(truth)), known, objects, log_success)
    assert np.exp(found) == pytest.approx(list(truth.values()), rel=1e-9)


def test_pictures_that_cannot_be_have_no_probability():
    spec = data_set((3, 4, 1), WIDE)
    pictures = [bytes(12), b"\1" + bytes(11), b"\1\1\1" + bytes(9), b"\1\1" + bytes(10)]
    assert isinstance(spec.scenes, SpriteScenes)
    known = Appearances(spec.scenes.pool(None), 1)
    found = log_probability(as_data(spec, pictures), known, (1, 1), np.zeros(2))
    assert found.tolist() == [-math.inf] * 3 + [-math.log(9)]


def test_the_generator_makes_pictures_with_their_probabilities(tiny):
    spec, objects = tiny
    truth = all_pictures(spec, objects)
    data = spec.generate(20_000, objects=objects, seed=3)
    bits = (data.images() > 0) << np.arange(spec.shape[2])
    seen = Counter(picture.astype(np.uint8).tobytes() for picture in bits.sum(-1))
    assert seen.keys() <= truth.keys()
    common = [picture for picture, p in truth.items() if p * len(data) >= 5]
    observed, expected = ([counts[picture] for picture in common] for counts in (seen, truth))
    expected = [p * len(data) for p in expected]
    rest = len(data) - sum(expected)
    if rest >= 5:
        observed, expected = [*observed, len(data) - sum(observed)], [*expected, rest]
    else:
        expected = [p * sum(observed) / sum(expected) for p in expected]
    if len(expected) > 1:
        assert chisquare(observed, expected).pvalue > 1e-3


def test_the_entropy_of_pictures(tiny):
    spec, objects = tiny
    found = scene_entropy(spec, objects, images=4000, seed=1)
    truth = entropy(all_pictures(spec, objects).values())
    assert found["stderr"] < 0.025
    assert abs(found["total"] - truth) <= 4 * found["stderr"] + 1e-9
    parts = [found[name] for name in ("count", "places", "appearances")]
    assert sum(parts) == pytest.approx(found["total"])
    assert found["count"] == pytest.approx(math.log(objects[1] - objects[0] + 1))


def test_the_standard_error_is_that_of_other_seeds(monkeypatch):
    spec, objects, tries = TINY["dead ends"]
    monkeypatch.setattr(placing, "TRIES", tries)
    found = [scene_entropy(spec, objects, images=200, seed=seed) for seed in range(40)]
    totals = [one["total"] for one in found]
    error = np.mean([one["stderr"] for one in found])
    assert 0.7 < np.std(totals) / error < 1.4
    truth = entropy(all_pictures(spec, objects).values())
    assert abs(np.mean(totals) - truth) < 4 * error / math.sqrt(40)


def test_parts_of_a_single_object():
    found = scene_entropy(data_set((3, 4, 1), DOT, DOT, WIDE), (1, 1), images=5000)
    assert found["count"] == 0
    assert found["appearances"] == pytest.approx(entropy([2 / 3, 1 / 3]))
    assert found["places"] == pytest.approx(2 / 3 * math.log(12) + 1 / 3 * math.log(9), abs=0.02)


def test_an_order_is_not_told():
    """Two dots on 6 x 6 pixels may be at 36 * 35 / 2 pairs of places, all alike."""
    found = scene_entropy(data_set((6, 6, 1), DOT), (2, 2), images=10)
    assert found["appearances"] == 0
    assert found["places"] == pytest.approx(math.log(36 * 35 / 2))
    assert found["stderr"] == pytest.approx(0, abs=1e-9)


def test_one_dsprite_has_the_entropy_of_its_factors():
    sprites = multi_dsprites.sprites()
    masses: dict[tuple, float] = defaultdict(float)
    for mask in sprites.masks:
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        ink = mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        masses[ink.shape, ink.tobytes()] += 1 / len(sprites.masks)
    # A square looks the same after a quarter of a turn, an ellipse after half of one.
    assert len(masses) <= 6 * (10 + 20 + 40)
    places = sum(m * math.log((65 - height) * (65 - width))
                 for ((height, width), _), m in masses.items())
    found = scene_entropy(DATASETS["multi-dsprites"], (1, 1), images=2000)
    assert found["appearances"] == pytest.approx(entropy(masses.values()) + math.log(7))
    assert abs(found["places"] - places) < 4 * found["stderr"] < 0.1


def test_a_seed_gives_the_same_figure_and_others_agree():
    spec = DATASETS["multi-dsprites"]
    one, same, other = (scene_entropy(spec, images=800, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    assert abs(one["total"] - other["total"]) < 4 * math.hypot(one["stderr"], other["stderr"])
    assert one["count"] == pytest.approx(math.log(4))


@pytest.mark.parametrize("name", BINARY)
def test_crowded_scenes(name, made_up_mnist):
    found = scene_entropy(DATASETS[name], (7, 7), images=60, mnist=made_up_mnist)
    few = scene_entropy(DATASETS[name], (1, 1), images=60, mnist=made_up_mnist)
    assert found["count"] == 0 and found["stderr"] < 0.5
    assert found["appearances"] == pytest.approx(7 * few["appearances"])
    # Seven objects take each other's places, and do not tell their order.
    assert found["places"] < 7 * few["places"] - math.log(math.factorial(7))


@pytest.mark.parametrize("change,message", [
    ({"objects": (2, 1)}, "2-1"),
    ({"objects": (0, 3)}, "3 objects do not fit"),
    ({"seed": -1}, "seed -1"),
])
def test_impossible_requests_end_in_one_line(change, message):
    spec = data_set((3, 8, 1), DOT, keep_cell=True)
    with pytest.raises(UserError, match=message) as error:
        scene_entropy(spec, images=10, **{"objects": (0, 2)} | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", GREY)
def test_grey_scenes_have_none(name):
    with pytest.raises(UserError, match=f"{name} has no entropy"):
        scene_entropy(DATASETS[name])


# --- beside likelihoods ------------------------------------------------------------------------


def test_data_know_their_entropy():
    data = load("multi-dsprites", images=3, objects=(1, 1))
    found = entropy_of(data[:2])
    assert found == scene_entropy(DATASETS["multi-dsprites"], (1, 1), images=1000)
    found["total"] = 0.0
    assert entropy_of(data)["total"] > 0
    assert entropy_of(load("multi-sprites", images=3)) is None
    assert entropy_of(SceneData.from_images("multi-dsprites", data.images())) is None
    assert entropy_of(data_set((3, 3, 1), DOT).generate(2)) is None


@pytest.fixture(scope="module")
def model() -> LAVAE:
    config = LAVAEConfig(latent=2, sprite=5, crop=7, location_width=4, location_blocks=1,
                         appearance_width=4, appearance_hidden=4, sprite_hidden=(4,))
    return LAVAE(config, (3, 64, 64)).eval()


def test_it_stands_beside_the_likelihood(model):
    data = load("multi-dsprites", images=4)
    arguments: dict[str, Any] = {"particles": 1, "limit": math.inf, "progress": False}
    found = evaluate(model, data, **arguments)
    assert found["entropy"] == entropy_of(data)
    table = report.table({"dots": found})
    assert "entropy (nats)" in table and f"{found['entropy']['total']:.2f} +- 0.0" in table
    parts = [line for line in report.likelihood(found).splitlines() if "appearances" in line]
    assert len(parts) == 1 and f"= {found['entropy']['total']:.2f} +- 0.0" in parts[0]

    own = evaluate(model, SceneData.from_images("my.npz", data.images()), **arguments)
    assert own["nll"] is not None and own["entropy"] is None
    assert "entropy" not in report.table({"mine": own}) + report.likelihood(own)
    assert evaluate(model, data, **arguments | {"particles": 0})["entropy"] is None


def test_densities_have_no_such_limit(model, monkeypatch):
    monkeypatch.setattr(model, "likelihood", NormalImage())
    found = evaluate(model, load("multi-dsprites", images=2), particles=1, limit=math.inf)
    assert found["nll"] is not None and found["entropy"] is None


# --- the command -------------------------------------------------------------------------------


def run(line: str):
    return CliRunner().invoke(cli.make_scenes, line.split(), prog_name="make-scenes")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.json").write_text("precious")
    return tmp_path


def test_the_command_prints_and_writes_it(folder):
    line = "multi-dsprites --entropy --images 80 --objects 1-2 --seed 4"
    result = run(f"{line} --json new/entropy.json")
    assert result.exit_code == 0, result.output
    found = scene_entropy(DATASETS["multi-dsprites"], (1, 2), images=80, seed=4)
    headings, row = result.stdout.splitlines()
    assert "100%" in result.stderr and "80/80" in result.stderr
    assert headings.split() == ["count", "places", "appearances", "entropy", "(nats)"]
    assert row.split() == [
        "multi-dsprites,", "1", "to", "2", "objects",
        *(f"{found[name]:.2f}" for name in ("count", "places", "appearances", "total")),
        "+-", f"{found['stderr']:.2f}"]
    asked = {"data": "multi-dsprites", "objects": [1, 2], "images": 80, "seed": 4}
    assert json.loads((folder / "new/entropy.json").read_text()) == asked | found
    assert sorted(path.name for path in folder.iterdir()) == ["kept.json", "new"]
    assert run(f"{line} --json kept.json --force").exit_code == 0
    assert json.loads((folder / "kept.json").read_text()) == asked | found


@pytest.mark.parametrize("line,message", [
    ("multi-sprites --entropy", "multi-sprites has no entropy"),
    ("multi-mnist-1k --entropy --mnist nowhere", "nowhere"),
    ("nope --entropy", "nope"),
    ("multi-dsprites --entropy --images 0", "--images"),
    ("multi-dsprites --entropy --json kept.json", "kept.json"),
    ("multi-dsprites --entropy --out some.npz", "--out"),
    ("multi-dsprites --json some.json", "--entropy"),
    ("--entropy", "NAME"),
    ("--entropy --from-pyro x.npz --out y.npz", "--entropy"),
])
def test_bad_lines_end_in_one_clear_line(line, message, folder):
    result = run(line)
    assert result.exit_code == 2
    assert message in result.output.splitlines()[-1]
    assert [path.name for path in folder.iterdir()] == ["kept.json"]
    assert (folder / "kept.json").read_text() == "precious"


def test_an_entropy_that_cannot_be_measured_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many objects fit now and then, but exactly as many never do."""
    def none_fit(*arguments: object, **options: object) -> None:
        raise UserError("11 objects do not fit")

    monkeypatch.setattr(entropies, "scene_entropy", none_fit)
    data = load("multi-dsprites", images=2, objects=(0, 11))
    assert entropy_of(data) is None
