"""Generated scenes: their statistics, their truth, and their bytes."""

import hashlib
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from pyro_scenes.data import DATASETS, load, make, multi_dsprites, split_held_out
from pyro_scenes.data.generator import CHUNK, SpriteScenes
from pyro_scenes.data.placing import Draws, place
from pyro_scenes.errors import UserError

NAMES = ["multi-dsprites", "multi-mnist-1k", "multi-mnist-10k"]
GREY = sorted(name for name, spec in DATASETS.items() if not isinstance(spec.scenes, SpriteScenes))
COLOURS = {1: (255, 0, 0), 2: (0, 255, 0), 3: (255, 255, 0), 4: (0, 0, 255), 5: (255, 0, 255),
           6: (0, 255, 255), 7: (255, 255, 255)}


@pytest.fixture
def mnist(made_up_mnist):
    return made_up_mnist


def ink_edges(box):
    """First and last column and row of a (cx, cy, w, h) box."""
    cx, cy, w, h = box
    return cx - w / 2, cx + w / 2 - 1, cy - h / 2, cy + h / 2 - 1


def uniform(observed):
    return chisquare(observed).pvalue > 1e-3


def test_factors_are_uniform_and_independent_of_the_slot():
    data = make("multi-dsprites", 20 * CHUNK, seed=3, segmentation=False)
    assert uniform(np.bincount(data.counts, minlength=4))
    present = data.categories >= 0
    assert np.array_equal(present.sum(1), data.counts)
    for slot in range(3):
        at = present[:, slot]
        assert uniform(np.bincount(data.categories[at, slot], minlength=3))
        assert uniform(np.bincount(data.attributes["colour"][at, slot], minlength=8)[1:])
        for name, values in (("scale", np.linspace(0.6, 1, 6)),
                             ("angle", np.arange(40) / 40 * 2 * np.pi)):
            drawn = data.attributes[name][at, slot]
            level = np.abs(drawn[:, None] - values).argmin(1)
            assert np.allclose(drawn, values[level])
            assert uniform(np.bincount(level, minlength=len(values)))


def test_a_single_digit_is_uniform_over_every_place_that_fits(mnist):
    data = make("multi-mnist-1k", 20 * CHUNK, objects=(1, 1), mnist=mnist, segmentation=False)
    for axis in "xy":
        place_of = data.attributes[axis][:, 0]
        assert place_of.min() == 7.5 and place_of.max() == 64 - 7.5
        assert uniform(np.bincount((place_of - 7.5).astype(int)))
    assert uniform(np.bincount(data.attributes["digit"][:, 0], minlength=1000))


def test_placing_has_the_distribution_of_its_definition():
    # 3 x 3 sprites on 7 x 3 pixels: centres 1..5. After a first at 3 there is no place left and
    # the scene starts again, so the first is 1, 2, 4 or 5, each with 1/4.
    expected = {(1, 4): 1 / 8, (1, 5): 1 / 8, (2, 5): 1 / 4, (4, 1): 1 / 4, (5, 1): 1 / 8,
                (5, 2): 1 / 8}
    room = np.array([[-1, -1, 1, 1]])
    n = 4000
    _, centres = place(Draws(1, (0,)), room, np.full(n, 2), 2, 3, 7)
    assert (centres[..., 1] == 1).all()
    pairs = [tuple(pair) for pair in centres[..., 0].tolist()]
    assert set(pairs) == set(expected)
    observed = [pairs.count(pair) for pair in expected]
    assert chisquare(observed, [n * p for p in expected.values()]).pvalue > 1e-3


@pytest.mark.parametrize("name,objects", [
    *((name, o) for name in NAMES for o in ((0, 3), (7, 7))),
    ("multi-dsprites", (9, 9)), ("multi-dsprites", (12, 12)),
])
def test_objects_do_not_overlap_and_boxes_are_tight(name, objects, mnist):
    data = make(name, 60, objects=objects, mnist=mnist, seed=5)
    assert data.counts.min() >= objects[0] and data.counts.max() == objects[1]
    images = data.images()
    assert np.array_equal(images.any(-1), data.segmentation > 0)
    for image in range(len(data)):
        count = data.counts[image]
        assert set(np.unique(data.segmentation[image])) - {0} == set(range(1, count + 1))
        assert np.isnan(data.boxes[image, count:]).all()
        assert (data.categories[image, count:] == -1).all()
        edges = [ink_edges(box) for box in data.boxes[image, :count]]
        for slot, (left, right, top, bottom) in enumerate(edges):
            rows, columns = np.nonzero(data.segmentation[image] == slot + 1)
            assert (left, right, top, bottom) == (
                columns.min(), columns.max(), rows.min(), rows.max())
            for other in edges[:slot]:
                assert (left > other[1] or right < other[0]
                        or top > other[3] or bottom < other[2])


