"""Figures are rendered, saved and read back: what was drawn is checked pixel by pixel."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import colors
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pyro_scenes import plots
from pyro_scenes.errors import UserError
from pyro_scenes.plots.scenes import colour as colour_of
from pyro_scenes.plots.scenes import colours_of
from pyro_scenes.scene import Scene

RED = (255, 0, 0)
FIRST, SECOND = (
    tuple(round(255 * c) for c in colors.to_rgb(colour)) for colour in plots.PALETTE[:2]
)


def pictures(number, channels=3, side=64, seed=0):
    """Random images of saturated colours, a different one in every pixel."""
    random = np.random.default_rng(seed)
    return random.integers(0, 2, (number, channels, side, side)).astype(np.float32)


def scene_of(*scenes, slots=12):
    """Scenes of the given boxes (cx, cy, w, h), every other slot empty."""
    present = torch.zeros(len(scenes), slots, dtype=torch.bool)
    boxes = torch.full((len(scenes), slots, 4), torch.nan)
    for b, objects in enumerate(scenes):
        present[b, :len(objects)] = True
        boxes[b, :len(objects)] = torch.tensor(objects, dtype=torch.float32).reshape(-1, 4)
    return Scene(present=present, where=boxes[..., :2].clone(), boxes=boxes)


def read(figure, folder):
    """The saved figure as (rows, columns, 3) uint8."""
    plots.save(figure, folder / "figure.png")
    with Image.open(folder / "figure.png") as image:
        return np.array(image.convert("RGB"))


def panel(page, axes):
    """What lies under some axes of a saved figure."""
    box = axes.get_window_extent()
    top, left = round(len(page) - box.y1), round(box.x0)
    return page[top:top + round(box.height), left:left + round(box.width)]


def centres(page, axes, side):
    """The colour in the middle of each image pixel, in the form of `pictures`: (C, H, W)."""
    shown = panel(page, axes)
    scale = len(shown) // side
    assert scale >= 2 and shown.shape == (scale * side, scale * side, 3)
    return np.moveaxis(shown[scale // 2::scale, scale // 2::scale], -1, 0) / 255


def assert_shows(page, axes, image):
    # The soft edge of the frame, of a fiftieth, falls on the outermost pixels.
    expected = np.broadcast_to(image, (3, *image.shape[1:]))
    np.testing.assert_allclose(centres(page, axes, image.shape[-1]), expected, atol=0.05)


def has(shown, colour):
    return bool((shown == colour).all(-1).any())


def test_inference_shows_images_locations_and_sprites(tmp_path):
    images, sprites = pictures(2), pictures(2 * 12, side=21, seed=1).reshape(2, 12, 3, 21, 21)
    reconstructions = np.zeros_like(images)
    reconstructions[1, 0] = 1
    scenes = scene_of([(20.5, 30.5, 10, 8), (40.5, 12.5, 6, 6), (63.9, 0.1, 5, 5)], [])
    figure = plots.inference_figure(images, reconstructions, scenes, sprites)
    page = read(figure, tmp_path)

    assert len(figure.axes) == 2 * 3 + 3
    first, second = figure.axes[:6], figure.axes[6:]
    for row, image in ((first, images[0]), (second, images[1])):
        assert_shows(page, row[0], image)
    assert not has(panel(page, first[1]), RED) and has(panel(page, second[1]), RED)
    assert [axes.texts[0].get_text() for axes in (first[1], second[1])] == ["3", "0"]
    assert has(panel(page, second[1])[:40, :40], (255, 255, 255))    # the count in the corner

    locations = np.zeros((3, 64, 64))
    locations[:, [30, 12, 0], [20, 40, 63]] = 1
    assert_shows(page, first[2], locations)
    assert not panel(page, second[2])[1:-1, 1:-1].any()
    for slot in range(3):
        inside = centres(page, first[3 + slot], 21)[:, 1:-1, 1:-1]
        np.testing.assert_array_equal(inside, sprites[0, slot, :, 1:-1, 1:-1])
    assert "none" in [text.get_text() for text in figure.texts]


def test_boxes_lie_where_the_scene_says(tmp_path):
    black = np.zeros((1, 3, 64, 64), np.float32)
    figure = plots.inference_figure(black, black, scene_of([(20, 30, 10, 8), (50, 50, 6, 12)]))
    shown = panel(read(figure, tmp_path), figure.axes[1]).astype(int)
    for (cx, cy, w, h), colour in (((20, 30, 10, 8), FIRST), ((50, 50, 6, 12), SECOND)):
        close = np.abs(shown - colour).sum(-1) < 30
        rows, columns = np.flatnonzero(close.any(1)), np.flatnonzero(close.any(0))
        edges = [columns[0], columns[-1] + 1, rows[0], rows[-1] + 1]
        # Three screen pixels to an image pixel; half of a line's width lies outside.
        expected = 3 * np.array([cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2])
        np.testing.assert_allclose(edges, expected, atol=2)
        assert not close[rows[0] + 4:rows[-1] - 3, columns[0] + 4:columns[-1] - 3].any()


def test_sprites_are_framed_in_the_colour_of_their_box(tmp_path):
    black, sprites = np.zeros((1, 1, 64, 64), np.float32), np.zeros((1, 12, 1, 17, 17), np.float32)
    figure = plots.inference_figure(
        black, black, scene_of([(20, 30, 10, 8), (50, 50, 6, 12)]), sprites
    )
    page = read(figure, tmp_path)
    reconstruction, one, two = (panel(page, figure.axes[i]) for i in (1, 3, 4))
    assert has(reconstruction, FIRST) and has(reconstruction, SECOND)
    assert has(one, FIRST) and not has(one, SECOND)
    assert has(two, SECOND) and not has(two, FIRST)


def test_boxes_and_sprites_have_the_colour_of_their_category(tmp_path):
    black, sprites = np.zeros((1, 1, 64, 64), np.float32), np.zeros((1, 12, 1, 17, 17), np.float32)
    scenes = scene_of([(20, 30, 10, 8), (50, 50, 6, 12), (40, 12, 8, 8)])
    kind = torch.full((1, 12), -1)
    kind[0, :3] = torch.tensor([1, 0, 1])
    figure = plots.inference_figure(black, black, replace(scenes, kind=kind), sprites)
    page = read(figure, tmp_path)
    colours = [colors.to_hex(patch.get_edgecolor()) for patch in figure.axes[1].patches]
    assert colours == [plots.PALETTE[i] for i in (1, 0, 1)]
    for axes, colour in zip(figure.axes[3:], (SECOND, FIRST, SECOND)):
        assert has(panel(page, axes), colour)


def test_a_category_has_one_colour_that_no_other_has():
    scenes = scene_of([(5, 5, 2, 2)] * 100, [(5, 5, 2, 2)], slots=100)
    kind = torch.full((2, 100), -1)
    kind[0], kind[1, 0] = torch.arange(100), 20
    (every, few) = colours_of(replace(scenes, kind=kind))
    assert every[:10] == list(plots.PALETTE) and len(set(every)) == 100
    assert few == [every[20]]                  # whatever else is there
    assert every == colours_of(scenes)[0]      # without categories, those of the objects in turn
    # The categories of a model of shapes in seven colours can be told apart.
    shown = np.array([colors.to_rgb(colour) for colour in every[:21]])
    apart = np.linalg.norm(shown[:, None] - shown, axis=-1)
    assert apart[~np.eye(21, dtype=bool)].min() > 0.1


def test_an_object_without_a_box_is_counted_but_not_outlined(tmp_path):
    black = np.zeros((1, 3, 64, 64), np.float32)
    scenes = scene_of([(20, 30, 10, 8), (50, 50, 6, 12)])
    scenes.boxes[0, 0] = torch.nan
    figure = plots.inference_figure(black, black, scenes)
    axes = figure.axes[1]
    assert len(axes.patches) == 1 and axes.texts[0].get_text() == "2"
    shown = panel(read(figure, tmp_path), axes)
    assert has(shown, SECOND) and not has(shown, FIRST)


def test_absent_objects_are_not_drawn_whatever_they_hold(tmp_path):
    black = np.zeros((1, 3, 64, 64), np.float32)
    scenes = scene_of([(20, 30, 10, 8)])
    scenes.present[:] = False
    figure = plots.inference_figure(black, black, scenes, np.ones((1, 12, 3, 9, 9), np.float32))
    assert len(figure.axes) == 3
    page = read(figure, tmp_path)
    assert not has(page, FIRST) and not panel(page, figure.axes[2])[1:-1, 1:-1].any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("counts", [(0,), (3, 0, 1, 2, 3), (10, 7), (12,) * 2 + (1,) * 10])
def test_inference_of_any_number_of_images_and_objects_fits_the_page(channels, counts, tmp_path):
    scenes = scene_of(*([(10 + i, 20, 8, 8) for i in range(n)] for n in counts))
    images = torch.zeros(len(counts), channels, 64, 64)
    sprites = torch.ones(len(counts), 12, channels, 17, 17)
    figure = plots.inference_figure(images, images, scenes, sprites)
    page = read(figure, tmp_path)
    assert len(figure.axes) == 3 * len(counts) + sum(counts)
    taken = np.zeros(page.shape[:2], int)
    for axes in figure.axes:
        panel(taken, axes)[...] += 1
        assert panel(taken, axes).size == round(np.prod(axes.get_window_extent().size))
    assert taken.max() == 1                            # no two panels overlap
    for text in figure.texts:                          # nor is one under a text, or outside
        box = text.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= page.shape[1] and 0 <= box.y0 <= box.y1 <= len(page)
        assert not taken[round(len(page) - box.y1):round(len(page) - box.y0),
                         round(box.x0):round(box.x1)].any()


def test_inference_without_objects_or_slots():
    images = pictures(2)
    assert len(plots.inference_figure(images, images).axes) == 4
    empty = Scene(torch.zeros(2, 0, dtype=torch.bool), torch.zeros(2, 0, 2), torch.zeros(2, 0, 4))
    figure = plots.inference_figure(images, images, empty, np.zeros((2, 0, 3, 9, 9), np.float32))
    assert len(figure.axes) == 6


def test_locations_stay_visible_on_large_images(tmp_path):
    black = np.zeros((1, 1, 500, 700), np.float32)
    figure = plots.inference_figure(black, black, scene_of([(630.5, 450.5, 9, 9)]))
    shown = panel(read(figure, tmp_path), figure.axes[2])[..., 0]
    assert shown.max() > 200
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    np.testing.assert_allclose((row, column), 0.9 * np.array(shown.shape), atol=2)


def test_samples_fill_rows_in_order(tmp_path):
    images = pictures(5, channels=1)
    figure = plots.samples_figure(torch.tensor(images), columns=3, title="Five")
    page = read(figure, tmp_path)
    assert len(figure.axes) == 5
    for axes, image in zip(figure.axes, images):
        assert_shows(page, axes, image)
    places = [axes.get_position() for axes in figure.axes]
    assert places[0].x0 < places[1].x0 < places[2].x0
    assert places[3].x0 == places[0].x0 and places[3].y1 < places[0].y0
    assert "Five" in [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("number", [1, 2, 12, 25])
def test_samples_choose_columns(number):
    figure = plots.samples_figure(pictures(number, side=8))
    lefts, tops = (len({round(getattr(axes.get_position(), edge), 6) for axes in figure.axes})
                   for edge in ("x0", "y1"))
    assert (lefts - 1) * tops < len(figure.axes) == number <= lefts * tops
    assert tops <= lefts <= 2 * tops + 1


def test_a_long_title_is_not_cut():
    figure = plots.samples_figure(pictures(1, side=8), title="Samples from the prior " * 3)
    box = figure.texts[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= figure.bbox.width


def test_traversal_rows_and_labels(tmp_path):
    rows = pictures(6).reshape(2, 3, 3, 64, 64)
    figure = plots.traversal_figure(rows, labels=["location", "appearance 31"])
    page = read(figure, tmp_path)
    assert len(figure.axes) == 6
    for axes, image in zip(figure.axes, rows.reshape(6, 3, 64, 64)):
        assert_shows(page, axes, image)
    labels = [text for text in figure.texts if text.get_text()]
    assert [text.get_text() for text in labels] == ["location", "appearance 31"]
    for text, axes in zip(labels, figure.axes[::3]):
        beside, row = text.get_window_extent(), axes.get_window_extent()
        assert 0 <= beside.x0 and beside.x1 < row.x0 and row.y0 < beside.y0 < beside.y1 < row.y1
    assert len(plots.traversal_figure(rows).axes) == 6
    with pytest.raises(ValueError, match="2 rows"):
        plots.traversal_figure(rows, labels=["location"])


def test_columns_of_a_traversal_have_headings():
    rows, headings = pictures(6).reshape(2, 3, 3, 64, 64), ["-2", "0", "2"]
    figure = plots.traversal_figure(rows, ["a", "b"], headings)
    texts = {text.get_text(): text.get_window_extent() for text in figure.texts}
    for heading, axes in zip(headings, figure.axes):
        above, image = texts[heading], axes.get_window_extent()
        assert image.y1 < above.y0 < above.y1 < figure.bbox.height
        assert image.x0 < above.x0 < above.x1 < image.x1
    with pytest.raises(ValueError, match="3 columns"):
        plots.traversal_figure(rows, headings=["-2", "2"])


def test_objects_are_outlined_in_the_first_column_of_a_traversal(tmp_path):
    rows = np.zeros((2, 3, 3, 64, 64), np.float32)
    scene = scene_of([(20, 30, 10, 8), (50, 50, 6, 12)])
    scene.present[0, 0] = False
    figure = plots.traversal_figure(rows, outlined=replace(scene, kind=torch.ones(1, 12).long()))
    page = read(figure, tmp_path)
    for i, axes in enumerate(figure.axes):
        boxes = [box.get_bbox().bounds for box in axes.patches if isinstance(box, Rectangle)]
        assert boxes == ([(47, 44, 6, 12)] if i % 3 == 0 else [])
        assert has(panel(page, axes), SECOND) == (i % 3 == 0) and not axes.texts


def tables(*counts):
    """Tables with so many rows of three cells."""
    return [plots.Table(["", "x (px)", "a heading"], [[str(i), f"{-10.5 * i}", "yes"]
                                                      for i in range(n)]) for n in counts]


def test_tables_stand_beside_their_images(tmp_path):
    counts = (3, 0, 1, 12)
    scenes = scene_of(*([(5 + 5 * i, 20, 4, 8) for i in range(n)] for n in counts))
    images = pictures(4)
    figure = plots.tables_figure(
        images, np.zeros_like(images), scenes, tables(*counts), tables(3, 0, 0, 66))
    page = read(figure, tmp_path)
    for image, axes in zip(images, figure.axes[::2]):
        assert_shows(page, axes, image)
    # The count, then the numbers of the boxes; all lie on the image.
    for count, axes in zip(counts, figure.axes[1::2]):
        numbers = [text.get_text() for text in axes.texts]
        assert sorted(numbers, key=int) == sorted([*map(str, range(count)), str(count)], key=int)
        image = axes.get_window_extent()
        for text in axes.texts:
            box = text.get_window_extent()
            assert image.x0 <= box.x0 and box.x1 <= image.x1
            assert image.y0 <= box.y0 and box.y1 <= image.y1
    said = [text.get_text() for text in figure.texts]
    assert said.count("none") == 3 and "and 54 more" in said and "nodes" in said
    # Rows are marked in the colours of their objects.
    marks = [text.get_color() for text in figure.texts if text.get_text() == "\u25a0"]
    assert marks == [colour_of(i) for n in counts for i in range(n)]
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 <= box.x1 <= page.shape[1] and 0 <= box.y0 <= box.y1 <= len(page)
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_tables_that_do_not_match_are_refused():
    images, scenes = pictures(2, side=8), scene_of([(1, 1, 2, 2)], [])
    with pytest.raises(ValueError, match="differ"):
        plots.tables_figure(images, images, scenes, tables(1, 0), tables(0))
    with pytest.raises(ValueError, match="differ"):
        plots.tables_figure(images, images[:1], scenes, tables(1, 0), tables(0, 0))
    with pytest.raises(ValueError, match="row for each object"):
        plots.tables_figure(images, images, scenes, tables(1, 1), tables(0, 0))


def test_swap_shows_before_above_after(tmp_path):
    before, after = pictures(3), np.zeros((3, 3, 64, 64), np.float32)
    after[:, 0] = 1
    figure = plots.swap_figure(torch.tensor(before), after)
    page = read(figure, tmp_path)
    assert len(figure.axes) == 6
    for i in range(3):
        above, below = figure.axes[i], figure.axes[3 + i]
        assert_shows(page, above, before[i])
        assert_shows(page, below, after[i])
        assert above.get_position().x0 == below.get_position().x0
        assert above.get_position().y0 > below.get_position().y1
    with pytest.raises(ValueError, match="differ in shape"):
        plots.swap_figure(before, after[:2])


@pytest.mark.parametrize("draw", [
    plots.samples_figure, lambda x: plots.swap_figure(x, x),
    lambda x: plots.inference_figure(x, x), lambda x: plots.traversal_figure(x[None]),
])
def test_images_of_a_wrong_form_are_refused(draw):
    good = pictures(2, side=8)
    assert isinstance(draw(good), Figure)
    for bad, reason in (
        (good[0], "axes"), (good[:, :2], "channels"), (np.moveaxis(good, 1, -1), "channels"),
        ((good * 255).astype(np.uint8), "uint8"),
    ):
        with pytest.raises(ValueError, match=reason):
            draw(bad)


def test_batches_that_differ_are_refused():
    images, scenes = pictures(2, side=8), scene_of([], [])
    with pytest.raises(ValueError, match="differ"):
        plots.inference_figure(images, images[:1])
    with pytest.raises(ValueError, match="differ"):
        plots.inference_figure(images, images, scene_of([]))
    with pytest.raises(ValueError, match="one per slot"):
        plots.inference_figure(images, images, scenes, np.zeros((2, 5, 3, 9, 9), np.float32))
    with pytest.raises(ValueError, match="axes"):
        plots.samples_figure(images[:0])


def test_tensors_of_any_precision_and_values_out_of_range(tmp_path, caplog):
    image = torch.full((1, 1, 8, 8), 1.5, dtype=torch.bfloat16, requires_grad=True)
    figure = plots.samples_figure(torch.cat([image, -image]))
    page = read(figure, tmp_path)
    assert_shows(page, figure.axes[0], np.ones((1, 8, 8)))
    assert_shows(page, figure.axes[1], np.zeros((1, 8, 8)))
    assert not caplog.records    # matplotlib logs a warning when it has to clip


def test_training_curves_plot_every_series():
    steps = np.arange(400)
    noisy = 50 + np.random.default_rng(0).normal(size=400)
    figure = plots.training_curves({
        "loss": (steps.tolist(), (1000 * np.exp(-steps / 50) + 20).tolist()),
        "noisy": (steps.tolist(), noisy.tolist()),
        "accuracy": ([0, 100, 200], [0.25, float("nan"), 1.0]),
        "once": ([5], [2.0]),
    })
    loss, noisy_axes, accuracy, once = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["loss", "noisy", "accuracy", "once"]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]
    raw, mean = (np.asarray(line.get_ydata()) for line in noisy_axes.lines)
    np.testing.assert_array_equal(raw, noisy)
    assert len(mean) == 400 and mean.std() < 0.5 * noisy.std() and abs(mean - 50).max() < 1.5
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), [0.25, np.nan, 1.0])
    np.testing.assert_array_equal(once.lines[0].get_xydata(), [[5, 2]])


def test_training_curves_refuse_what_they_cannot_plot():
    with pytest.raises(ValueError, match="at least one"):
        plots.training_curves({})
    with pytest.raises(ValueError, match="loss"):
        plots.training_curves({"loss": ([1, 2], [1.0])})


def test_figures_leave_no_state_behind():
    plots.samples_figure(pictures(1, side=8))
    plots.training_curves({"loss": ([1], [1.0])})
    assert plt.get_fignums() == []


def test_panels_of_a_row_of_ranks_have_one_labelled_scale():
    even, sure = (np.arange(120) + 0.5)[:, None] / 120, np.zeros((120, 1))
    figure = plots.calibration_figure(
        {"as trained": {"z": even, "w": sure}, "trained on": {"z": even, "w": even}})
    (_, first, second), (_, third, fourth) = figure.axes[:3], figure.axes[3:]
    assert [axes.get_ylabel() for axes in (first, second, third, fourth)] == [
        "as trained\ndensity; 1 if calibrated", "", "trained on\ndensity; 1 if calibrated", ""]
    assert first.get_ylim() == second.get_ylim() and first.get_ylim()[1] > 12
    assert third.get_ylim() == fourth.get_ylim() and third.get_ylim()[1] < 12
    plots.pixels(figure)
    for axes in (first, second):               # numbers stand beside the first alone
        numbers = [text for text in axes.get_yticklabels() if text.get_visible()]
        assert bool(numbers) == (axes is first)


def test_costs_have_a_line_for_each_canvas():
    points = [
        {"side": side, "objects": objects, "seconds_per_image": dict.fromkeys(
            ("median", "min", "max"), 1e-6 * side * objects)}
        for side, objects in ((64, 3), (256, 3), (256, 7))
    ]
    (axes,) = plots.growth_figure(points).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "64 x 64 pixels": [[3, pytest.approx(0.192)]],
        "256 x 256 pixels": [[3, pytest.approx(0.768)], [7, pytest.approx(1.792)]],
    }
    with pytest.raises(ValueError, match="point"):
        plots.growth_figure([])


@pytest.mark.parametrize("name, start", [
    ("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml"),
])
def test_save_writes_the_format_of_the_name(name, start, tmp_path):
    plots.save(plots.samples_figure(pictures(1, side=8)), str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name, reason", [
    ("a.jpgg", ".png, .pdf, .svg"), ("figure", ".png"), ("folder.png", "cannot write"),
    ("file/a.png", "cannot write"),
])
def test_save_refuses_in_one_line(name, reason, tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=reason) as caught:
        plots.save(plots.samples_figure(pictures(1, side=8)), tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"folder.png", "file"}


def test_save_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path, figure = tmp_path / "a.png", plots.samples_figure(pictures(1, side=8))
    path.write_bytes(b"old")

    def half_written(target, **_):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", half_written)
    with pytest.raises(UserError, match="No space left"):
        plots.save(figure, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    plots.save(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")