@pytest.mark.parametrize("name", ["multi-mnist-1k", "multi-mnist-10k"])
def test_whole_cells_of_digits_keep_apart(name, mnist):
    data = make(name, 200, objects=(7, 7), mnist=mnist)
    x, y = data.attributes["x"], data.attributes["y"]
    for i in range(7):
        for j in range(i):
            apart = np.maximum(abs(x[:, i] - x[:, j]), abs(y[:, i] - y[:, j]))
            assert apart.min() >= 15


def inside(dx, dy, shape, scale, angle):
    """Whether a point, relative to the centre, is in a shape; by corners, not by axes."""
    if shape == "ellipse":
        # Sum of the distances to the two foci.
        focus = 9.5 * scale * 0.8
        fx, fy = focus * math.cos(angle), focus * math.sin(angle)
        return math.hypot(dx - fx, dy - fy) + math.hypot(dx + fx, dy + fy) <= 19 * scale
    degrees = {"square": (45, 135, 225, 315), "triangle": (-90, 30, 150)}[shape]
    corners = [(9.5 * scale * math.cos(angle + math.radians(d)),
                9.5 * scale * math.sin(angle + math.radians(d))) for d in degrees]
    return all((bx - ax) * (dy - ay) - (by - ay) * (dx - ax) >= 0
               for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]))


def test_dsprites_truth_renders_to_the_image():
    data = make("multi-dsprites", 25, objects=(2, 7), seed=11)
    images = data.images()
    for image in range(len(data)):
        drawn = np.zeros((64, 64, 3), np.uint8)
        for slot in range(data.counts[image]):
            x, y, scale, angle, colour = (
                float(data.attributes[a][image, slot])
                for a in ("x", "y", "scale", "angle", "colour"))
            shape = ("square", "ellipse", "triangle")[data.categories[image, slot]]
            for row in range(64):
                for column in range(64):
                    if abs(column - x) < 12 and abs(row - y) < 12 and inside(
                            column + 0.5 - x, row + 0.5 - y, shape, scale, angle):
                        drawn[row, column] = COLOURS[int(colour)]
        assert np.array_equal(drawn, images[image])
    assert data.class_names == ("square", "ellipse", "triangle")


def test_mnist_truth_renders_to_the_image(mnist):
    data = make("multi-mnist-10k", 40, objects=(3, 7), seed=2, mnist=mnist)
    pixels = np.fromfile(mnist / "train-images-idx3-ubyte", np.uint8, offset=16)
    digits = torch.from_numpy(pixels.reshape(-1, 1, 28, 28)).double() / 255
    images = data.images()
    for image in range(len(data)):
        drawn = np.zeros((64, 64), np.uint8)
        for slot in range(data.counts[image]):
            digit = int(data.attributes["digit"][image, slot])
            assert data.categories[image, slot] == digit % 10
            small = torch.nn.functional.interpolate(
                digits[digit:digit + 1], size=(15, 15), mode="bilinear", align_corners=False)
            left = int(data.attributes["x"][image, slot] - 7.5)
            top = int(data.attributes["y"][image, slot] - 7.5)
            drawn[top:top + 15, left:left + 15] += (small[0, 0].round() * 255).byte().numpy()
        assert np.array_equal(drawn, images[image, ..., 0])


# --- grey scenes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GREY)
def test_grey_truth_is_consistent(name, mnist):
    data = make(name, 300, mnist=mnist, seed=5)
    low, high = DATASETS[name].objects
    assert uniform(np.bincount(data.counts, minlength=high + 1))
    assert data.counts.min() == low and data.counts.max() == high and not data.binary
    present = np.arange(high) < data.counts[:, None]
    assert np.array_equal(data.categories >= 0, present)
    assert np.array_equal(~np.isnan(data.boxes).any(-1), present)
    images = data.images()[..., 0]
    assert not images[data.counts == 0].any() and images.max() == 255
    for image, slot in zip(*np.nonzero(present)):
        left, right, top, bottom = ink_edges(data.boxes[image, slot])
        rows, columns = np.nonzero(data.segmentation[image] == slot + 1)
        # Ink of two objects may meet within a pixel; the box is of the object alone.
        assert left <= columns.min() <= left + 1 and right - 1 <= columns.max() <= right
        assert top <= rows.min() <= top + 1 and bottom - 1 <= rows.max() <= bottom
        assert abs(data.attributes["x"][image, slot] - data.boxes[image, slot, 0]) < 7
        assert abs(data.attributes["y"][image, slot] - data.boxes[image, slot, 1]) < 7


@pytest.mark.parametrize("name, smallest, largest", [
    ("multi-sprites", 11, 20), ("multi-sprites-small", 5, 11),
])
def test_multi_sprites_factors_are_uniform_and_centres_apart(name, smallest, largest):
    data = make(name, 6 * CHUNK, objects=(1, 3), seed=3, segmentation=False)
    first = {name: values[:, 0] for name, values in data.attributes.items()}
    assert uniform(np.bincount(data.categories[:, 0], minlength=3))
    for values, low, high in (
        (first["size"], smallest, largest), (first["angle"], 0, 2 * np.pi),
        ((first["x"] - first["size"] / 2) / (64 - first["size"]), 0, 1),
        ((first["y"] - first["size"] / 2) / (64 - first["size"]), 0, 1),
    ):
        assert uniform(np.histogram(values, 20, (low, high))[0])
    x, y, size = (data.attributes[name] for name in ("x", "y", "size"))
    apart = [np.hypot(x[:, i] - x[:, j], y[:, i] - y[:, j]) / (size[:, i] + size[:, j]) * 2
             for i in range(3) for j in range(i)]
    assert np.nanmin(apart) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("name", ["multi-sprites", "multi-sprites-small"])
def test_multi_sprites_truth_renders_to_the_image(name):
    """By 12 x 12 points a pixel, the share inside the outline; the ramp is within 0.15 of it."""
    data = make(name, 12, objects=(3, 3), seed=11)
    images = data.images()[..., 0] / 255
    points = (np.arange(12) + 0.5) / 12
    worst, total = 0.0, []
    for image in range(len(data)):
        drawn = np.zeros((64, 64))
        for slot in range(3):
            x, y, size, angle = (
                float(data.attributes[a][image, slot]) for a in ("x", "y", "size", "angle"))
            shape = ("square", "triangle", "ellipse")[data.categories[image, slot]]
            for row in range(max(0, int(y - 11)), min(64, int(y + 12))):
                for column in range(max(0, int(x - 11)), min(64, int(x + 12))):
                    share = np.mean([
                        inside(column + u - x, row + v - y, shape, size / 19, angle)
                        for u in points for v in points])
                    drawn[row, column] = max(drawn[row, column], share)
        worst = max(worst, np.abs(drawn - images[image]).max())
        total.append(drawn.sum() / images[image].sum())
    assert worst < 0.15 and np.allclose(total, 1, atol=0.02)
    assert data.class_names == ("square", "triangle", "ellipse")


@pytest.mark.parametrize("name, prefix", [
    ("multi-mnist", "train"), ("multi-mnist-new-digits", "t10k"),
])
def test_grey_mnist_truth_renders_to_the_image(name, prefix, mnist):
    data = make(name, 30, objects=(2, 2), seed=2, mnist=mnist)
    pixels = np.fromfile(mnist / f"{prefix}-images-idx3-ubyte", np.uint8, offset=16)
    digits = torch.from_numpy(pixels.reshape(-1, 1, 28, 28)).double()
    labels = np.fromfile(mnist / f"{prefix}-labels-idx1-ubyte", np.uint8, offset=8)
    assert data.attributes["digit"].max() < len(digits)
    for image in range(len(data)):
        drawn = torch.zeros(50, 50, dtype=torch.float64)
        for slot in range(2):
            digit, x, y, shrink = (
                data.attributes[a][image, slot].item() for a in ("digit", "x", "y", "shrink"))
            assert data.categories[image, slot] == labels[digit]
            # grid_sample's corners: -1 and 1 are the outer edges of the tile.
            column, row = ((torch.arange(50) + 0.5 - centre) * shrink / 14 for centre in (x, y))
            grid = torch.stack(torch.meshgrid(column, row, indexing="xy"), -1)[None].double()
            drawn += torch.nn.functional.grid_sample(
                digits[digit:digit + 1], grid, "bilinear", "zeros", align_corners=False)[0, 0]
        assert np.abs(drawn.numpy() - data.images()[image, ..., 0]).max() < 1.6


def test_grey_digits_have_the_sizes_that_airs_users_know(mnist):
    data = make("multi-mnist", 4 * CHUNK, objects=(1, 1), mnist=mnist, segmentation=False)
    shrink = data.attributes["shrink"][:, 0]
    assert shrink.mean() == pytest.approx(1.3, abs=0.01)
    assert shrink.std() == pytest.approx(0.1, abs=0.005)
    for axis in "xy":
        half = 14 / shrink
        inside = (data.attributes[axis][:, 0] - half) / (50 - 2 * half)
        assert uniform(np.histogram(inside, 20, (0, 1))[0])


def test_new_digits_have_no_training_scenes(mnist):
    with pytest.raises(UserError, match="train"):
        load("multi-mnist-new-digits", split="train", mnist=mnist)


# --- what all have -----------------------------------------------------------------------------


def test_no_pixel_centre_is_near_an_outline():
    shape, scale, angle = np.meshgrid(np.arange(3), multi_dsprites.SCALES, multi_dsprites.ANGLES)
    distance = multi_dsprites.outline_distance(shape.ravel(), scale.ravel(), angle.ravel())
    assert len(distance) == 3 * 6 * 40
    assert np.abs(distance).min() > 1e-5


def test_sprites_fill_the_cell_and_no_more():
    masks = multi_dsprites.sprites().masks
    assert masks.shape[1:] == (19, 19)
    assert masks.any((0, 1)).all() and masks.any((0, 2)).all()


@pytest.mark.parametrize("name,digest", [
    ("multi-dsprites", "657deec7f7bbcf3fc902adafa45df6f30b35625f449b16c169f197c097d15dd2"),
    ("multi-mnist-1k", "00232335eaa455e735f108f97ff20a6982cbce793dac162223c3f35289c5df33"),
    ("multi-mnist-10k", "7e3d478cd3bc50763ee87b60ebcf2230d004dc8c286c9b6343bec8fbc7fd3c75"),
    ("multi-sprites", "2f13b160274cb3b0cf9cd6e45828a7f72c4aec7513fe337a95dfb4be4f86498a"),
    ("multi-sprites-small", "0c7631412c86df386590a7832d87874496caeefa2f891e515f2d2ecfe8cd126d"),
    ("multi-mnist", "4e0874c0054076d2849280deb94369162952143499158b323d4146754e0e2a81"),
    ("multi-mnist-new-digits",
     "b11e3b1cbca17576b6cf4aa9edc1feb995fea79afda9cf7765c43c562f3f8a42"),
])
def test_bytes_for_a_seed_never_change(name, digest, mnist):
    objects = (0, 7 if DATASETS[name].shape[0] == 64 else 3)
    data = make(name, 300, seed=7, objects=objects, stream="train", mnist=mnist)
    content = hashlib.sha256(data.images().tobytes() + data.segmentation.tobytes())
    content.update(data.boxes[data.categories >= 0].astype("<f4").tobytes())
    content.update(data.categories.astype("<i8").tobytes())
    assert content.hexdigest() == digest


def test_a_longer_data_set_begins_with_the_shorter():
    short, long = (make("multi-dsprites", n, seed=1) for n in (CHUNK - 30, CHUNK + 5))
    assert np.array_equal(long.images(slice(CHUNK - 30)), short.images())
    assert np.array_equal(long[:CHUNK - 30].segmentation, short.segmentation)
    assert np.array_equal(long[:CHUNK - 30].attributes["x"], short.attributes["x"], equal_nan=True)
    assert not np.array_equal(long.images(slice(CHUNK, None)), long.images(slice(5)))


def test_streams_seeds_and_ranges_share_nothing():
    base: dict[str, Any] = {"seed": 0, "stream": "test", "objects": (3, 3)}
    first = make("multi-dsprites", 50, **base).attributes["x"]
    for change in ({"seed": 1}, {"stream": "train"}, {"objects": (3, 4)}):
        other = make("multi-dsprites", 50, **{**base, **change}).attributes["x"][:, :3]
        assert (first == other).mean() < 0.1


def test_segmentation_only_when_asked_for():
    with_map, without = (make("multi-dsprites", 20, segmentation=s) for s in (True, False))
    assert without.segmentation is None
    assert np.array_equal(with_map.images(), without.images())
    assert load("multi-dsprites", split="train", images=2).segmentation is None
    assert load("multi-dsprites", split="test", images=2).segmentation.shape == (2, 64, 64)


def test_load_takes_the_split_and_its_size():
    test = load("multi-dsprites", split="test", segmentation=False)
    assert len(test) == DATASETS["multi-dsprites"].sizes["test"] == 10_000
    train = load("multi-dsprites", split="train", images=5)
    assert np.array_equal(train.images(), make("multi-dsprites", 5, stream="train").images())
    assert np.array_equal(test.images(slice(5)), make("multi-dsprites", 5).images())


def test_bits_bytes_and_batches_agree():
    data = make("multi-dsprites", 6, objects=(3, 3))
    assert data.binary and data.pixels.nbytes == 6 * 64 * 64 * 3 // 8
    images = data.images()
    assert images.dtype == np.uint8 and images.shape == (6, 64, 64, 3)
    batch = data.batch(np.array([4, 1]))
    assert batch.dtype == torch.float32 and batch.is_contiguous()
    assert np.array_equal(batch.numpy(), images[[4, 1]].transpose(0, 3, 1, 2) / 255)
    assert len(data[2]) == 1 and np.array_equal(data[2].images(), images[2:3])
    assert np.array_equal(data[1:3].attributes["colour"], data.attributes["colour"][1:3])
    assert data.batch().device.type == "cpu" and len(data.batch()) == 6


@pytest.mark.parametrize("n,held_out", [(2, 1), (100, 5), (10_240, 512), (220_000, 10_000)])
def test_held_out_is_the_last_twentieth(n, held_out):
    data = make("multi-dsprites", 1, segmentation=False)[np.zeros(n, np.int8)]
    data.counts[:] = np.arange(n)
    train, test = split_held_out(data)
    assert len(test) == held_out
    assert np.array_equal(np.concatenate([train.counts, test.counts]), np.arange(n))


def test_one_image_cannot_be_split():
    with pytest.raises(UserError, match="at least 2"):
        split_held_out(make("multi-dsprites", 1))


@pytest.mark.parametrize("change,message", [
    ({"objects": (30, 30)}, "30 objects do not fit"),
    ({"objects": (40, 40), "name": "multi-sprites"}, "40 objects do not fit"),
    ({"objects": (3, 2)}, "3-2"),
    ({"objects": (-1, 2)}, "fewest"),
    ({"objects": (0, 256)}, "0-255"),
    ({"images": 0}, "at least 1"),
    ({"seed": -1}, "seed -1"),
    ({"stream": "validation"}, "train, test"),
    ({"name": "multi-cats"}, "multi-dsprites"),
])
def test_impossible_requests_end_in_one_line(change, message):
    arguments = {"name": "multi-dsprites", "images": 3, **change}
    with pytest.raises(UserError, match=message) as error:
        make(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments,message", [
    ({"source": "nothing.npz"}, "no data set and no file"),
    ({"source": "multi-dsprites", "split": "dev"}, "train, test"),
    ({"source": "multi-dsprites", "images": 0}, "at least 1"),
])
def test_load_refuses(arguments, message):
    with pytest.raises(UserError, match=message):
        load(**arguments)


def test_no_objects_at_all():
    data = make("multi-dsprites", 3, objects=(0, 0))
    assert not data.images().any() and data.boxes.shape == (3, 0, 4)


def test_scenes_that_are_chosen_are_no_sample_of_what_made_them():
    data = make("multi-dsprites", 12)
    assert data[:5].origin == data[::2].origin == data.origin is not None
    assert data[data.counts == 3].origin is None and data[0].origin is None


def test_others_that_are_no_data_set_are_told_before_a_training(monkeypatch):
    spec = replace(DATASETS["multi-dsprites"], name="mine", others={"larger ones": "nope"})
    monkeypatch.setitem(DATASETS, "mine", spec)
    for ask in (lambda: make("mine", 1), lambda: load("mine", split="train", images=1)):
        with pytest.raises(UserError, match="models of mine are measured on 'nope' too"):
            ask()
